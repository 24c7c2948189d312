"""Frozen linear layers with at most one plain low-rank adapter each, computed as one product.

    y_i = x W_i^T + bias_i + z_i B_i^T s_i      z = (keep . x) A^T      A = A_1, A_2, … stacked

A group are the layers that share an input x [T, K]: q, k and v, gate and up, or one alone. Their
A's act at once, their masks are one mask, and backward returns one dx. s_i is the adapter's scaling
times its factor in the pass and 1 / (1 - p); it goes into the small copy of B, and nothing of the
size of x or y is scaled. Backward, with g_i = dL/dy_i:

    dz_i = s_i g_i B_i        dA = dz^T (keep . x)        dB_i = s_i g_i^T z_i
    dx = sum_i g_i W_i + keep . (dz A)

What a pass needs to keep beside x are z [T, R], two words per row for the mask, and the small
copies of A and B in x's dtype.

`forward` and `Backward` are for the inside of autograd functions; `apply` is the one for a single
layer. What a line is made of is decided when forward begins; backward looks at
nothing else. Knows no models and no formats: a weight arrives as `Stored`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from decal.kernels import ops
from decal.kernels.stored import Keep, Stored


class Line(NamedTuple):
    """One layer in one pass; A [r, K], B [N, r] are the float32 masters."""

    weight: Stored
    bias: Tensor | None = None
    A: Tensor | None = None
    B: Tensor | None = None
    scale: float = 0.0


class Group(NamedTuple):
    """Layers of one input, and which of its features reach their adapters."""

    lines: tuple[Line, ...]
    keep: Keep | None = None

    @property
    def factors(self) -> list[Tensor]:
        """A and B of every line that has them, in order: what autograd must know of."""
        return [t for line in self.lines for t in (line.A, line.B) if t is not None]

    @property
    def written(self) -> int:
        """How often the frozen weights were written to; see `Stored.written`."""
        return sum(line.weight.written for line in self.lines)


class Cast(NamedTuple):
    """A group's adapters in the dtype that a pass computes in."""

    A: Tensor
    """[R, K]: the A's, one below the other."""
    B: tuple[Tensor | None, ...]
    """Every line's [N, r], scaled."""


def forward(
    group: Group, x: Tensor, add: Tensor | None = None
) -> tuple[list[Tensor], Tensor | None, Cast | None]:
    """x [T, K] -> every line's y [T, N], plus `add`; z [T, R] and what made it, or None twice."""
    cast = _cast(group, x.dtype)
    z = None if cast is None else ops.into_rank(x, cast.A, group.keep)
    ys = []
    for i, (line, columns) in enumerate(_placed(group)):
        low = None
        if z is not None and cast is not None and (B := cast.B[i]) is not None:
            low = (z[:, columns], B)
        ys.append(ops.project(x, line.weight, line.bias, low, add))
    return ys, z, cast


