"""Examples -> tokens and which of them are trained. Knows tokenizers and templates, not batches.

A row of messages is rendered once by the tokenizer's chat template (template.py) and tokenized
once, as `apply_chat_template` does it at inference: without adding special tokens. So a
beginning-of-sequence token is there exactly where the template writes it (Llama, Gemma, Mistral
do; Qwen and SmolLM do not and were never trained with one). Which characters are trained says
spans.py; a token is trained if its first character lies in such a span (tokens.py). Everything goes
by position: token ids never decide, so a padding token that equals the eos token changes nothing.

A row of prompt and completion is plain text, with no template: [bos] prompt completion eos, bos
where the tokenizer adds one by itself. The text is tokenized as a whole, so the boundary is a
position, and a token that holds characters of both sides is not trained but counted
(`Sample.straddling`). A row of text is the same without a prompt.

Truncation comes last and cuts on the right. What it cuts is counted, and a row that has no trained
token left is an error; or longer rows are dropped whole, and counted.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from decal.config import DataConfig
from decal.data.example import Example, Message
from decal.data.problems import RowError, each_row
from decal.data.sample import Sample
from decal.data.spans import Rendered, find_spans
from decal.data.template import DAY, DEFAULT_TEMPLATE, TEMPLATE_ERRORS, ChatTemplate
from decal.data.tokens import Placed, Span, TextTokens, Tokenizer, Tokens, own_bos
from decal.errors import DataError

__all__ = ["DEFAULT_TEMPLATE", "TEMPLATE_ERRORS", "Encoder", "Tokenizer", "own_bos"]


class Encoder:
    """Encodes examples with one tokenizer, for training on their tokens.

    Args:
        tokenizer: without a chat template of its own, chats get `DEFAULT_TEMPLATE`.
        settings: max_length, overflow and turns are honoured here.

    Raises:
        DataError: the tokenizer has several chat templates and none for general use.
    """

    def __init__(self, tokenizer: Tokenizer, settings: DataConfig):
        self.tokenizer = tokenizer
        self.settings = settings
        self._tokens = Tokens(tokenizer)
        self._bos = own_bos(tokenizer)
        self._template = ChatTemplate(tokenizer)
        self._ends: set[int] = set()
        self._chats = 0
        self._dropped: list[int] = []

    @property
    def template_used(self) -> str | None:
        """The text of the plain chat template, if chats were encoded with it; None if they had the
        tokenizer's own, or there were none."""
        return self._template.default if self._chats else None

    @property
    def dropped(self) -> tuple[int, ...]:
        """Numbers of the rows that the last encoding left out as too long."""
        return tuple(self._dropped)

    @property
    def notes(self) -> tuple[str, ...]:
        """What a user should know about the chat template, after encoding."""
        notes = []
        if self.template_used is not None:
            notes.append(
                "the tokenizer has no chat template: a plain one is used (### User: …), and stored "
                "with the adapter"
            )
        if self._chats and self._template.dated:
            notes.append(f"the chat template writes the date: {DAY:%d %b %Y} in all rows")
        eos = self.tokenizer.eos_token_id
        if self._ends and eos not in self._ends:
            ends = " or ".join(sorted(self.tokenizer.decode([end]) for end in self._ends))
            own = "has no eos token" if eos is None else f"ends with {self.tokenizer.decode([eos])}"
            notes.append(f"turns end with {ends}, the tokenizer {own}: generation must stop there")
        return tuple(notes)

    def encode(self, example: Example) -> Sample:
        """Encode one example.

        Raises:
            DataError: the row would train nothing or the wrong thing, or is dropped.
        """
        return self.encode_all([example])[0]

    def encode_all(self, examples: Iterable[Example], source: str = "data") -> list[Sample]:
        """Encode all examples; `source` names them in errors.

        Raises:
            DataError: rows that would train nothing or the wrong thing, all of them in one error;
                or all rows are dropped as too long.
        """
        return list(self.encode_iter(examples, source))

    def encode_iter(self, examples: Iterable[Example], source: str = "data") -> Iterator[Sample]:
        """Like `encode_all`, one sample after the other, for a progress bar.

        After the first bad row no more samples come, only the error when all rows have been seen.
        """
        self._dropped = []
        yield from each_row(examples, source, self._encode, self._dropped)

    def _encode(self, example: Example) -> Sample | None:
        if example.label is not None:
            raise DataError(
                "the rows have labels, and the objective trains on text",
                hint="set `objective: classify`, or `data.layout: text` to train on the text alone",
            )
        if example.messages is not None:
            return self._encode_chat(example, example.messages)
        if example.text is not None:
            return self._encode_text(example.row, "", example.text)
        if example.prompt is None or example.completion is None:
            raise RowError("neither messages nor a prompt and a completion")
        return self._encode_text(example.row, example.prompt, example.completion)

    # --- chats ----------------------------------------------------------------------------

    def _encode_chat(self, example: Example, messages: tuple[Message, ...]) -> Sample | None:
        if self._template.default is not None:
            self._require_eos()
        self._chats += 1
        text, decode = self._rendered(messages, example)
        tokens, runs = self._tokenize(text, messages, example, decode)
        self._require_one_bos(tokens.ids)

        def render(part: Sequence[Message], generation_prompt: bool) -> str | None:
            if not part and not generation_prompt:
                return ""
            try:
                return self._template.render(
                    part,
                    example.tools,
                    generation_prompt=generation_prompt,
                    decode_arguments=decode,
                )
            except TEMPLATE_ERRORS:
                return None

        row = Rendered(text, messages, tokens.marks, runs)
        spans = find_spans(row, render, self._turns(messages))
        trained = np.zeros(len(tokens.ids), dtype=np.bool_)
        for start, end in spans:
            inside = tokens.inside(start, end)
            if inside.sum() < 2:
                raise RowError(
                    "an answer that is one token with its prompt",
                    f"the answer {text[start:end]!r} is one token with the text before it",
                    hint="the chat template must separate the assistant's words from their prompt",
                )
            trained |= inside
            self._ends.add(int(tokens.ids[np.flatnonzero(inside)[-1]]))
        straddling = tokens.straddling([start for start, _ in spans])
        return self._sample(example.row, tokens.ids, trained, straddling)

    def _rendered(self, messages: tuple[Message, ...], example: Example) -> tuple[str, bool]:
        """The chat as text, and whether the arguments of tool calls went in as objects."""
        refusal: Exception | None = None
        for decode in (True, False):
            try:
                text = self._template.render(messages, example.tools, decode_arguments=decode)
            except TEMPLATE_ERRORS as error:
                refusal = refusal or error
                continue
            self._require_tools(text, messages, example, decode)
            return text, decode
        turn = self._template.refused_turn(messages, example.tools)
        raise RowError(
            "refused by the chat template",
            f"the chat template refuses the row at message {turn} ({messages[turn - 1].role}): "
            f"{refusal}",
        ) from refusal

    def _require_tools(
        self, text: str, messages: tuple[Message, ...], example: Example, decode: bool
    ) -> None:
        if example.tools and text == self._template.render(messages, decode_arguments=decode):
            raise RowError(
                "tools that the chat template drops",
                f"the chat template leaves out the row's {len(example.tools)} `tools`",
                hint="use a base whose chat template writes tools, or remove the column",
            )

    def _turns(self, messages: Sequence[Message]) -> list[int]:
        """Indices of the turns to train."""
        turns = [i for i, message in enumerate(messages) if message.role == "assistant"]
        chosen = turns[-1:] if self.settings.turns == "last" else turns
        trained = [i for i in chosen if messages[i].trained]
        if not trained:
            raise RowError(
                "no trained message",
                "the last turn of the assistant has `weight: 0`, and only that may be trained",
                hint="set `data.turns: all`",
            )
        return trained

    def _tokenize(
        self, text: str, messages: Sequence[Message], example: Example, decode: bool
    ) -> tuple[TextTokens, list[Span] | None]:
        """The tokens, and the runs of characters inside generation markers where there are any."""
        if not self._template.has_markers(example.tools):
            return self._tokens(text), None
        encoded = self._template.encode_marked(messages, example.tools, decode_arguments=decode)
        tokens = self._tokens.placed(encoded)
        return tokens, _runs(np.array(encoded["assistant_masks"], dtype=np.bool_), tokens)

    def _require_one_bos(self, ids: NDArray[np.int64]) -> None:
        bos = self.tokenizer.bos_token_id
        if bos is not None and len(ids) > 1 and ids[0] == bos and ids[1] == bos:
            raise RowError(
                "two beginning-of-sequence tokens",
                "the rendered chat begins with two beginning-of-sequence tokens",
                hint="remove the bos token from the rows or from the chat template",
            )

    # --- plain text -----------------------------------------------------------------------

    def _require_eos(self) -> int:
        eos = self.tokenizer.eos_token_id
        if eos is None:
            raise DataError(
                "the tokenizer has no eos token, so the model cannot learn where an answer ends",
                hint="use a base model whose tokenizer has an eos token",
            )
        return eos

    def _encode_text(self, row: int, prompt: str, completion: str) -> Sample | None:
        eos = self._require_eos()
        text = prompt + completion
        tokens = self._tokens(text)
        ids, trained = tokens.ids, tokens.inside(len(prompt), len(text))
        if not trained.any():
            raise RowError(
                "a completion that is one token with the end of its prompt",
                f"the completion {completion!r} is one token with the end of the prompt "
                f"{prompt[-10:]!r}",
                hint="move the space from the end of the prompt to the beginning of the completion",
            )
        straddling = tokens.straddling([len(prompt)] if prompt else [])
        if ids[-1] != eos:
            ids, trained = np.append(ids, eos), np.append(trained, True)
        if self._bos is not None and ids[0] != self._bos:
            ids, trained = np.insert(ids, 0, self._bos), np.insert(trained, 0, False)
        return self._sample(row, ids, trained, straddling)

    def _sample(
        self, row: int, ids: NDArray[np.int64], trained: NDArray[np.bool_], straddling: int
    ) -> Sample | None:
        """Truncate or drop (None), and refuse what would train nothing."""
        longest = self.settings.max_length
        trained[:1] = False
        cut = max(0, len(ids) - longest)
        if cut and self.settings.overflow == "drop":
            return None
        lost = int(trained[longest:].sum())
        last = int(np.flatnonzero(trained)[-1]) if trained.any() else -1
        kept = trained[:longest].copy()
        if not kept.any():
            raise RowError(
                "no trained token",
                f"none of the first {longest:,} of {len(ids):,} tokens is trained"
                if cut
                else f"none of the row's {len(ids):,} tokens is trained",
                hint="raise `data.max_length`, or shorten the prompts" if cut else None,
            )
        return Sample(
            row=row,
            input_ids=ids[:longest].astype(np.int32),
            trained=kept,
            truncated=cut,
            lost=lost,
            ended=last < longest,
            straddling=straddling,
        )


def _runs(marked: NDArray[np.bool_], tokens: Placed) -> list[Span]:
    """Characters of each run of marked tokens."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], marked, [False]]).astype(np.int8)))
    return [(int(tokens.starts[a]), int(tokens.ends[b - 1])) for a, b in list(pairwise(edges))[::2]]
