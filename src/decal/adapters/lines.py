"""Frozen linear layers with plain low-rank adapters, computed as one product.

    y_i = x W_i^T + bias_i + z_i B_i^T s_i      z = (keep . x) A^T      A = A_1, A_2, … stacked

A group are the layers that share an input x [T, K]: q, k and v, gate and up, or one alone. Their
A's act at once, their masks are one mask, and backward returns one dx. s_i is the adapter's scaling
times its factor in the pass and 1 / (1 - p); it goes into the small copy of B, and nothing of the
size of x or y is scaled. Backward, with g_i = dL/dy_i:

    dz_i = s_i g_i B_i        dA = dz^T (keep . x)        dB_i = s_i g_i^T z_i
    dx = sum_i g_i W_i + keep . (dz A)

The rows of x may be cut into segments with other adapters each, or none: the products with W and
the pass over dx are then still one, those of the ranks are one for each segment. A row's numbers
do not depend on what the other segments hold, so a candidate of a sweep computes what it computes
alone.

What a pass needs to keep beside x are z [T, R], two words per row for the mask, and the small
copies of A and B in x's dtype.

`forward` and `Backward` are for the inside of autograd functions; `apply` is the one for a single
layer. What a segment is made of is decided when forward begins; backward looks at
nothing else. Knows no models and no formats: a weight arrives as `Stored`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from decal.kernels import ops
from decal.kernels.precision import scaled
from decal.kernels.stored import Keep, Low, Stored


class Line(NamedTuple):
    """One frozen layer."""

    weight: Stored
    bias: Tensor | None = None


class Factors(NamedTuple):
    """An adapter on one layer; A [r, K], B [N, r] are the float32 masters."""

    A: Tensor
    B: Tensor
    scale: float


class Segment(NamedTuple):
    """Consecutive rows of the input, and their adapters."""

    start: int
    size: int
    factors: tuple[Factors | None, ...]
    """One for every line of the group."""

    @property
    def rows(self) -> slice:
        """Which they are."""
        return slice(self.start, self.start + self.size)

    @property
    def placed(self) -> list[tuple[Factors, slice] | None]:
        """For every line its adapter, and the columns of z that are its own."""
        placed: list[tuple[Factors, slice] | None] = []
        at = 0
        for factors in self.factors:
            if factors is None:
                placed.append(None)
                continue
            placed.append((factors, slice(at, at + factors.A.shape[0])))
            at += factors.A.shape[0]
        return placed


class Group(NamedTuple):
    """Layers of one input, their adapters by rows, and which features reach these."""

    lines: tuple[Line, ...]
    segments: tuple[Segment, ...] = ()
    """In order; rows of none have no adapter."""
    keep: Keep | None = None

    @property
    def adapters(self) -> list[Factors]:
        """Of all segments and lines, in order."""
        return [factors for s in self.segments for factors in s.factors if factors is not None]

    @property
    def factors(self) -> list[Tensor]:
        """A and B of every adapter, in order: what autograd must know of."""
        return [tensor for factors in self.adapters for tensor in (factors.A, factors.B)]

    @property
    def written(self) -> int:
        """How often the frozen weights were written to; see `Stored.written`."""
        return sum(line.weight.written for line in self.lines)


class Cast(NamedTuple):
    """A segment's adapters in the dtype that a pass computes in."""

    A: Tensor
    """[R, K]: the A's, one below the other."""
    B: tuple[Tensor | None, ...]
    """Every line's [N, r], scaled."""


Casts = tuple[Cast, ...]
"""One for every segment."""


def forward(
    group: Group, x: Tensor, add: Tensor | None = None
) -> tuple[list[Tensor], Tensor | None, Casts]:
    """x [T, K] -> every line's y [T, N], plus `add`; z [T, R] (R the largest), what made it."""
    casts = tuple(_cast(segment, x.dtype) for segment in group.segments)
    z = None
    with ops.together():
        if casts:
            z = x.new_empty(x.shape[0], max(cast.A.shape[0] for cast in casts))
            for segment, cast in zip(group.segments, casts, strict=True):
                own = z[segment.rows, : cast.A.shape[0]]
                ops.into_rank(x[segment.rows], cast.A, _kept(group, segment), out=own)
        ys = [
            ops.project(x, line.weight, line.bias, _lows(group, casts, z, i), add)
            for i, line in enumerate(group.lines)
        ]
    return ys, z, casts


def _lows(group: Group, casts: Casts, z: Tensor | None, line: int) -> list[Low]:
    """What the adapters of a line add to the product with its weight."""
    lows = []
    for segment, cast in zip(group.segments, casts, strict=True):
        placed, B = segment.placed[line], cast.B[line]
        if placed is not None and B is not None and z is not None:
            lows.append(Low(z[segment.rows, placed[1]], B, segment.start))
    return lows


