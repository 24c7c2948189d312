"""The dtype in which reference implementations compute, and how much of it exists at one time."""

from __future__ import annotations

import platform
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

_CPU_CHUNK = 1 << 18
"""Values of float32 temporaries on a CPU, so that they stay in the L2 cache."""
_DEVICE_CHUNK = 1 << 26


def wide(x: Tensor) -> Tensor:
    """float32, or float64 where x is."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def scaled(B: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
    """scale * B in `dtype`, computed in the wider dtype of the two and rounded once."""
    return (B.to(torch.promote_types(B.dtype, dtype)) * scale).to(dtype)


def chunks(x: Tensor) -> Iterator[slice]:
    """The rows of x [T, F], some at a time: their float32 copies cost little then."""
    size = _CPU_CHUNK if x.device.type == "cpu" else _DEVICE_CHUNK
    step = max(1, size // max(1, x.shape[1]))
    for start in range(0, x.shape[0], step):
        yield slice(start, start + step)


def multiplies_bf16() -> bool:
    """Whether torch's products of bf16 matrices on this CPU are those of the processor."""
    return _MULTIPLIES


def _asked() -> bool:
    """On x86-64 AVX-512 BF16 or AMX has them. Elsewhere torch's word on oneDNN is taken."""
    if platform.machine() not in ("x86_64", "AMD64"):
        return _says(torch.ops.mkldnn, "_is_mkldnn_bf16_supported")
    names = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(_says(torch.cpu, name) for name in names)


def _says(module: Any, name: str) -> bool:
    """What a question of torch's own answers; no where this version has it not."""
    try:
        return bool(getattr(module, name)())
    except (AttributeError, RuntimeError):
        return False


_MULTIPLIES = _asked()
