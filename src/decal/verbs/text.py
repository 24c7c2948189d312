"""Text in, text out: prompts to completions, texts to labels, and how many are right.

Every completion of decal's is made here, one or many, so that `generate` and `compare` cannot
differ: what the model's own generation_config asks for besides (a repetition penalty, say) is left
out. A penalty changes answers, and greedy means the likeliest token.

Knows no adapters and no files; works on any causal language model with its tokenizer, and on
classifiers for `classify`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from pydantic import Field
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase, TextStreamer

from decal.config import Settings
from decal.data.example import Message
from decal.data.template import TEMPLATE_ERRORS, ChatTemplate
from decal.data.tokens import own_bos
from decal.errors import DataError


@dataclass(frozen=True)
class Chat:
    """The messages of a chat up to the turn that is asked for, and the functions it may call."""

    messages: tuple[Message, ...]
    tools: tuple[Any, ...] | None = None

    @classmethod
    def of(cls, turns: Sequence[Mapping[str, Any]]) -> Chat:
        """From messages as dicts with `role` and `content`."""
        return cls(tuple(_message(turn) for turn in turns))


def _message(turn: Mapping[str, Any]) -> Message:
    extra = {key: value for key, value in turn.items() if key not in ("role", "content")}
    return Message(str(turn["role"]), turn.get("content") or "", extra)


Prompt = str | Chat | Sequence[Mapping[str, Any]]
"""Plain text, or a chat, or its messages as dicts."""
Observe = Callable[[int, int], None]
"""Called with how many are done, and how many there are."""


class Sampling(Settings):
    """How tokens are chosen. Temperature 0 takes the likeliest; the rest is for those above."""

    max_new_tokens: int = Field(default=256, ge=1)
    """Most tokens to generate; fewer where the model's context ends."""
    temperature: float = Field(default=0.0, ge=0)
    """0 is greedy, 0.7 is usual."""
    top_p: float = Field(default=1.0, gt=0, le=1)
    """Choose among the likeliest tokens that together have this probability."""
    top_k: int | None = Field(default=None, ge=1)
    """Choose among so many of the likeliest tokens; null among all."""
    seed: int = Field(default=0, ge=0)
    """The same seed gives the same text."""


class Completion(str):
    """The text of a completion, without special tokens and outer spaces, and how it came about."""

    prompt_tokens: int = 0
    new_tokens: int = 0
    """Generated tokens, the one that ended the completion included."""
    finished: bool = True
    """Whether the model ended it; False where max_new_tokens or the context did."""
    probability: float | None = None
    """Of the label that a classifier gave; None for text."""

    @classmethod
    def of(cls, text: str, **facts: Any) -> Completion:
        """`text` with some of the facts above."""
        made = cls(text)
        for name, value in facts.items():
            setattr(made, name, value)
        return made


def encode_prompt(tokenizer: PreTrainedTokenizerBase, prompt: Prompt) -> list[int]:
    """Token ids of a prompt, as training saw it (data/chat.py).

    Plain text gets the tokenizer's own bos and nothing else: some tokenizers close every text with
    eos, and a model that has seen its prompt end answers nothing. Chats are rendered by the
    template, or the plain one that training takes where there is none, with the generation prompt.

    Raises:
        DataError: the template refuses the chat.
    """
    if isinstance(prompt, str):
        ids = list(tokenizer(prompt, add_special_tokens=False)["input_ids"])
        bos = own_bos(tokenizer)
        return ids if bos is None or ids[:1] == [bos] else [bos, *ids]
    chat = prompt if isinstance(prompt, Chat) else Chat.of(prompt)
    try:
        template = ChatTemplate(tokenizer)
        text = template.render(chat.messages, chat.tools, generation_prompt=True)
    except TEMPLATE_ERRORS as error:
        roles = ", ".join(message.role for message in chat.messages)
        raise DataError(f"the chat template refuses the turns `{roles}`: {error}") from error
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def complete(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    *,
    max_new_tokens: int = 64,
    batch_size: int = 64,
    progress: Observe | None = None,
) -> list[str]:
    """Greedy completions, in the order of the prompts, without special tokens and outer spaces.

    Prompts of similar length share a batch, padded on the left; `progress(done, total)` is called
    after each batch.

    Raises:
        DataError: a prompt that the template refuses or the model's context cannot hold.
    """
    encoded = [encode_prompt(tokenizer, p) for p in prompts]
    _refuse_long(model, encoded)
    order = sorted(range(len(encoded)), key=lambda i: len(encoded[i]))
    results: list[str] = [""] * len(encoded)
    sampling = Sampling(max_new_tokens=max_new_tokens)
    for start in range(0, len(order), batch_size):
        chunk = order[start : start + batch_size]
        made = _generate(model, tokenizer, [encoded[i] for i in chunk], sampling)
        for i, completion in zip(chunk, made, strict=True):
            results[i] = completion
        if progress:
            progress(min(start + batch_size, len(order)), len(order))
    return results


