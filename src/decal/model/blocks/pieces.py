"""The four autograd functions that a decoder layer of the llama family is made of.

    NormProject   q, k, v = projections of n(x), and x again
    Attend        RoPE and causal attention per sequence; with or without norms of q and k
    ProjectAdd    r + o(a)
    GatedMLP      x + down(silu(gate(n(x))) * up(n(x)))

where n is RMSNorm and every projection is a frozen weight with or without a low-rank adapter
(`adapters/lines.py`). All tensors are [T, features]: the rows of a flattened batch.

Kept for backward, beside ranks, masks' words and one number per row for each norm, are x, q, k, v,
a, x again, gate and up; the normed inputs and silu(gate) * up are computed anew. NormProject
returns x so that the gradient of the residual path comes back into the same backward and is added
in the pass over the norm; autograd would add in a pass of its own.

Rejected: one function for the whole layer. It saves the same tensors and about ten calls, but
nothing smaller than it could be tested, or used by another architecture.

Knows no modules.
"""

# mypy: disable-error-code="override"
# Every Function here gives forward and backward its own parameters.

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from decal.adapters import lines
from decal.adapters.lines import Backward, Group, check_frozen
from decal.kernels import ops

Gradients = tuple[Tensor | None, ...]


class Norm(NamedTuple):
    """RMSNorm with a frozen weight."""

    weight: Tensor
    eps: float


class Attention(NamedTuple):
    """What attention needs to know beside q, k and v."""

    head_dim: int
    scale: float
    cos: Tensor
    """[T, C]"""
    sin: Tensor
    cu_seq_lens: Tensor
    window: int | None = None
    norms: tuple[Norm, Norm] | None = None
    """Of every head of q, and of k."""


