"""The ops by name: their schemas, and which implementation runs.

Knows no modules and no models. Callers use the functions below and never a backend file. A faster
backend is one more entry in `BACKENDS`, before `torch`. `reference.py` is the specification: its
docstrings say shapes, dtypes and formulas, and every backend agrees with it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from decal.kernels import reference


class Choice(NamedTuple):
    """Which backend runs an op, and why."""

    backend: str
    reason: str


BACKENDS: dict[str, dict[str, Callable[..., Any]]] = {
    "quantize_4bit": {"torch": reference.quantize_4bit},
    "dequantize_4bit": {"torch": reference.dequantize_4bit},
    "dynamic_map": {"torch": reference.dynamic_map},
    "quantize_8bit": {"torch": reference.quantize_8bit},
    "dequantize_8bit": {"torch": reference.dequantize_8bit},
}
"""Implementations of each op by backend, the preferred one first."""


def _run(op: str) -> Callable[..., Any]:
    return next(iter(BACKENDS[op].values()))


def explain() -> dict[str, Choice]:
    """For every op the backend that runs it and the reason."""
    choices = {}
    for op, backends in BACKENDS.items():
        first, *others = backends
        reason = f"preferred to {', '.join(others)}" if others else "the only implementation"
        choices[op] = Choice(first, reason)
    return choices


def quantize_4bit(x: Tensor, code: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    """x [n], code float32 [16] -> uint8 [(n + 1) // 2, 1], float32 absmax [blocks]."""
    return _run("quantize_4bit")(x, code, block_size)


def dequantize_4bit(
    packed: Tensor, absmax: Tensor, code: Tensor, block_size: int, n: int, dtype: torch.dtype
) -> Tensor:
    """Packed codes and float32 scales -> [n] in `dtype`, one float32 product rounded once."""
    return _run("dequantize_4bit")(packed, absmax, code, block_size, n, dtype)


def dynamic_map(device: torch.device | str = "cpu") -> Tensor:
    """float32 [256], ascending: the signed dynamic 8-bit code."""
    return _run("dynamic_map")(device)


def quantize_8bit(x: Tensor, code: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    """x [n], code float32 [256] ascending -> uint8 [n], float32 absmax [blocks]."""
    return _run("quantize_8bit")(x, code, block_size)


def dequantize_8bit(index: Tensor, absmax: Tensor, code: Tensor, block_size: int) -> Tensor:
    """uint8 [n] and float32 scales -> float32 [n]."""
    return _run("dequantize_8bit")(index, absmax, code, block_size)
