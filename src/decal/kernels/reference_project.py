"""Products with a stored weight and a low-rank update, in plain torch: the specification.

Knows tensors, `Stored` and `Keep`; no module and no adapter. The four products are what one linear
layer with a low-rank adapter computes, with T rows x, a frozen W [N, K], factors A [r, K] and B
[N, r], and 0/1 masks `keep` on the input of A:

    into_rank      z = (keep . x) A^T
    project        y = x W^T + bias + z B^T + add              z B^T of several adapters, by rows
    project_back   dx = sum_i g_i W_i + keep . (dz A)         several layers may share x
    over_rows      dA = dz^T (keep . x),   dB = g^T z         summed in float32

and what the first two are where nothing is dropped and nothing kept for backward,
`project_adapted`. Nothing else is scaled here: callers put the adapter's scaling and the
1 / (1 - p) of dropout into B and dz. All of it is for use inside an autograd function; gradients do
not flow through.

This is also what runs where no compiled kernel does, so it is in place where it can be, and masks
and float32 copies exist for a chunk of rows only.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from decal.kernels.precision import scaled
from decal.kernels.stored import NESTED_BLOCK_SIZE, Keep, Low, Stored, rows_at_once

_LINEAR: Any = (
    getattr(torch.ops.mkldnn, "_linear_pointwise", None)
    if torch.backends.mkldnn.is_available()
    else None
)
"""x W^T by oneDNN. torch.mm has MKL do it, which takes twice as long where the sum is long."""


def stored_weight(weight: Stored, dtype: torch.dtype) -> Tensor:
    """The [N, K] weight in `dtype`, computed in float32 and rounded once; dense ones are cast."""
    from decal.kernels import ops  # the fastest of bit-equal ways to dequantize

    if weight.format == "dense":
        return weight.data.to(dtype)
    assert weight.scales is not None
    if weight.format == "rows8":
        return ops.dequantize_rows(weight.data, weight.scales, dtype)
    scales = wide_scales(weight)
    assert weight.code is not None
    rows, columns = weight.shape
    flat = ops.dequantize_4bit(
        weight.data, scales, weight.code, weight.block_size, rows * columns, dtype
    )
    return flat.view(rows, columns)


def wide_scales(weight: Stored) -> Tensor:
    """float32 [blocks]: the scales of a 4-bit weight."""
    from decal.kernels import ops

    assert weight.scales is not None
    if weight.nested is None:
        return weight.scales
    assert weight.table is not None
    assert weight.offset is not None
    scales = ops.dequantize_8bit(weight.scales, weight.nested, weight.table, NESTED_BLOCK_SIZE)
    return scales.add_(weight.offset)


def project(
    x: Tensor,
    weight: Stored,
    bias: Tensor | None = None,
    low: Sequence[Low] = (),
    add: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """y = x W^T + bias + z B^T + add.

    Args:
        x: [T, K], floating.
        weight: [N, K].
        bias: [N].
        low: for rows of their own each, z [n, r] and B [N, r], scaled.
        add: [T, N] in x's dtype.
        out: [T, N] in x's dtype, whose rows may be strided; not one of the others.

    Returns:
        [T, N] in x's dtype: `out`, or a new one.
    """
    matrix = stored_weight(weight, x.dtype)
    bias = None if bias is None else bias.to(x.dtype)
    if out is not None and bias is None and add is None and not low:
        return torch.mm(x, matrix.t(), out=out)
    if weight.format == "dense":  # in the order of torch's own linear layer, to the bit
        y = torch.nn.functional.linear(x, matrix, bias)
    else:
        y = torch.nn.functional.linear(x, matrix)
        y = y if bias is None else y.add_(bias)
    for part in low:
        y[part.rows].addmm_(_alone(part.z), part.factor.t())
    y = y if add is None else y.add_(add)
    return y if out is None else out.copy_(y)


def _alone(x: Tensor) -> Tensor:
    """x, but a copy where a row of it ends amid other values and torch would look at these.

    oneDNN's products of bf16 with AMX (3.12) read one value more of rows of odd length, and
    multiply it by zero: what lies behind a row must not be NaN.
    """
    odd = x.shape[1] % 2 == 1 and x.stride(0) != x.shape[1]
    return x.contiguous() if odd and x.is_cpu and x.dtype == torch.bfloat16 else x


def project_adapted(
    x: Tensor, weight: Stored, bias: Tensor | None, A: Tensor, B: Tensor, scale: float
) -> Tensor:
    """y = x W^T + bias + z (scale B)^T with z = x A^T.

    Args:
        x: [T, K], floating.
        weight: [N, K].
        bias: [N].
        A, B: [r, K] and [N, r], the masters; scaled in the wider dtype of the two and rounded once.

    Returns:
        A new [T, N] in x's dtype.
    """
    from decal.kernels import ops  # these have backends of their own

    z = ops.into_rank(x, A.to(x.dtype))
    return ops.project(x, weight, bias, [Low(z, scaled(B, scale, x.dtype))])


def project_back(
    parts: Sequence[tuple[Tensor, Stored]], low: Sequence[Low] = (), keep: Keep | None = None
) -> Tensor:
    """dx = sum_i g_i W_i + keep . (dz A).

    Args:
        parts: at least one pair of g_i [T, N_i] and weight [N_i, K].
        low: for rows of their own each, dz [n, R] and A [R, K].
        keep: of T rows and K features; without it everything is kept.

    Returns:
        A new [T, K] in g's dtype.
    """
    (first, weight), *others = [(_alone(grad), weight) for grad, weight in parts]
    dx = first @ stored_weight(weight, first.dtype)
    for grad, weight in others:
        dx.addmm_(grad, stored_weight(weight, grad.dtype))
    for strided, A, begin in low:
        dz = _alone(strided)
        own = dx[begin : begin + dz.shape[0]]
        if keep is None:
            own.addmm_(dz, A)
            continue
        step = rows_at_once(dx.shape[1], dx.device)
        for start in range(0, own.shape[0], step):
            rows = slice(start, start + step)
            own[rows] += keep.dropped(dz[rows] @ A, begin + start)
    return dx


def into_rank(x: Tensor, A: Tensor, keep: Keep | None = None, out: Tensor | None = None) -> Tensor:
    """z = (keep . x) A^T for x [T, K] and A [R, K] of one dtype.

    A may be the transpose of a matrix. Returns `out` [T, R], whose rows may be strided, or a new
    tensor, in that dtype.
    """
    z = x.new_empty(x.shape[0], A.shape[0]) if out is None else out
    if keep is None:
        return torch.mm(x, A.t(), out=z)
    step = rows_at_once(x.shape[1], x.device)
    for start in range(0, x.shape[0], step):
        part = keep.dropped(x[start : start + step], start)
        torch.mm(part, A.t(), out=z[start : start + step])
    return z


def over_rows(p: Tensor, q: Tensor, keep: Keep | None = None, scale: float = 1.0) -> Tensor:
    """scale * p^T (keep . q) for p [T, M] and q [T, N] of one dtype, whose rows may be strided.

    Returns:
        A new [M, N], summed in float32 (float64 for float64). The products that sum over all T rows
        would leave bf16 with a rounded sum.
    """
    wide = torch.promote_types(p.dtype, torch.float32)
    if p.is_cuda:
        q = q if keep is None else keep.dropped(q, 0)
        found = p.t() @ q if p.dtype == wide else torch.mm(p.t(), q, out_dtype=wide)
        return found.mul_(scale)
    if p.dtype == wide and keep is None:
        return (p.t() @ q).mul_(scale)
    total = p.new_zeros(p.shape[1], q.shape[1], dtype=wide)
    step = rows_at_once(max(p.shape[1], q.shape[1]), q.device)
    for start in range(0, p.shape[0], step):
        part, kept = p[start : start + step], q[start : start + step]
        kept = kept if keep is None else keep.dropped(kept, start)
        total += _transposed_product(part.to(wide), kept.to(wide))
    return total.mul_(scale)


def _transposed_product(p: Tensor, q: Tensor) -> Tensor:
    """p^T q of a wide dtype, by oneDNN where torch has it for float32 on a CPU."""
    if p.shape[1] > q.shape[1]:
        return _transposed_product(q, p).t()
    if _LINEAR is None or p.dtype != torch.float32 or p.device.type != "cpu":
        return p.t() @ q
    found: Tensor = _LINEAR(p.t().contiguous(), q.t(), None, "none", [], "")
    return found