class NormProject(Function):
    """x [T, H] -> x itself, and the group's projections of its norm."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, norm: Norm, group: Group, *factors: Tensor) -> Any:
        n, rstd = ops.rms_norm(x, *norm)
        ys, z, ctx.casts = lines.forward(group, n)
        ctx.save_for_backward(x, rstd, z, *factors)
        ctx.norm, ctx.group, ctx.written = norm, group, group.written
        ctx.set_materialize_grads(False)
        return (x, *ys)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, residual: Tensor | None, *grads: Tensor | None) -> Gradients:
        x, rstd, z, *_ = ctx.saved_tensors
        check_frozen(ctx)
        need_x, _, _, *need = ctx.needs_input_grad
        n, _ = ops.rms_norm(x, *ctx.norm)
        with ops.together():
            back = Backward(ctx.group, grads, z, ctx.casts, (need_x, *need))
            found, dn = back.factors(n), back.dx()
        dx = residual
        if dn is not None:
            dx = ops.rms_norm_backward(dn, x, ctx.norm.weight, rstd, residual)
        return dx if need_x else None, None, None, *found


class Attend(Function):
    """q [T, Hq * D], k and v [T, Hk * D] -> [T, Hq * D]."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, how: Attention) -> Tensor:
        heads = [_heads(t, how.head_dim) for t in (q, k, v)]
        turned, rstd = _turned(heads[:2], how)
        (q_turned, k_turned), v_heads = turned, heads[2]
        out, lse = ops.attention_flat_forward(
            q_turned, k_turned, v_heads, how.cu_seq_lens, how.scale, how.window
        )
        kept = heads[:2] if how.norms else turned
        ctx.save_for_backward(*kept, v_heads, out, lse, *rstd)
        ctx.how = how
        return out.view(q.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Gradients:
        q, k, v, out, lse, *rstd = ctx.saved_tensors
        how: Attention = ctx.how
        q_turned, k_turned = _turned([q, k], how)[0] if how.norms else [q, k]
        dq, dk, dv = ops.attention_flat_backward(
            _heads(grad.contiguous(), how.head_dim),
            q_turned,
            k_turned,
            v,
            out,
            lse,
            how.cu_seq_lens,
            how.scale,
            how.window,
        )
        found = [ops.rotate(d, how.cos, how.sin, inverse=True, out=d) for d in (dq, dk)]
        for i, norm in enumerate(how.norms or ()):
            rows, x = (t.reshape(-1, how.head_dim) for t in (found[i], (q, k)[i]))
            found[i] = ops.rms_norm_backward(rows, x, norm.weight, rstd[i])
        shapes = [(t.shape[0], t.shape[1] * t.shape[2]) for t in (q, k, v)]
        dq, dk, dv = (d.reshape(s) for d, s in zip((*found, dv), shapes, strict=True))
        return dq, dk, dv, None


class ProjectAdd(Function):
    """residual [T, H], x [T, K] -> residual + projection of x, for a group of one."""

    @staticmethod
    def forward(ctx: Any, residual: Tensor, x: Tensor, group: Group, *factors: Tensor) -> Tensor:
        (y,), z, ctx.casts = lines.forward(group, x, residual)
        ctx.save_for_backward(x, z, *factors)
        ctx.group, ctx.written = group, group.written
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Gradients:
        x, z, *_ = ctx.saved_tensors
        check_frozen(ctx)
        need_residual, need_x, _, *need = ctx.needs_input_grad
        with ops.together():
            back = Backward(ctx.group, [grad], z, ctx.casts, (need_x, *need))
            dx, found = back.dx(), back.factors(x)
        return grad if need_residual else None, dx, None, *found


class GatedMLP(Function):
    """x [T, H] -> x + down(silu(gate(n(x))) * up(n(x))); `first` is gate and up, `second` down."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, norm: Norm, first: Group, second: Group, *factors: Tensor
    ) -> Tensor:
        n, rstd = ops.rms_norm(x, *norm)
        (gate, up), z, ctx.casts = lines.forward(first, n)
        del n
        (y,), z_down, ctx.casts_down = lines.forward(second, ops.swiglu(gate, up), x)
        ctx.save_for_backward(x, rstd, gate, up, z, z_down, *factors)
        ctx.norm, ctx.group, ctx.second = norm, first, second
        ctx.written = first.written + second.written
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Gradients:
        x, rstd, gate, up, z, z_down, *_ = ctx.saved_tensors
        check_frozen(ctx, ctx.second)
        need_x, _, _, _, *need = ctx.needs_input_grad
        split = len(ctx.group.factors)
        with ops.together():
            down = Backward(ctx.second, [grad], z_down, ctx.casts_down, (True, *need[split:]))
            dh = down.dx()
        assert dh is not None
        d_gate, d_up, h = ops.swiglu_backward(dh, gate, up)
        with ops.together():
            found = down.factors(h)
            back = Backward(ctx.group, [d_gate, d_up], z, ctx.casts, (need_x, *need[:split]))
        del dh, h, down
        n, _ = ops.rms_norm(x, *ctx.norm)
        with ops.together():
            found, dn, dx = back.factors(n) + found, back.dx(), None
        del n
        if dn is not None:
            dx = ops.rms_norm_backward(dn, x, ctx.norm.weight, rstd, grad)
        return dx, None, None, None, *found


def _heads(x: Tensor, head_dim: int) -> Tensor:
    """[T, h * D] -> [T, h, D]"""
    return x.view(x.shape[0], -1, head_dim)


def _turned(heads: Sequence[Tensor], how: Attention) -> tuple[list[Tensor], list[Tensor]]:
    """q and k [T, h, D], normed where they are and turned; and the norms' factors."""
    if how.norms is None:
        return [ops.rotate(t, how.cos, how.sin) for t in heads], []
    turned, rstd = [], []
    for t, norm in zip(heads, how.norms, strict=True):
        n, factor = ops.rms_norm(t.reshape(-1, how.head_dim), *norm)
        n = n.view(t.shape)
        turned.append(ops.rotate(n, how.cos, how.sin, out=n))
        rstd.append(factor)
    return turned, rstd
