"""`attention_flat_forward` and `_backward` through torch's own fused attention for CPUs.

For where the compiled library is missing: scores are never written out, which the reference does.
Takes bf16 and float32 on a CPU, no window that a sequence exceeds, values as wide as keys; answers
NotImplemented for the rest, and where torch has dropped these operators, which are its own.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

_FORWARD: Any = getattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu", None)
_BACKWARD: Any = getattr(
    torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu_backward", None
)


def _spans(q: Tensor, v: Tensor, cu_seq_lens: Tensor, window: int | None) -> list[slice] | None:
    """The rows of each sequence; None for what these operators do not take."""
    if _FORWARD is None or _BACKWARD is None or q.device.type != "cpu":
        return None
    if q.dtype not in (torch.bfloat16, torch.float32) or q.shape[2] != v.shape[2]:
        return None
    edges = cu_seq_lens.tolist()
    longest = max((b - a for a, b in pairwise(edges)), default=0)
    if edges[0] != 0 or edges[-1] != q.shape[0] or (window is not None and window < longest):
        return None
    return [slice(a, b) for a, b in pairwise(edges) if b > a]


def _grouped(x: Tensor, rows: slice, heads: int) -> Tensor:
    """[1, heads, n, D], keys and values repeated for the query heads that share them."""
    part = x[rows].transpose(0, 1)
    return part.repeat_interleave(heads // part.shape[0], 0)[None]


def attention_flat_forward(
    q: Tensor, k: Tensor, v: Tensor, cu_seq_lens: Tensor, scale: float, window: int | None = None
) -> Any:
    spans = _spans(q, v, cu_seq_lens, window)
    if spans is None:
        return NotImplemented
    heads = q.shape[1]
    out = q.new_empty(q.shape)
    lse = q.new_empty(heads, q.shape[0], dtype=torch.float32)
    for rows in spans:
        parts = [_grouped(x, rows, heads) for x in (q, k, v)]
        found, sums = _FORWARD(*parts, 0.0, True, scale=scale)
        out[rows] = found[0].transpose(0, 1)
        lse[:, rows] = sums.view(heads, -1)
    return out, lse


def attention_flat_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_seq_lens: Tensor,
    scale: float,
    window: int | None = None,
) -> Any:
    spans = _spans(q, v, cu_seq_lens, window)
    if spans is None:
        return NotImplemented
    heads = q.shape[1]
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype) for x in (q, k, v))
    for rows in spans:
        parts = [_grouped(x, rows, heads) for x in (grad, q, k, v, out)]
        sums = lse[None, :, rows]
        found = _BACKWARD(*parts, sums, 0.0, True, scale=scale)
        for whole, part in zip((dq, dk, dv), found, strict=True):
            own = part[0].unflatten(0, (whole.shape[1], -1))
            summed = own[:, 0] if heads == whole.shape[1] else own.sum(1, dtype=torch.float32)
            whole[rows] = summed.transpose(0, 1)
    return dq, dk, dv