class Backward:
    """The gradients of a group's inputs, in steps that the caller may put in its own order.

    Args:
        group: as forward had it.
        grads: of every line's y, [T, N]; None where y was not used.
        z, cast: as forward returned them.
        needs: whether x's gradient is wanted, then that of each of `group.factors`.
    """

    def __init__(
        self,
        group: Group,
        grads: Sequence[Tensor | None],
        z: Tensor | None,
        cast: Cast | None,
        needs: Sequence[bool],
    ):
        self.group = group
        self.grads = [None if grad is None else grad.contiguous() for grad in grads]
        self.cast = cast
        self.need_x, *self.need = needs
        self.dz = None
        if z is not None and cast is not None and (self.need_x or any(self.need[::2])):
            self.dz = self._into_rank(z, cast)
        self.dB = self._b_gradients(z)

    def dx(self) -> Tensor | None:
        """[T, K], or None where it is not wanted or nothing came back."""
        pairs = zip(self.grads, self.group.lines, strict=True)
        parts = [(grad, line.weight) for grad, line in pairs if grad is not None]
        if not self.need_x or not parts:
            return None
        low = None
        if self.dz is not None and self.cast is not None:
            low = (self.dz, self.cast.A)
        return ops.project_back(parts, low, self.group.keep)

    def factors(self, x: Tensor) -> list[Tensor | None]:
        """The gradients of `group.factors`, for the x [T, K] that forward had."""
        masters = self.group.factors
        found: list[Tensor | None] = [None] * len(masters)
        found[1::2] = self.dB
        if self.dz is not None and any(self.need[::2]):
            dA = ops.over_rows(self.dz, x, self.group.keep)
            found[::2] = dA.split([A.shape[0] for A in masters[::2]])
        return [
            None if grad is None or not wanted else grad.to(master.dtype)
            for grad, master, wanted in zip(found, masters, self.need, strict=True)
        ]

    def _into_rank(self, z: Tensor, cast: Cast) -> Tensor:
        dz = torch.empty_like(z)
        for (_, columns), B, grad in zip(_placed(self.group), cast.B, self.grads, strict=True):
            if B is not None and grad is not None:
                ops.into_rank(grad, B.t(), out=dz[:, columns])
            else:
                dz[:, columns].zero_()
        return dz

    def _b_gradients(self, z: Tensor | None) -> list[Tensor | None]:
        found: list[Tensor | None] = []
        for (line, columns), grad in zip(_placed(self.group), self.grads, strict=True):
            if z is None or line.B is None:
                continue
            wanted = grad is not None and self.need[2 * len(found) + 1]
            dB = None
            if grad is not None and wanted:
                dB = ops.over_rows(grad, z[:, columns]).mul_(line.scale)
            found.append(dB)
        return found


def _placed(group: Group) -> list[tuple[Line, slice]]:
    """Every line and the columns of z that are its own."""
    placed, at = [], 0
    for line in group.lines:
        rank = 0 if line.A is None else line.A.shape[0]
        placed.append((line, slice(at, at + rank)))
        at += rank
    return placed


def _cast(group: Group, dtype: torch.dtype) -> Cast | None:
    """The adapters in `dtype`; scaled in the wider dtype of the two and rounded once."""
    found = [line.A for line in group.lines if line.A is not None]
    if not found:
        return None
    A = (torch.cat(found) if len(found) > 1 else found[0]).to(dtype)
    return Cast(A, tuple(_scaled(line, dtype) for line in group.lines))


def _scaled(line: Line, dtype: torch.dtype) -> Tensor | None:
    if line.B is None:
        return None
    wide = line.B.to(torch.promote_types(line.B.dtype, dtype))
    return (wide * line.scale).to(dtype)


class _One(torch.autograd.Function):
    """A single layer with an adapter: x [T, K] -> y [T, N]."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group, *factors: Tensor) -> Tensor:  # type: ignore[override]
        (y,), z, ctx.cast = forward(group, x)
        ctx.save_for_backward(x, z, *factors)
        ctx.group, ctx.written = group, group.written
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, z, *_ = ctx.saved_tensors
        check_frozen(ctx)
        needs = (ctx.needs_input_grad[0], *ctx.needs_input_grad[2:])
        back = Backward(ctx.group, [grad], z, ctx.cast, needs)
        return back.dx(), None, *back.factors(x)


def apply(group: Group, x: Tensor) -> Tensor:
    """x [.., K] through a group of one line with an adapter, with gradients -> [.., N]."""
    rows = x.reshape(-1, x.shape[-1])
    y: Tensor
    if torch.is_grad_enabled():
        y = _One.apply(rows, group, *group.factors)
    else:
        (y,), _, _ = forward(group, rows)
    return y.view(*x.shape[:-1], y.shape[-1])  # outside: models may add to it in place


def check_frozen(ctx: Any, *more: Group) -> None:
    """Raises RuntimeError where a frozen weight was written to since forward.

    Weights are held by reference and not through `save_for_backward`, whose hooks would copy them.
    """
    if sum(group.written for group in (ctx.group, *more)) != ctx.written:
        raise RuntimeError("a frozen weight was written to between forward and backward")
