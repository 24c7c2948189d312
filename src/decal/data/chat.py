"""Examples -> tokens and which of them are trained. Knows tokenizers and templates, not batches.

A row of messages is rendered once by the tokenizer's chat template and tokenized once, as
`apply_chat_template` does it at inference: without adding special tokens. So a
beginning-of-sequence token is there exactly where the template writes it (Llama, Gemma, Mistral
do; Qwen and SmolLM do not and were never trained with one). Which characters are trained says
spans.py; a token is trained if its first character lies in such a span. Everything goes by
position: token ids never decide, so a padding token that equals the eos token changes nothing.

A row of prompt and completion is plain text, with no template: [bos] prompt completion eos, bos
where the tokenizer adds one by itself. The text is tokenized as a whole, so the boundary is a
position, and a token that holds characters of both sides is not trained but counted
(`Sample.straddling`).

Truncation comes last and cuts on the right. What it cuts is counted, and a row that has no trained
token left is an error.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise
from typing import Any, Protocol

import numpy as np
from jinja2.exceptions import TemplateError
from numpy.typing import NDArray

from decal.data.problems import Problems, RowError
from decal.data.sample import Sample
from decal.data.source import Example, Message
from decal.data.spans import Rendered, Span, find_spans
from decal.errors import DataError

GENERATION = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")
TEMPLATE_ERRORS = (TemplateError, TypeError, ValueError, LookupError)
"""What running a template on a row can raise: its own refusals, and slips in its expressions."""


class Tokenizer(Protocol):
    """What is used of a `transformers` fast tokenizer."""

    is_fast: bool
    chat_template: Any
    bos_token_id: int | None
    eos_token_id: int | None

    @property
    def all_special_ids(self) -> list[int]: ...
    @property
    def added_tokens_decoder(self) -> dict[int, Any]: ...
    def __call__(self, text: str, **options: Any) -> Any: ...
    def apply_chat_template(self, conversation: list[dict[str, str]], **options: Any) -> Any: ...
    def get_chat_template(self) -> str: ...
    def convert_ids_to_tokens(self, ids: list[int]) -> list[str]: ...
    def decode(self, token_ids: list[int], **options: Any) -> str: ...


class Encoder:
    """Encodes examples with one tokenizer.

    Args:
        tokenizer: a fast tokenizer (character offsets are needed to find what is trained).
        max_length: longest sample in tokens.

    Raises:
        DataError: the tokenizer is not a fast one.
    """

    def __init__(self, tokenizer: Tokenizer, max_length: int):
        if not tokenizer.is_fast:
            raise DataError(
                f"the tokenizer {type(tokenizer).__name__} gives no character offsets, so what is "
                "trained cannot be found",
                hint="use a base model with a tokenizer.json",
            )
        self.tokenizer = tokenizer
        self.max_length = max_length
        self._marks = np.array(
            sorted({*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}), dtype=np.int64
        )
        self._trims = _trims_spaces(tokenizer)
        self._bos = own_bos(tokenizer)
        self._template = _template(tokenizer)
        self._has_markers = bool(self._template and GENERATION.search(self._template))

    def encode(self, example: Example) -> Sample:
        """Encode one example.

        Raises:
            DataError: the row would train nothing or the wrong thing, or there is no template.
        """
        return self.encode_all([example])[0]

    def encode_all(self, examples: Iterable[Example], source: str = "data") -> list[Sample]:
        """Encode all examples; `source` names them in errors.

        Raises:
            DataError: rows that would train nothing or the wrong thing, all of them in one error.
        """
        return list(self.encode_iter(examples, source))

    def encode_iter(self, examples: Iterable[Example], source: str = "data") -> Iterator[Sample]:
        """Like `encode_all`, one sample after the other, for a progress bar.

        After the first bad row no more samples come, only the error when all rows have been seen.
        """
        problems = Problems(source)
        total = bad = 0
        for example in examples:
            total += 1
            try:
                sample = self._encode(example)
            except RowError as problem:
                problems.add(example.row, problem)
                bad += 1
                continue
            if not bad:
                yield sample
        if error := problems.error(total):
            raise error

    def _encode(self, example: Example) -> Sample:
        if example.messages is not None:
            return self._encode_chat(example.row, example.messages)
        if example.prompt is None or example.completion is None:
            raise RowError("neither messages nor a prompt and a completion")
        return self._encode_text(example.row, example.prompt, example.completion)

    # --- chats ----------------------------------------------------------------------------

    def _encode_chat(self, row: int, messages: tuple[Message, ...]) -> Sample:
        if self._template is None:
            raise DataError(
                "the tokenizer has no chat template, and the rows are `messages`",
                hint="use an instruction-tuned base model, or rows with `prompt` and `completion`",
            )
        try:
            text = self._run_template(messages, generation_prompt=False)
        except TEMPLATE_ERRORS as error:
            raise RowError(
                "refused by the chat template", f"the chat template refuses the row: {error}"
            ) from error
        ids, starts, ends, marked = self._tokenize(text, messages)
        self._require_one_bos(ids)
        is_mark = np.isin(ids, self._marks) & (ends > starts)
        marks = list(zip(starts[is_mark].tolist(), ends[is_mark].tolist(), strict=True))
        runs = None if marked is None else _runs(marked, starts, ends)
        spans = find_spans(Rendered(text, messages, marks, runs), self._render)
        trained = np.zeros(len(ids), dtype=np.bool_)
        for start, end in spans:
            inside = (starts >= start) & (starts < end)
            if inside.sum() < 2:
                raise RowError(
                    "an answer that is one token with its prompt",
                    f"the answer {text[start:end]!r} is one token with the text before it",
                    hint="the chat template must separate the assistant's words from their prompt",
                )
            trained |= inside
        firsts = [start for start, _ in spans]
        return self._sample(row, ids, trained, _straddling(starts, ends, firsts))

    def _run_template(self, messages: Sequence[Message], *, generation_prompt: bool) -> str:
        chat = [{"role": message.role, "content": message.content} for message in messages]
        text: str = self.tokenizer.apply_chat_template(
            chat, tokenize=False, add_generation_prompt=generation_prompt
        )
        return text

    def _render(self, messages: Sequence[Message], generation_prompt: bool) -> str | None:
        if not messages and not generation_prompt:
            return ""
        try:
            return self._run_template(messages, generation_prompt=generation_prompt)
        except TEMPLATE_ERRORS:
            return None

    def _tokenize(
        self, text: str, messages: Sequence[Message] = ()
    ) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64], NDArray[np.bool_] | None]:
        """ids, first and last+1 characters of the tokens, and which lie in generation markers."""
        options = {"return_offsets_mapping": True, "verbose": False}
        marked = None
        if self._has_markers and messages:
            chat = [{"role": message.role, "content": message.content} for message in messages]
            encoded = self.tokenizer.apply_chat_template(
                chat,
                return_dict=True,
                return_assistant_tokens_mask=True,
                tokenizer_kwargs=options,
            )
            marked = np.array(encoded["assistant_masks"], dtype=np.bool_)
        else:
            encoded = self.tokenizer(text, add_special_tokens=False, **options)
        ids = np.array(encoded["input_ids"], dtype=np.int64)
        offsets = np.array(encoded["offset_mapping"], dtype=np.int64).reshape(-1, 2)
        starts, ends = offsets[:, 0], offsets[:, 1]
        if self._trims:
            before = np.concatenate([[0], np.maximum.accumulate(ends)[:-1]]) if len(ids) else ends
            starts = np.minimum(starts, before)
        return ids, starts, ends, marked

    def _require_one_bos(self, ids: NDArray[np.int64]) -> None:
        bos = self.tokenizer.bos_token_id
        if bos is not None and len(ids) > 1 and ids[0] == bos and ids[1] == bos:
            raise RowError(
                "two beginning-of-sequence tokens",
                "the rendered chat begins with two beginning-of-sequence tokens",
                hint="remove the bos token from the rows or from the chat template",
            )

    # --- plain text -----------------------------------------------------------------------

    def _encode_text(self, row: int, prompt: str, completion: str) -> Sample:
        eos = self.tokenizer.eos_token_id
        if eos is None:
            raise DataError(
                "the tokenizer has no eos token, so the model cannot learn where a completion ends",
                hint="use a base model whose tokenizer has an eos token",
            )
        ids, starts, ends, _ = self._tokenize(prompt + completion)
        trained = starts >= len(prompt)
        if not trained.any():
            raise RowError(
                "a completion that is one token with the end of its prompt",
                f"the completion {completion!r} is one token with the end of the prompt "
                f"{prompt[-10:]!r}",
                hint="move the space from the end of the prompt to the beginning of the completion",
            )
        straddling = _straddling(starts, ends, [len(prompt)] if prompt else [])
        if ids[-1] != eos:
            ids, trained = np.append(ids, eos), np.append(trained, True)
        if self._bos is not None and ids[0] != self._bos:
            ids, trained = np.insert(ids, 0, self._bos), np.insert(trained, 0, False)
        return self._sample(row, ids, trained, straddling)

    def _sample(
        self, row: int, ids: NDArray[np.int64], trained: NDArray[np.bool_], straddling: int
    ) -> Sample:
        """Truncate, and refuse what would train nothing."""
        trained[:1] = False
        cut = max(0, len(ids) - self.max_length)
        lost = int(trained[self.max_length :].sum())
        last = int(np.flatnonzero(trained)[-1]) if trained.any() else -1
        kept = trained[: self.max_length].copy()
        if not kept.any():
            raise RowError(
                "no trained token",
                f"none of the first {self.max_length:,} of {len(ids):,} tokens is trained"
                if cut
                else f"none of the row's {len(ids):,} tokens is trained",
                hint="raise `data.max_length`, or shorten the prompts" if cut else None,
            )
        return Sample(
            row=row,
            input_ids=ids[: self.max_length].astype(np.int32),
            trained=kept,
            truncated=cut,
            lost=lost,
            ended=last < self.max_length,
            straddling=straddling,
        )


def _template(tokenizer: Tokenizer) -> str | None:
    if not tokenizer.chat_template:
        return None
    try:
        return tokenizer.get_chat_template()
    except ValueError as error:
        raise DataError(
            "the tokenizer has several chat templates and none is called `default`",
            hint="set `chat_template` in the base's tokenizer_config.json to one of them",
        ) from error


def own_bos(tokenizer: Tokenizer) -> int | None:
    """The bos token that the tokenizer puts in front of plain text, or None if it does not."""
    bos = tokenizer.bos_token_id
    ids = tokenizer("a")["input_ids"]
    return bos if bos is not None and ids and ids[0] == bos else None


def _trims_spaces(tokenizer: Tokenizer) -> bool:
    """Whether offsets leave out the space that a token begins with (`trim_offsets`).

    Such a token begins one character earlier than its offset says. Tokenizers that drop spaces
    altogether show the same gap, but their tokens do not carry the space.
    """
    encoded = tokenizer("a a", add_special_tokens=False, return_offsets_mapping=True)
    tokens = tokenizer.convert_ids_to_tokens(encoded["input_ids"])
    return any(
        start == 2 and token[:1] in ("Ġ", "▁", " ")
        for token, (start, _) in zip(tokens, encoded["offset_mapping"], strict=True)
    )


def _runs(
    marked: NDArray[np.bool_], starts: NDArray[np.int64], ends: NDArray[np.int64]
) -> list[Span]:
    """Characters of each run of marked tokens."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], marked, [False]]).astype(np.int8)))
    return [(int(starts[a]), int(ends[b - 1])) for a, b in list(pairwise(edges))[::2]]


def _straddling(
    starts: NDArray[np.int64], ends: NDArray[np.int64], boundaries: Sequence[int]
) -> int:
    """Tokens with a boundary inside them."""
    return sum(int(((starts < b) & (ends > b)).any()) for b in boundaries)
