"""Gives memory that was freed back to the system.

While a base is quantized, large temporaries and small packed weights are allocated in turn. glibc
keeps what is freed between them, and the process grows to twice the quantized model. Trimming
returns whole pages from the middle of the heap too. Elsewhere than on glibc it does nothing.
"""

from __future__ import annotations

import ctypes
from functools import cache
from typing import Any


@cache
def _trim() -> Any:
    try:
        return ctypes.CDLL(None).malloc_trim
    except (AttributeError, OSError, TypeError):
        return None


def give_back_freed() -> None:
    """Returns unused pages of the heap to the system; a few milliseconds."""
    trim = _trim()
    if trim is not None:
        trim(0)