def complete_one(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: Prompt,
    sampling: Sampling,
    stream: Callable[[str], None] | None = None,
) -> Completion:
    """One completion; `stream` is called with pieces of its text as they are generated.

    Raises:
        DataError: the template refuses the prompt, or the model's context cannot hold it.
    """
    encoded = [encode_prompt(tokenizer, prompt)]
    _refuse_long(model, encoded)
    return _generate(model, tokenizer, encoded, sampling, stream)[0]


@torch.no_grad()
def _generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    encoded: Sequence[Sequence[int]],
    sampling: Sampling,
    stream: Callable[[str], None] | None = None,
) -> list[Completion]:
    """One batch of encoded prompts to completions; the caller has checked their lengths."""
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    stops = stop_tokens(model, tokenizer)
    ids, mask = _padded(encoded, pad or 0, left=True)
    width, context = ids.shape[1], context_length(model)
    room = sampling.max_new_tokens if context is None else context - width
    warm = {"temperature": sampling.temperature, "top_p": sampling.top_p}
    settings = GenerationConfig(
        max_new_tokens=min(room, sampling.max_new_tokens),
        do_sample=sampling.temperature > 0,
        pad_token_id=pad or 0,
        eos_token_id=stops,
        **({**warm, "top_k": sampling.top_k or 0} if sampling.temperature > 0 else {}),
    )
    with _plainly(model), _seeded(model, sampling.seed):
        out = model.generate(
            input_ids=ids.to(model.device),
            attention_mask=mask.to(model.device),
            generation_config=settings,
            streamer=_Stream(tokenizer, stream) if stream else None,
        )
    made = []
    for row, prompt in enumerate(encoded):
        new = out[row, width:]
        end = next((i for i, token in enumerate(new.tolist()) if token in (stops or ())), None)
        kept = new if end is None else new[: end + 1]
        text = tokenizer.decode(kept, skip_special_tokens=True).strip()
        facts = {"prompt_tokens": len(prompt), "new_tokens": len(kept), "finished": end is not None}
        made.append(Completion.of(text, **facts))
    return made


class _Stream(TextStreamer):
    """Hands finished pieces of text to a function instead of printing them."""

    def __init__(self, tokenizer: Any, emit: Callable[[str], None]):
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self._emit = emit
        self._began = False

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        text = text if self._began else text.lstrip()
        if text:
            self._began = True
            self._emit(text)


@contextmanager
def _plainly(model: PreTrainedModel) -> Iterator[None]:
    """Evaluation mode, and no generation settings of the model's own, inside the block."""
    training, settings = model.training, model.generation_config
    model.eval()
    model.generation_config = GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = settings
        model.train(training)


@contextmanager
def _seeded(model: PreTrainedModel, seed: int) -> Iterator[None]:
    """torch's random numbers follow `seed` inside the block, and go on as before after it."""
    device = model.device
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


