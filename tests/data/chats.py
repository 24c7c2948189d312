"""Small things that tests of encoding share: rows, encoders, and what they train."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from decal.config import DataConfig
from decal.data.chat import Encoder
from decal.data.example import Example, Message
from decal.data.sample import Sample
from decal.data.stats import show_sample

Make = Callable[..., Any]


def chat(*turns: str, system: str | None = None, row: int = 1) -> Example:
    """Turns alternate, the user begins."""
    roles = ("user", "assistant")
    messages = [Message(roles[i % 2], turn) for i, turn in enumerate(turns)]
    if system is not None:
        messages.insert(0, Message("system", system))
    return Example(row=row, messages=tuple(messages))


def encoder(tokenizer: Any, max_length: int = 500, **settings: Any) -> Encoder:
    return Encoder(tokenizer, DataConfig(path="rows", max_length=max_length, **settings))


def trained(sample: Sample, tokenizer: Any) -> list[str]:
    return [text for text, flag in show_sample(sample, tokenizer) if flag]


def derived(tokenizer: Any, template: str, **tokens: str) -> Any:
    """The same tokenizer with another chat template (and other special tokens)."""
    return type(tokenizer)(
        tokenizer_object=tokenizer.backend_tokenizer,
        chat_template=template,
        **{"eos_token": tokenizer.eos_token, **tokens},
    )