class Backward:
    """The gradients of a group's inputs, in steps that the caller may put in its own order.

    Args:
        group: as forward had it.
        grads: of every line's y, [T, N]; None where y was not used.
        z, casts: as forward returned them.
        needs: whether x's gradient is wanted, then that of each of `group.factors`.
    """

    def __init__(
        self,
        group: Group,
        grads: Sequence[Tensor | None],
        z: Tensor | None,
        casts: Casts,
        needs: Sequence[bool],
    ):
        self.group = group
        self.grads = [None if grad is None else grad.contiguous() for grad in grads]
        self.casts = casts
        self.need_x, *self.need = needs
        self.dz = None
        if z is not None and (self.need_x or any(self.need[::2])):
            self.dz = self._into_rank(z)
        self.dB = [] if z is None else self._b_gradients(z)

    def dx(self) -> Tensor | None:
        """[T, K], or None where it is not wanted or nothing came back."""
        pairs = zip(self.grads, self.group.lines, strict=True)
        parts = [(grad, line.weight) for grad, line in pairs if grad is not None]
        if not self.need_x or not parts:
            return None
        lows = []
        if self.dz is not None:
            for segment, cast in zip(self.group.segments, self.casts, strict=True):
                dz = self.dz[segment.rows, : cast.A.shape[0]]
                lows.append(Low(dz, cast.A, segment.start))
        return ops.project_back(parts, lows, self.group.keep)

    def factors(self, x: Tensor) -> list[Tensor | None]:
        """The gradients of `group.factors`, for the x [T, K] that forward had."""
        masters = self.group.factors
        found: list[Tensor | None] = [None] * len(masters)
        found[1::2] = self.dB
        if self.dz is not None and any(self.need[::2]):
            found[::2] = self._a_gradients(self.dz, x)
        return [
            None if grad is None or not wanted else grad.to(master.dtype)
            for grad, master, wanted in zip(found, masters, self.need, strict=True)
        ]

    def _into_rank(self, z: Tensor) -> Tensor:
        dz = torch.empty_like(z)
        for segment, cast in zip(self.group.segments, self.casts, strict=True):
            for placed, B, grad in zip(segment.placed, cast.B, self.grads, strict=True):
                if placed is None or B is None:
                    continue
                own = dz[segment.rows, placed[1]]
                if grad is None:
                    own.zero_()
                else:
                    ops.into_rank(grad[segment.rows], B.t(), out=own)
        return dz

    def _a_gradients(self, dz: Tensor, x: Tensor) -> list[Tensor]:
        found: list[Tensor] = []
        for segment, cast in zip(self.group.segments, self.casts, strict=True):
            own = dz[segment.rows, : cast.A.shape[0]]
            dA = ops.over_rows(own, x[segment.rows], _kept(self.group, segment))
            found += dA.split([f.A.shape[0] for f in segment.factors if f is not None])
        return found

    def _b_gradients(self, z: Tensor) -> list[Tensor | None]:
        found: list[Tensor | None] = []
        for segment in self.group.segments:
            for placed, grad in zip(segment.placed, self.grads, strict=True):
                if placed is None:
                    continue
                (factors, columns), dB = placed, None
                if grad is not None and self.need[2 * len(found) + 1]:
                    own = z[segment.rows, columns]
                    dB = ops.over_rows(grad[segment.rows], own, scale=factors.scale)
                found.append(dB)
        return found


def _kept(group: Group, segment: Segment) -> Keep | None:
    return group.keep and group.keep.rows(segment.start, segment.start + segment.size)


def _cast(segment: Segment, dtype: torch.dtype) -> Cast:
    """The adapters in `dtype`; scaled in the wider dtype of the two and rounded once."""
    found = [factors.A for factors in segment.factors if factors is not None]
    A = (torch.cat(found) if len(found) > 1 else found[0]).to(dtype)
    return Cast(A, tuple(f and scaled(f.B, f.scale, dtype) for f in segment.factors))


class _One(torch.autograd.Function):
    """A single layer with adapters: x [T, K] -> y [T, N]."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group, *factors: Tensor) -> Tensor:  # type: ignore[override]
        (y,), z, ctx.casts = forward(group, x)
        ctx.save_for_backward(x, z, *factors)
        ctx.group, ctx.written = group, group.written
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, z, *_ = ctx.saved_tensors
        check_frozen(ctx)
        needs = (ctx.needs_input_grad[0], *ctx.needs_input_grad[2:])
        with ops.together():
            back = Backward(ctx.group, [grad], z, ctx.casts, needs)
            dx, found = back.dx(), back.factors(x)
        return dx, None, *found


def apply(group: Group, x: Tensor) -> Tensor:
    """x [.., K] through a group of one line with adapters, with gradients -> [.., N]."""
    rows = x.reshape(-1, x.shape[-1])
    y: Tensor
    if torch.is_grad_enabled():
        y = _One.apply(rows, group, *group.factors)
    else:
        y = _without_gradients(group, rows)
    return y.view(*x.shape[:-1], y.shape[-1])  # outside: models may add to it in place


def _without_gradients(group: Group, x: Tensor) -> Tensor:
    """x [T, K] through a group of one line; nothing is kept for backward."""
    if len(group.segments) == 1 and group.keep is None:
        (segment,), (line,) = group.segments, group.lines
        (factors,) = segment.factors
        if segment.size == x.shape[0] and factors is not None:
            A, B, scale = factors
            return ops.project_adapted(x, *line, A, B, scale)
    (y,), _, _ = forward(group, x)
    return y


def check_frozen(ctx: Any, *more: Group) -> None:
    """Raises RuntimeError where a frozen weight was written to since forward.

    Weights are held by reference and not through `save_for_backward`, whose hooks would copy them.
    """
    if sum(group.written for group in (ctx.group, *more)) != ctx.written:
        raise RuntimeError("a frozen weight was written to between forward and backward")