def _padded(encoded: Sequence[Sequence[int]], pad: int, *, left: bool) -> tuple[Tensor, Tensor]:
    """Rows of ids as one int64 tensor [n, longest], and its mask: 1 for tokens, 0 for padding."""
    width = max(len(ids) for ids in encoded)
    ids = torch.full((len(encoded), width), pad, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for row, tokens in enumerate(encoded):
        place = slice(width - len(tokens), width) if left else slice(0, len(tokens))
        ids[row, place] = torch.tensor(tokens, dtype=torch.int64)
        mask[row, place] = 1
    return ids, mask


def stop_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int] | None:
    """Ids that end a completion: the tokenizer's eos and those of the generation config."""
    configured = model.generation_config.eos_token_id if model.generation_config else None
    ids = set(configured if isinstance(configured, list) else [configured])
    ids.add(tokenizer.eos_token_id)
    return sorted(i for i in ids if i is not None) or None


def context_length(model: PreTrainedModel) -> int | None:
    """Tokens that prompt and completion may have together; None where config.json sets no end."""
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return limit if isinstance(limit, int) and limit > 0 else None


def _refuse_long(model: PreTrainedModel, encoded: Sequence[Sequence[int]], room: int = 1) -> None:
    """Raises DataError unless each prompt leaves `room` tokens of the model's context."""
    context = context_length(model)
    long = [i for i, ids in enumerate(encoded) if context is not None and len(ids) + room > context]
    if long:
        first = len(encoded[long[0]])
        many = f"{len(long)} of {len(encoded)} prompts are" if len(encoded) > 1 else "the prompt is"
        which = f"prompt {long[0] + 1} has {first:,} tokens" if len(encoded) > 1 else None
        tokens = f"{first:,} tokens" if which is None else "too many tokens"
        raise DataError(
            f"{many} too long: {tokens}, the model's context holds {context:,}",
            details=[which] if which else [],
            hint="shorten it, or take a model with a longer context",
        )


@torch.no_grad()
def classify(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    *,
    batch_size: int = 32,
    progress: Observe | None = None,
) -> list[tuple[str, float]]:
    """The likeliest label of each text and its probability, in the order of the texts.

    Texts of similar length share a batch, padded on the right with the model's own padding token,
    by which decoders find the last token that they pool. Names of the labels are those of
    config.id2label.

    Raises:
        DataError: a text that is empty or that the model's context cannot hold.
    """
    encoded = [list(tokenizer(text)["input_ids"]) for text in texts]
    empty = [i for i, ids in enumerate(encoded) if not ids]
    if empty:
        raise DataError(f"{len(empty)} of {len(texts)} texts are empty, first text {empty[0] + 1}")
    _refuse_long(model, encoded, room=0)
    order = sorted(range(len(encoded)), key=lambda i: len(encoded[i]))
    results: list[tuple[str, float]] = [("", 0.0)] * len(encoded)
    pad = model.config.get_text_config().pad_token_id or 0
    training = model.training
    model.eval()
    for start in range(0, len(order), batch_size):
        chunk = order[start : start + batch_size]
        ids, mask = _padded([encoded[i] for i in chunk], pad, left=False)
        logits = model(input_ids=ids.to(model.device), attention_mask=mask.to(model.device)).logits
        best = torch.softmax(logits.float(), dim=-1).max(dim=-1)
        for i, label, p in zip(chunk, best.indices.tolist(), best.values.tolist(), strict=True):
            results[i] = (str(model.config.id2label[label]), p)
        if progress:
            progress(min(start + batch_size, len(order)), len(order))
    model.train(training)
    return results


def exact_match(predictions: Sequence[str], expected: Sequence[str]) -> float:
    """Share of predictions equal to what was expected, outer spaces apart."""
    if not expected:
        return float("nan")
    hits = sum(p.strip() == e.strip() for p, e in zip(predictions, expected, strict=True))
    return hits / len(expected)
