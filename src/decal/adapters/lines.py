"""Frozen linear layers with at most one plain low-rank adapter each, computed as one product.

    y_i = x W_i^T + bias_i + z_i B_i^T s_i      z = (keep . x) A^T      A = A_1, A_2, … stacked

A group are the layers that share an input x [T, K]: q, k and v, gate and up, or one alone. Their
A's act at once, their masks are one mask, and backward returns one dx. s_i is the adapter's scaling
times its factor in the pass and 1 / (1 - p); it goes into the small copy of B, and nothing of the
size of x or y is scaled. Backward, with g_i = dL/dy_i:

    dz_i = s_i g_i B_i        dA = dz^T (keep . x)        dB_i = s_i g_i^T z_i
    dx = sum_i g_i W_i + keep . (dz A)

What a pass needs to keep beside x are z [T, R] and two words per row for the mask.

`forward` and `backward` are plain functions for the inside of autograd functions; `apply` is the
one for a single layer. What a line is made of is decided when forward begins; backward looks at
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


def forward(
    group: Group, x: Tensor, add: Tensor | None = None
) -> tuple[list[Tensor], Tensor | None]:
    """x [T, K] -> every line's y [T, N], plus `add`, and z [T, R]; None without adapters."""
    A = _stacked(group, x.dtype)
    z = None if A is None else ops.into_rank(x, A, group.keep)
    ys = []
    for line, columns in _placed(group):
        low = None
        if z is not None and line.B is not None:
            low = (z[:, columns], _scaled(line, x.dtype))
        ys.append(ops.project(x, line.weight, line.bias, low, add))
    return ys, z


def backward(
    group: Group,
    grads: Sequence[Tensor | None],
    x: Tensor,
    z: Tensor | None,
    needs: Sequence[bool],
) -> tuple[Tensor | None, list[Tensor | None]]:
    """The gradients of x and of `group.factors`.

    Args:
        group: as forward had it.
        grads: of every line's y, [T, N]; None where y was not used.
        x: [T, K], as forward had it.
        z: as forward returned it.
        needs: whether x's gradient is wanted, then that of each factor.
    """
    need_x, *need = needs
    whole = z is not None and (need_x or any(need[::2]))
    dz = torch.empty_like(z) if whole else None
    found: list[Tensor | None] = [None] * len(need)
    parts: list[tuple[Tensor, Stored]] = []
    at = 0
    for (line, columns), grad in zip(_placed(group), grads, strict=True):
        if grad is not None:
            grad = grad.contiguous()
            parts.append((grad, line.weight))
        if z is None or line.B is None:
            continue
        if grad is None:
            if dz is not None:
                dz[:, columns] = 0.0
        else:
            if dz is not None:
                dz[:, columns] = ops.into_rank(grad, _scaled(line, x.dtype).t().contiguous())
            if need[at + 1]:
                found[at + 1] = ops.over_rows(grad, z[:, columns]).mul_(line.scale)
        at += 2
    if dz is not None and any(need[::2]):
        found[::2] = ops.over_rows(dz, x, group.keep).split(
            [f.shape[0] for f in group.factors[::2]]
        )
    dx = None
    if need_x and parts:
        A = _stacked(group, x.dtype)
        low = None if dz is None or A is None else (dz, A)
        dx = ops.project_back(parts, low, group.keep)
    return dx, [
        None if grad is None or not wanted else grad.to(factor.dtype)
        for grad, factor, wanted in zip(found, group.factors, need, strict=True)
    ]


def _placed(group: Group) -> list[tuple[Line, slice]]:
    """Every line and the columns of z that are its own."""
    placed, at = [], 0
    for line in group.lines:
        rank = 0 if line.A is None else line.A.shape[0]
        placed.append((line, slice(at, at + rank)))
        at += rank
    return placed


def _stacked(group: Group, dtype: torch.dtype) -> Tensor | None:
    """[R, K] in `dtype`: the A's, one below the other."""
    found = [line.A.to(dtype) for line in group.lines if line.A is not None]
    return torch.cat(found) if len(found) > 1 else found[0] if found else None


def _scaled(line: Line, dtype: torch.dtype) -> Tensor:
    """[N, r] in `dtype`: B times the scaling, in the wider dtype of the two and rounded once."""
    assert line.B is not None
    wide = line.B.to(torch.promote_types(line.B.dtype, dtype))
    return (wide * line.scale).to(dtype)


class _One(torch.autograd.Function):
    """A single layer with an adapter: x [.., K] -> y [.., N]."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group, *factors: Tensor) -> Tensor:  # type: ignore[override]
        (y,), z = forward(group, x.reshape(-1, x.shape[-1]))
        ctx.save_for_backward(x, z, *factors)
        ctx.group, ctx.written = group, group.written
        return y.view(*x.shape[:-1], y.shape[-1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, z, *_ = ctx.saved_tensors
        check_frozen(ctx)
        rows, grads = x.reshape(-1, x.shape[-1]), grad.reshape(-1, grad.shape[-1])
        needs = (ctx.needs_input_grad[0], *ctx.needs_input_grad[2:])
        dx, found = backward(ctx.group, [grads], rows, z, needs)
        return dx if dx is None else dx.view(x.shape), None, *found


def apply(group: Group, x: Tensor) -> Tensor:
    """x [.., K] through a group of one line with an adapter, with gradients -> [.., N]."""
    y: Tensor = _One.apply(x, group, *group.factors)
    return y


def check_frozen(ctx: Any, *more: Group) -> None:
    """Raises RuntimeError where a frozen weight was written to since forward.

    Weights are held by reference and not through `save_for_backward`, whose hooks would copy them.
    """
    if sum(group.written for group in (ctx.group, *more)) != ctx.written:
        raise RuntimeError("a frozen weight was written to between forward and backward")
