"""Sample: one encoded row, the only thing that passes from chat.py to pack.py and stats.py."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, kw_only=True, eq=False)
class Sample:
    """Tokens of one row and which of them are trained, after truncation."""

    row: int
    """Number of the row: its line in the file, from 1. It is the sample's id everywhere."""
    input_ids: NDArray[np.int32]
    """int32 [T]."""
    trained: NDArray[np.bool_]
    """bool [T]: True where the token itself is to be predicted. Never true for the first token,
    which nothing can predict."""
    truncated: int = 0
    """Tokens cut off on the right."""
    lost: int = 0
    """Trained tokens among those cut off."""
    ended: bool = True
    """Whether the last end-of-turn token is there and trained."""
    straddling: int = 0
    """Tokens that hold both the last characters of a prompt and the first of what is trained.
    They are not trained."""
    label: int | None = None
    """Index of the text's class, for classification; no token is trained then."""

    def __len__(self) -> int:
        return len(self.input_ids)
