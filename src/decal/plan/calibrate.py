"""How fast this machine multiplies with a stored weight: two seconds of decal's own products.

A rate is operations per second of forward and the gradient of the input together, with the kernels
that a training would run, on one weight of the model's size in each of its formats. Formats are
measured in turns, and the median of the turns counts: the machine's own speed drifts.

Knows ops and formats; no model, and nothing of what a step does beside products.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping

import torch

from decal.kernels import ops
from decal.kernels.stored import Stored
from decal.quant import quant_format
from decal.quant.base import Recipe

SECONDS = 2.0
ROWS = 512
LARGEST = 1 << 22
"""Numbers of the weight; larger ones run at the same rate and take longer to make."""


def rates(
    formats: Mapping[str, Recipe | None],
    shape: tuple[int, int],
    dtype: torch.dtype = torch.bfloat16,
    seconds: float = SECONDS,
) -> dict[str, float]:
    """Operations per second by name.

    Args:
        formats: what to measure; None is a weight that is not quantized.
        shape: [out, in] of a typical weight; cut down to `LARGEST` numbers.
        seconds: for all of them together.
    """
    out, columns = shape
    out = max(64, min(out, LARGEST // columns) // 64 * 64)
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(out, columns, generator=generator).mul_(0.02).to(dtype)
    held = {name: _held(weight, recipe) for name, recipe in formats.items()}
    x = torch.randn(ROWS, columns, generator=generator).to(dtype)
    grad = torch.randn(ROWS, out, generator=generator).to(dtype)
    work = 4.0 * ROWS * out * columns
    found: dict[str, list[float]] = {name: [] for name in held}
    for stored in held.values():  # the first call makes tables and wakes threads
        _turn(x, grad, stored)
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or not all(found.values()):
        for name, stored in held.items():
            found[name].append(work / _turn(x, grad, stored))
    return {name: statistics.median(values) for name, values in found.items()}


def _held(weight: torch.Tensor, recipe: Recipe | None) -> Stored:
    if recipe is None:
        return Stored("dense", (weight.shape[0], weight.shape[1]), weight)
    fmt = quant_format(recipe.format)
    return fmt.stored(fmt.quantize(weight, recipe))


def _turn(x: torch.Tensor, grad: torch.Tensor, stored: Stored) -> float:
    begun = time.perf_counter()
    ops.project(x, stored)
    ops.project_back([(grad, stored)])
    return time.perf_counter() - begun
