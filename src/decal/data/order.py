"""Pseudo-random orders that are the same for ever. Knows neither rows nor steps.

An order is the stable sort of n raw 64-bit words of the Philox counter generator, keyed by
(seed, stream). NumPy promises the raw words of a bit generator across versions and machines;
it does not promise `permutation`, nor does torch promise `randperm`, and a resumed run or a
held-out set that changes with an upgrade would be silently wrong.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

EVAL_STREAM = 2**64 - 1
"""The stream that splits off evaluation rows; epochs use streams 0, 1, 2, …"""

SHUFFLE_STREAM = 2**64 - 2
"""The stream that shuffles rows before they are limited and split."""


def permutation(n: int, seed: int, stream: int) -> NDArray[np.int64]:
    """A permutation of 0 … n-1 as int64 [n], from `seed` and `stream` (an epoch) only."""
    key = np.array([seed % 2**64, stream % 2**64], dtype=np.uint64)
    words = np.random.Philox(key=key).random_raw(n)
    return np.argsort(words, kind="stable").astype(np.int64)
