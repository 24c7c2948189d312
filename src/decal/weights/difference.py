"""How far two sets of weights are apart: low-rank deltas from their factors, stored tensors chunk
by chunk.

The difference of two deltas is itself of low rank,

    s1 B1 A1 - s2 B2 A2 = L R     with L = [s1 B1, -s2 B2],  R = [A1; A2]

and with L = Q1 T1 and R' = Q2 T2 (QR, Q with orthonormal columns) its norm is that of T1 T2', a
matrix of (r1 + r2) squared; the product [out, in] is never formed. The norms of the two deltas are
those of the blocks of T1 and T2. Rejected: Gram matrices, trace(L'L RR'), which are cheaper but
square the numbers, so that of two deltas that agree to half their digits nothing is left.

Norms are Frobenius norms, sums are in float64. A relative difference is divided by the larger of
the two norms, so that it does not depend on the order and is 1 where one of the two is zero.

Knows no models and no folders.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from decal.store.tensorfile import TORCH_DTYPES, TensorEntry, load_tensor

_CHUNK = 1 << 22
"""Elements that are widened to float64 at once."""


class Norms(NamedTuple):
    """Frobenius norms of a, of b and of a - b."""

    a: float
    b: float
    difference: float

    @property
    def relative(self) -> float | None:
        """0 for equal ones, at most 2; None where a value is NaN or infinite."""
        larger = max(self.a, self.b)
        value = self.difference / larger if larger else 0.0
        return value if math.isfinite(value) and math.isfinite(larger) else None


def total(norms: Iterable[Norms]) -> Norms:
    """The norms of all tensors taken as one."""
    found = list(norms)
    a, b, difference = (
        math.sqrt(sum(x * x for x in column)) for column in zip(*found, strict=True)
    )
    return Norms(a, b, difference)


class Factors(NamedTuple):
    """A delta scale * B A."""

    A: Tensor
    """[r, in]"""
    B: Tensor
    """[out, r]"""
    scale: float


def delta_norms(a: Factors, b: Factors) -> Norms:
    """Norms of two deltas [out, in] of any ranks, and of their difference."""
    left = torch.cat([a.scale * a.B.double(), -b.scale * b.B.double()], dim=1)
    right = torch.cat([a.A.double(), b.A.double()], dim=0)
    t1, t2 = (torch.linalg.qr(m, mode="r").R for m in (left, right.T))
    r = a.A.shape[0]
    return Norms(
        float((t1[:, :r] @ t2[:, :r].T).norm()),
        float((t1[:, r:] @ t2[:, r:].T).norm()),
        float((t1 @ t2.T).norm()),
    )


def tensor_norms(a: Tensor, b: Tensor) -> Norms:
    """Norms of two tensors of one shape, widened a chunk at a time."""
    sums = torch.zeros(3, dtype=torch.float64)
    for x, y in zip(a.flatten().split(_CHUNK), b.flatten().split(_CHUNK), strict=True):
        x, y = x.double(), y.double()
        sums += torch.stack([x.square().sum(), y.square().sum(), (x - y).square().sum()])
    return Norms(*sums.sqrt().tolist())


def stored_norms(a: TensorEntry, b: TensorEntry) -> Norms | None:
    """Norms of two stored tensors of one shape; None where they do not hold floating numbers.

    Codes of quantized weights are integers, and the distance of two codes says nothing.

    Raises:
        OSError: a file is no longer what its header was.
    """
    dtypes = [TORCH_DTYPES.get(entry.spec.dtype) for entry in (a, b)]
    if any(dtype is None or not dtype.is_floating_point for dtype in dtypes):
        return None
    return tensor_norms(load_tensor(a), load_tensor(b))
