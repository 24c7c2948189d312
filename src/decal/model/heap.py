"""What glibc does with memory that was freed. Elsewhere than on glibc nothing here does anything.

While a base is quantized, large temporaries and small packed weights are allocated in turn. glibc
keeps what is freed between them, and the process grows to twice the quantized model. Trimming
returns whole pages from the middle of the heap too.

While a model trains it is the other way round: every step allocates what the last one has freed.
glibc gives the top of its heap back to the system at once, which then clears each page again: a
tenth of a step of a small model.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

_TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD = -1, -2, -3
_USUAL = {_TRIM_THRESHOLD: 64 << 20, _TOP_PAD: 1 << 17, _MMAP_THRESHOLD: 32 << 20}
"""glibc's own settings, as they end up in a process that uses large blocks."""
_TRAINING = {_TRIM_THRESHOLD: (1 << 31) - 1, _TOP_PAD: 64 << 20, _MMAP_THRESHOLD: 32 << 20}
"""A larger M_MMAP_THRESHOLD is refused."""


@cache
def _glibc(name: str) -> Any:
    try:
        return getattr(ctypes.CDLL(None), name)
    except (AttributeError, OSError, TypeError):
        return None


def give_back_freed() -> None:
    """Returns unused pages of the heap to the system; a few milliseconds."""
    trim = _glibc("malloc_trim")
    if trim is not None:
        trim(0)


@contextmanager
def keeping_freed() -> Iterator[None]:
    """Inside the block freed memory stays with the process; at the end it goes back."""
    set_to = _glibc("mallopt")
    if set_to is None:
        yield
        return
    for option, value in _TRAINING.items():
        set_to(option, value)
    try:
        yield
    finally:
        for option, value in _USUAL.items():
            set_to(option, value)
        give_back_freed()
