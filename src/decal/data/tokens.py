"""Text -> tokens, and which tokens a stretch of characters is. Knows no chats and no layouts.

What is trained is found in characters (spans.py) and has to be carried over to tokens. Fast
tokenizers say which characters a token was made of (`Placed`). Slow ones do not, so a boundary is
looked for by tokenizing the text up to it: if that gives a prefix of the whole text's tokens, the
boundary lies behind them (`Unplaced`); else a token reaches across it, or the tokenizer looks
ahead, and the row is refused. A fast tokenizer needs no such luck: a token across a boundary is
just not trained.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cached_property
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from decal.data.problems import RowError

Span = tuple[int, int]
"""Characters [start, end)."""


class Tokenizer(Protocol):
    """What is used of a `transformers` tokenizer."""

    is_fast: bool
    chat_template: Any
    bos_token_id: int | None
    eos_token_id: int | None
    model_max_length: int

    @property
    def all_special_ids(self) -> list[int]: ...
    @property
    def added_tokens_decoder(self) -> dict[int, Any]: ...
    def __call__(self, text: str, **options: Any) -> Any: ...
    def apply_chat_template(self, conversation: list[dict[str, Any]], **options: Any) -> Any: ...
    def get_chat_template(
        self, chat_template: str | None = None, tools: list[Any] | None = None
    ) -> str: ...
    def convert_ids_to_tokens(self, ids: list[int]) -> list[str]: ...
    def decode(self, token_ids: list[int], **options: Any) -> str: ...


class TextTokens(Protocol):
    """The tokens of one text."""

    ids: NDArray[np.int64]

    @property
    def marks(self) -> list[Span]:
        """Characters of the added and special tokens in the text, in order."""

    def inside(self, start: int, end: int) -> NDArray[np.bool_]:
        """bool [T]: which tokens begin in the characters [start, end)."""

    def straddling(self, boundaries: Sequence[int]) -> int:
        """Tokens with a boundary inside them."""


class Tokens:
    """Tokenizes texts with one tokenizer, without adding special tokens."""

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._mark_ids = np.array(
            sorted({*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}), dtype=np.int64
        )
        self._trims = tokenizer.is_fast and _trims_spaces(tokenizer)

    def __call__(self, text: str) -> TextTokens:
        """The tokens of `text`."""
        if not self._tokenizer.is_fast:
            return Unplaced(self._tokenizer, text)
        return self.placed(
            self._tokenizer(
                text, add_special_tokens=False, return_offsets_mapping=True, verbose=False
            )
        )

    def placed(self, encoded: Any) -> Placed:
        """The tokens of a fast tokenizer's `input_ids` and `offset_mapping`."""
        ids = np.array(encoded["input_ids"], dtype=np.int64)
        offsets = np.array(encoded["offset_mapping"], dtype=np.int64).reshape(-1, 2)
        starts, ends = offsets[:, 0], offsets[:, 1]
        if self._trims:
            before = np.concatenate([[0], np.maximum.accumulate(ends)[:-1]]) if len(ids) else ends
            starts = np.minimum(starts, before)
        return Placed(ids, starts, ends, np.isin(ids, self._mark_ids) & (ends > starts))


class Placed:
    """Tokens with the characters they were made of."""

    def __init__(
        self,
        ids: NDArray[np.int64],
        starts: NDArray[np.int64],
        ends: NDArray[np.int64],
        is_mark: NDArray[np.bool_],
    ):
        self.ids, self.starts, self.ends, self._is_mark = ids, starts, ends, is_mark

    @property
    def marks(self) -> list[Span]:
        """Characters of the added and special tokens in the text, in order."""
        chosen = self._is_mark
        return list(zip(self.starts[chosen].tolist(), self.ends[chosen].tolist(), strict=True))

    def inside(self, start: int, end: int) -> NDArray[np.bool_]:
        """bool [T]: which tokens begin in the characters [start, end)."""
        found: NDArray[np.bool_] = (self.starts >= start) & (self.starts < end)
        return found

    def straddling(self, boundaries: Sequence[int]) -> int:
        """Tokens with a boundary inside them."""
        return sum(int(((self.starts < b) & (self.ends > b)).any()) for b in boundaries)


class Unplaced:
    """Tokens of a tokenizer that gives no offsets."""

    def __init__(self, tokenizer: Tokenizer, text: str):
        self._tokenizer, self._text = tokenizer, text
        self.ids: NDArray[np.int64] = self._encode(text)

    def _encode(self, text: str) -> NDArray[np.int64]:
        encoded = self._tokenizer(text, add_special_tokens=False, verbose=False)
        return np.array(encoded["input_ids"], dtype=np.int64)

    @cached_property
    def marks(self) -> list[Span]:
        """Characters of the added and special tokens in the text: it is split at them first."""
        added = self._tokenizer.added_tokens_decoder.values()
        names = sorted({str(token) for token in added}, key=len, reverse=True)
        if not names:
            return []
        return [found.span() for found in re.finditer("|".join(map(re.escape, names)), self._text)]

    def inside(self, start: int, end: int) -> NDArray[np.bool_]:
        """bool [T]: which tokens begin in the characters [start, end).

        Raises:
            RowError: a boundary is not one between tokens.
        """
        chosen = np.zeros(len(self.ids), dtype=np.bool_)
        chosen[self._before(start) : self._before(end)] = True
        return chosen

    def _before(self, boundary: int) -> int:
        """Tokens before the boundary."""
        if boundary == len(self._text):
            return len(self.ids)
        prefix = self._encode(self._text[:boundary])
        if not np.array_equal(prefix, self.ids[: len(prefix)]):
            raise RowError(
                "a boundary inside a token",
                f"the tokens of the text before {self._text[boundary : boundary + 20]!r} are not "
                "the first tokens of the whole text, so what is trained cannot be found: the "
                f"slow tokenizer {type(self._tokenizer).__name__} gives no character offsets",
                hint="use a base model with a tokenizer.json",
            )
        return len(prefix)

    def straddling(self, boundaries: Sequence[int]) -> int:
        """None: `inside` refuses them."""
        return 0


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
