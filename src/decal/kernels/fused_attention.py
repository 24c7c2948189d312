"""`attention_flat_forward` and `_backward` by blocks of queries, in torch alone, on a CPU.

For where the compiled library is missing. The reference writes out all scores of a sequence, and
torch's own fused attention for CPUs (`scaled_dot_product_attention`) takes two to three times as
long as what stands here, since its products run on small tiles. Here a block of queries meets all
keys that it may see, heads that share keys lie below each other, and every step is one large
product or one pass over [shared heads, heads per key * block, keys]. Keys after the block are
skipped, and keys before its window.

    S = scale q k^T    P = exp(S - lse)    o = P v
    dv = P^T g    dS = P * (g v^T - g . o)    dq = scale dS k    dk = scale dS^T q

Scores and softmax are float32, in powers of two, since torch's exp2 takes a quarter of the time of
its exp, and a tenth where scores are hidden. P and dS are rounded to bf16 for the products that sum
them, where the processor multiplies bf16, and nothing else is. g . o is taken from P and g v^T, and
not from the rounded o: where a query sees one key above all, g v^T and g . o cancel.

Takes bf16 and float32 on a CPU; answers NotImplemented for the rest.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from decal.kernels.precision import multiplies_bf16

_SCORES = 1 << 18
"""Scores that exist at one time, where a block of queries is not too small for that."""
_LEAST_QUERIES = 32
_MOST_QUERIES = 128
_LOG2_E = math.log2(math.e)


class _Block(NamedTuple):
    """Queries [start, stop) of a sequence, and the keys [first, stop) that they see."""

    start: int
    stop: int
    first: int


def _takes(q: Tensor, cu_seq_lens: Tensor) -> list[slice] | None:
    """The rows of each sequence; None for what the reference is left."""
    if q.device.type != "cpu" or q.dtype not in (torch.bfloat16, torch.float32):
        return None
    edges = cu_seq_lens.tolist()
    if edges[0] != 0 or edges[-1] != q.shape[0]:
        return None
    return [slice(a, b) for a, b in pairwise(edges) if b > a]


def _summed_in(dtype: torch.dtype) -> torch.dtype:
    """The dtype of the products that P and dS are factors of."""
    return dtype if multiplies_bf16() else torch.float32


def _blocks(length: int, heads: int, window: int | None) -> Iterator[_Block]:
    keys = length if window is None else min(length, window)
    size = min(_MOST_QUERIES, max(_LEAST_QUERIES, _SCORES // (heads * keys) // 32 * 32))
    for start in range(0, length, size):
        first = 0 if window is None else max(0, start - window + 1)
        yield _Block(start, min(start + size, length), first)


def _hidden(block: _Block, window: int | None) -> Tensor:
    """float32 [queries, keys]: -inf where a query must not see a key, else 0."""
    query = torch.arange(block.start, block.stop)[:, None]
    key = torch.arange(block.first, block.stop)
    hidden = key > query
    if window is not None:
        hidden |= key <= query - window
    return torch.zeros(hidden.shape).masked_fill_(hidden, -torch.inf)


def _by_keys(x: Tensor, shared: int) -> Tensor:
    """[n, H, D] -> a view [shared, H / shared, n, D]: the heads of each key head together."""
    return x.unflatten(1, (shared, -1)).permute(1, 2, 0, 3)


def _scores(q: Tensor, k: Tensor, block: _Block, window: int | None) -> Tensor:
    """float32 [shared, heads * queries, keys], in powers of 2, as q [shared, heads, .., D] is."""
    shared, heads, queries, _ = q.shape
    keys = k[:, block.first : block.stop].transpose(1, 2)
    scores = torch.bmm(q.reshape(shared, heads * queries, -1), keys)
    scores.view(shared, heads, queries, -1).add_(_hidden(block, window))
    return scores


def attention_flat_forward(
    q: Tensor, k: Tensor, v: Tensor, cu_seq_lens: Tensor, scale: float, window: int | None = None
) -> Any:
    spans = _takes(q, cu_seq_lens)
    if spans is None:
        return NotImplemented
    shared, dtype = k.shape[1], _summed_in(v.dtype)
    out = q.new_empty(*q.shape[:2], v.shape[2])
    lse = q.new_empty(q.shape[1], q.shape[0], dtype=torch.float32)
    for rows in spans:
        queries = _by_keys(q[rows], shared).to(torch.float32, copy=True).mul_(scale * _LOG2_E)
        keys = k[rows].transpose(0, 1).float()
        values = v[rows].transpose(0, 1).to(dtype).contiguous()
        found, sums = _by_keys(out[rows], shared), lse[:, rows].unflatten(0, (shared, -1))
        for block in _blocks(keys.shape[1], q.shape[1], window):
            own = slice(block.start, block.stop)
            share = _scores(queries[:, :, own], keys, block, window)
            most = share.amax(2, keepdim=True)
            share.sub_(most).exp2_()
            total = share.sum(2, keepdim=True)
            part = torch.bmm(share.div_(total).to(dtype), values[:, block.first : block.stop])
            shape = found[:, :, own].shape
            found[:, :, own] = part.view(shape)
            sums[:, :, own] = most.add_(total.log2_()).div_(_LOG2_E).view(shape[:-1])
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
    spans = _takes(q, cu_seq_lens)
    if spans is None:
        return NotImplemented
    shared, dtype = k.shape[1], _summed_in(q.dtype)
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype) for x in (q, k, v))
    for rows in spans:
        queries, grads = (_by_keys(x[rows], shared) for x in (q, grad))
        scaled = queries.to(torch.float32, copy=True).mul_(scale * _LOG2_E)
        sums = lse[:, rows].unflatten(0, (shared, -1)) * _LOG2_E
        keys = k[rows].transpose(0, 1).to(dtype).contiguous()
        wide, values = keys.float(), v[rows].transpose(0, 1).float()
        d_keys, d_values = torch.zeros_like(wide), torch.zeros_like(values)
        found = _by_keys(dq[rows], shared)
        for block in _blocks(keys.shape[1], q.shape[1], window):
            own, seen = slice(block.start, block.stop), slice(block.first, block.stop)
            share = _scores(scaled[:, :, own], wide, block, window)
            count = share.shape[1]
            share.sub_(sums[:, :, own].reshape(shared, count, 1)).exp2_()
            g = grads[:, :, own].reshape(shared, count, -1).to(dtype)
            d_values[:, seen] += torch.bmm(share.to(dtype).transpose(1, 2), g)
            d_share = torch.bmm(g.float() * scale, values[:, seen].transpose(1, 2))
            d_scores = torch._softmax_backward_data(d_share, share, 2, share.dtype).to(dtype)
            found[:, :, own] = torch.bmm(d_scores, keys[:, seen]).view_as(found[:, :, own])
            turned = queries[:, :, own].reshape(shared, count, -1).to(dtype)
            d_keys[:, seen] += torch.bmm(d_scores.transpose(1, 2), turned)
        dk[rows], dv[rows] = d_keys.transpose(0, 1), d_values.transpose(0, 1)
    return dq, dk, dv
