"""The products of `reference_project` in float32, in torch alone, for CPUs that have none of bf16.

There torch multiplies bf16 matrices value by value: 1 to 10 GFLOP/s on a core that reaches 90 in
float32 (AVX2, Zen 3). So rows and weights are widened, a part at a time, multiplied in float32 and
rounded once; a widened part costs 2 to 5 percent of its product. The low-rank update, bias and
addend join before the rounding.

A mask, as 0 and 1 in words as wide as x, is kept until the next one is asked for: backward needs
each twice in a row.

Weights are rounded to bf16 before they are widened: they are the values that every other backend
multiplies by.

Takes bf16 on a CPU where `precision.multiplies_bf16` says no; answers NotImplemented for the rest.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from decal.kernels import native, reference_dropout
from decal.kernels.precision import multiplies_bf16
from decal.kernels.reference_project import stored_weight, wide_scales
from decal.kernels.stored import Keep, Low, Stored

_PART = 1 << 20
"""Widened values of a weight at one time: the last-level cache holds them."""
_ROWS = 1 << 22
"""Widened values of x at one time."""
_SHARED = 6 << 20
"""Words of a mask that are worth keeping for its second use."""


def project(
    x: Tensor,
    weight: Stored,
    bias: Tensor | None = None,
    low: Sequence[Low] = (),
    add: Tensor | None = None,
    out: Tensor | None = None,
) -> Any:
    if not _takes(x):
        return NotImplemented
    out = x.new_empty(x.shape[0], weight.shape[0]) if out is None else out
    for rows in _spans(x.shape[0], _ROWS // x.shape[1]):
        wide = x[rows].float()
        updates = list(_updates(low, rows))
        for columns, matrix in _parts(weight, x.dtype):
            y = wide @ matrix.float().t()
            for own, z, B in updates:
                y[own].addmm_(z, B[columns].t())
            if bias is not None:
                y += bias[columns].to(y.dtype)
            if add is not None:
                y += add[rows, columns]
            out[rows, columns] = y
    return out


def project_back(
    parts: Sequence[tuple[Tensor, Stored]], low: Sequence[Low] = (), keep: Keep | None = None
) -> Any:
    (first, weight), *_ = parts
    if not _takes(first):
        return NotImplemented
    out = first.new_empty(first.shape[0], weight.shape[1])
    for rows in _spans(out.shape[0], _ROWS // out.shape[1]):
        dx = torch.zeros(out[rows].shape)
        for own, dz, A in _updates(low, rows):
            torch.mm(dz, A, out=dx[own])
        if low:
            _drop_(dx, keep, rows)
        for grad, weight in parts:
            for columns, matrix in _parts(weight, grad.dtype):
                dx.addmm_(grad[rows, columns].float(), matrix.float())
        out[rows] = dx
    return out


def into_rank(x: Tensor, A: Tensor, keep: Keep | None = None, out: Tensor | None = None) -> Any:
    if not _takes(x):
        return NotImplemented
    z = x.new_empty(x.shape[0], A.shape[0]) if out is None else out
    right = A.float().t()
    for rows in _spans(x.shape[0], _ROWS // x.shape[1]):
        z[rows] = _drop_(x[rows].float(), keep, rows) @ right
    return z


def over_rows(p: Tensor, q: Tensor, keep: Keep | None = None, scale: float = 1.0) -> Any:
    if not _takes(p):
        return NotImplemented
    total = torch.zeros(p.shape[1], q.shape[1])
    for rows in _spans(p.shape[0], _ROWS // max(p.shape[1], q.shape[1])):
        total.addmm_(p[rows].float().t(), _drop_(q[rows].float(), keep, rows))
    return total.mul_(scale)


def _takes(x: Tensor) -> bool:
    if x.dtype != torch.bfloat16 or not x.is_cpu or multiplies_bf16():
        return False
    return not native.recorded()  # a recording would hold this many rows for ever


def _spans(count: int, step: int) -> Iterator[slice]:
    step = max(1, step)
    for start in range(0, count, step):
        yield slice(start, min(start + step, count))


def _updates(low: Sequence[Low], rows: slice) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """What of the update falls on these rows: which of them, and its factors in float32."""
    for part in low:
        start, stop = max(part.start, rows.start), min(part.rows.stop, rows.stop)
        if start < stop:
            own = slice(start - rows.start, stop - rows.start)
            yield own, part.z[start - part.start : stop - part.start].float(), part.factor.float()


def _parts(weight: Stored, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
    """Some rows of the weight after the other, and their values in `dtype`."""
    (N, K), size = weight.shape, weight.block_size
    step = max(1, _PART // K)
    if weight.format == "code4":
        step = max(size, step // size * size)  # so that parts begin with a block, and a byte
        weight = weight._replace(scales=wide_scales(weight), nested=None)
    for rows in _spans(N, step):
        yield rows, stored_weight(_part(weight, rows), dtype)


def _part(weight: Stored, rows: slice) -> Stored:
    """These rows of the weight; of packed ones the first begins with a block."""
    shape = (rows.stop - rows.start, weight.shape[1])
    scales = weight.scales
    if weight.format != "code4":
        scales = None if scales is None else scales[rows]
        return weight._replace(shape=shape, data=weight.data[rows], scales=scales)
    assert scales is not None
    first, last = rows.start * shape[1], rows.stop * shape[1]
    data = weight.data.view(-1)[first // 2 : (last + 1) // 2]
    scales = scales[first // weight.block_size : -(-last // weight.block_size)]
    return weight._replace(shape=shape, data=data, scales=scales)


class _Mask:
    """The mask that was asked for last, for as long as what it is made of exists."""

    def __init__(self) -> None:
        self._held: tuple[weakref.ref[Tensor], Tensor] | None = None

    def words(self, keep: Keep, rows: slice) -> Tensor:
        """int32 [n, F], 0 and 1."""
        shape = (keep.offset.shape[0], keep.column.shape[0])
        if shape[0] * shape[1] > _SHARED:
            return _words(
                keep, rows, torch.empty(rows.stop - rows.start, shape[1], dtype=torch.int32)
            )
        held = self._held
        if held is None or held[0]() is not keep.offset or held[1].shape != shape:
            self._held = held = None  # before there are two
            found = _words(keep, slice(0, shape[0]), torch.empty(shape, dtype=torch.int32))
            self._held = held = (weakref.ref(keep.offset, self._forget), found)
        return held[1][rows]

    def _forget(self, of: weakref.ref[Tensor]) -> None:
        held = self._held
        if held is not None and held[0] is of:
            self._held = None


_MASK = _Mask()


def _words(keep: Keep, rows: slice, out: Tensor) -> Tensor:
    for part in _spans(out.shape[0], reference_dropout.rows_at_once(out.shape[1], out.device)):
        own = keep.rows(rows.start + part.start, rows.start + part.stop)
        reference_dropout.kept(*own, out=out[part])
    return out


def _drop_(x: Tensor, keep: Keep | None, rows: slice) -> Tensor:
    """x float32 [n, F] with zeros where it is dropped, in place: exact for infinities, too."""
    if keep is not None:
        x.view(torch.int32).mul_(_MASK.words(keep, rows))
    return x
