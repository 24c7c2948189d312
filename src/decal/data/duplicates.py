"""Rows with the same text: among the training rows, and between these and the evaluation rows.

Two rows are the same if all that a model would see of them is, whitespace apart: roles, contents
and tool calls of a chat, prompt and completion, or the text. A label is not part of the text, so
that a text with two labels is found, and said to contradict itself. Texts are compared by hash; a
data set of any size needs 16 bytes a row.

An evaluation row that is a training row measures memory and not what was learned. Knows neither
tokenizers nor templates.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from hashlib import blake2b

from decal.data.example import Example

__all__ = ["Duplicates", "repeated", "shared"]


@dataclass(frozen=True, kw_only=True)
class Duplicates:
    """Rows whose text another row has already."""

    count: int = 0
    first: tuple[int, int] | None = None
    """Numbers of the first of them and of the row that it repeats; None where there are none."""
    contrary: int = 0
    """Those among them whose label is not that of the row they repeat."""


def repeated(examples: Iterable[Example]) -> Duplicates:
    """Rows that repeat an earlier row of the same data."""
    return _found({}, examples)


def shared(evaluated: Iterable[Example], trained: Iterable[Example]) -> Duplicates:
    """Evaluation rows that are training rows too; `first` is (evaluation row, training row)."""
    known: dict[bytes, Example] = {}
    for example in trained:
        known.setdefault(_key(example), example)
    return _found(known, evaluated, grows=False)


def _found(
    known: dict[bytes, Example], examples: Iterable[Example], *, grows: bool = True
) -> Duplicates:
    count = contrary = 0
    first: tuple[int, int] | None = None
    for example in examples:
        key = _key(example)
        earlier = known.get(key)
        if earlier is None:
            if grows:
                known[key] = example
            continue
        count += 1
        contrary += earlier.label != example.label
        first = first or (example.row, earlier.row)
    return Duplicates(count=count, first=first, contrary=contrary)


def _key(example: Example) -> bytes:
    """16 bytes of the row's text. Lengths are hashed too: "a b" + "c" is not "a" + "b c"."""
    hashed = blake2b(digest_size=16)
    for part in _parts(example):
        text = " ".join(part.split()).encode("utf-8", "surrogatepass")
        hashed.update(b"%d:" % len(text) + text)
    return hashed.digest()


def _parts(example: Example) -> Iterable[str]:
    if example.messages is not None:
        for message in example.messages:
            yield message.role
            yield message.content
            if message.extra:
                yield json.dumps(message.extra, sort_keys=True, default=str)
        if example.tools:
            yield json.dumps(example.tools, sort_keys=True, default=str)
    elif example.text is not None:
        yield example.text
    else:
        yield example.prompt or ""
        yield example.completion or ""
