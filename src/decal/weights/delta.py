"""One weight plus one low-rank delta, rounded once.

W' = round(W + scale * B A), summed in float32 (float64 for a float64 W) and rounded to the output's
dtype once. On 16-bit weights this is to the bit what peft's merge_and_unload computes with float32
factors: its in-place addition also sums in float32 and rounds once.

B A is computed whole, because cutting it into pieces may change its last bits; everything after it
runs over slices of rows, so that beyond W and D little memory is needed.

Knows no files and no keys.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from decal.adapters.base import LowRank
from decal.errors import VerificationError

__all__ = ["FileDelta", "add_delta", "cast"]

_SLICE = 1 << 22
"""Elements summed at once."""


class FileDelta(NamedTuple):
    """What one tensor of the base's files gains."""

    low_rank: LowRank
    transposed: bool = False
    """The file stores [in, out] (GPT-2's Conv1D, embeddings) instead of [out, in]."""
    module: str = ""
    """The module's path, for messages; the file key where empty."""

    @property
    def shape(self) -> tuple[int, int]:
        """The shape that the tensor in the file must have."""
        out, inner = self.low_rank.B.shape[0], self.low_rank.A.shape[1]
        return (inner, out) if self.transposed else (out, inner)


def add_delta(key: str, weight: Tensor, delta: FileDelta, dtype: torch.dtype) -> Tensor:
    """W' in `dtype` and in the file's orientation.

    `weight` is any floating dtype, in the shape `delta.shape`.

    Raises:
        VerificationError: a sum does not fit into `dtype`.
    """
    wide = torch.promote_types(weight.dtype, torch.float32)
    factors = delta.low_rank
    update = factors.B.detach().cpu().to(wide) @ factors.A.detach().cpu().to(wide)
    if delta.transposed:
        update = update.T
    update = update * factors.scale
    result = torch.empty(weight.shape, dtype=dtype)
    rows = max(1, _SLICE // max(1, weight.shape[1]))
    for start in range(0, weight.shape[0], rows):
        part = slice(start, start + rows)
        result[part] = (weight[part].to(wide) + update[part]).to(dtype)
        _fits(key, result[part])
    return result


def cast(key: str, weight: Tensor, dtype: torch.dtype) -> Tensor:
    """The weight in another dtype. Raises VerificationError if a value does not fit."""
    result = weight.to(dtype)
    _fits(key, result)
    return result


def _fits(key: str, values: Tensor) -> None:
    if not bool(values.isfinite().all()):
        limit = torch.finfo(values.dtype).max
        raise VerificationError(
            f"tensor `{key}` would hold NaN or infinity in {values.dtype} (limit {limit:g})",
            hint="write it with --dtype fp32, or bf16",
        )
