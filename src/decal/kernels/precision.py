"""The dtype in which reference implementations compute, and how much of it exists at one time."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

_CPU_CHUNK = 1 << 18
"""Values of float32 temporaries on a CPU, so that they stay in the L2 cache."""
_DEVICE_CHUNK = 1 << 26


def wide(x: Tensor) -> Tensor:
    """float32, or float64 where x is."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def chunks(x: Tensor) -> Iterator[slice]:
    """The rows of x [T, F], some at a time: their float32 copies cost little then."""
    size = _CPU_CHUNK if x.device.type == "cpu" else _DEVICE_CHUNK
    step = max(1, size // max(1, x.shape[1]))
    for start in range(0, x.shape[0], step):
        yield slice(start, start + step)
