"""Attention in plain torch: the specification of `attention_flat` and `attention_masked`.

`attention_flat_forward` and `attention_flat_backward` are the two halves of `attention_flat` for
those who do without autograd: one sequence after the other, with the softmax written out.

Knows tensors only, no model. `attention_flat` is causal and holds no mask of the whole batch: the
sequences lie one after the other, none sees another. Those of similar length are stacked and
computed together, filled up on the right with their last token: causal attention never looks to
the right, and what the filling computes is dropped, so neither results nor gradients see it. One
call per distinct length, without filling, took 1.4 times as long at chat-like lengths.

    s[i, j] = scale * q[i] . k[j]                      query head h uses key head h // (Hq / Hk)
    s = softcap * tanh(s / softcap)                    where a soft cap is given (Gemma 2)
    visible: 0 <= i - j, and i - j < window            where a window is given (transformers' rule)
    out[i] = sum_j exp(s[i, j]) v[j] / (sum_j exp(s[i, j]) + exp(sink))     sink 0 if none (gpt-oss)

Without window, soft cap or sinks torch's fused attention runs; else the softmax is written out in
float32 (float64 for float64 inputs), a few sequences at a time so that the scores stay bounded. A
window that no sequence of the group exceeds is no window.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

_BUCKET = 16
"""Sequences whose lengths agree after rounding up to this are stacked."""
_SCORES = 1 << 25
"""Most scores held at once by the written-out softmax, one sequence apart."""


def attention_flat(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seq_lens: Tensor,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Attention inside each sequence, differentiable in q, k, v and sinks.

    Args:
        q: [T, Hq, D] floating.
        k: [T, Hk, D], Hk divides Hq.
        v: [T, Hk, Dv].
        cu_seq_lens: int [n + 1], from 0 to T, not descending.
        scale: factor of the scores.
        window: how many positions a token sees, its own included.
        softcap: bound of the scores.
        sinks: [Hq], one more logit per head whose value is zero.

    Returns:
        [T, Hq, Dv] in q's dtype.

    Raises:
        ValueError: cu_seq_lens does not cover T.
    """
    edges = _edges(cu_seq_lens, q.shape[0])
    spans = [(start, stop - start) for start, stop in pairwise(edges) if stop > start]
    if len({length for _, length in spans}) == 1:
        return _stacked(spans[0][1], q, k, v, scale, window, softcap, sinks)
    groups: dict[int, list[tuple[int, int]]] = {}
    for start, length in spans:
        groups.setdefault(-(-length // _BUCKET), []).append((start, length))
    found = torch.empty(q.shape[0], dtype=torch.int64, device=q.device)
    outs, done = [], 0
    for group in groups.values():
        first, length = torch.tensor(group, device=q.device).T[:, :, None]
        longest = max(n for _, n in group)
        column = torch.arange(longest, device=q.device)
        at = first + torch.minimum(column, length - 1)
        a, b, c = (x.index_select(0, at.view(-1)) for x in (q, k, v))
        outs.append(_stacked(longest, a, b, c, scale, window, softcap, sinks))
        real = column < length
        found[at[real]] = done + real.view(-1).nonzero().squeeze(1)
        done += at.numel()
    return torch.cat(outs).index_select(0, found)


def _edges(cu_seq_lens: Tensor, rows: int) -> list[int]:
    edges: list[int] = cu_seq_lens.tolist()
    if edges[0] != 0 or edges[-1] != rows:
        raise ValueError(f"cu_seq_lens runs from {edges[0]} to {edges[-1]}, q has {rows} rows")
    return edges


def attention_flat_forward(
    q: Tensor, k: Tensor, v: Tensor, cu_seq_lens: Tensor, scale: float, window: int | None = None
) -> tuple[Tensor, Tensor]:
    """`attention_flat` without autograd, and what its backward needs.

    Args:
        q, k, v, cu_seq_lens, scale, window: as in `attention_flat`.

    Returns:
        [T, Hq, Dv] in q's dtype, and float32 [Hq, T] (float64 for float64): the logarithm of the
        sum of exp(s[i, j]) over the visible j.

    Raises:
        ValueError: cu_seq_lens does not cover T.
    """
    wide = torch.promote_types(q.dtype, torch.float32)
    out = q.new_empty(q.shape[0], q.shape[1], v.shape[2])
    lse = q.new_empty(q.shape[1], q.shape[0], dtype=wide)
    for queries, keys in _pieces(_edges(cu_seq_lens, q.shape[0]), q.shape[1]):
        scores = _scores(q[queries], k[keys], scale, window)
        total = torch.logsumexp(scores, -1, keepdim=True)
        lse[:, queries] = total.flatten(0, 1).squeeze(-1)
        found = (scores - total).exp() @ v[keys].to(wide).transpose(0, 1)[:, None]
        out[queries] = found.flatten(0, 1).transpose(0, 1).to(q.dtype)
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
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of q, k and v, where grad is that of `out`.

        p = exp(s - lse)                          dv = p^T grad
        ds = p * (grad v^T - rowsum(grad * out))  dq = scale ds k,  dk = scale ds^T q

    dk and dv are sums over the query heads that share a key head.

    Args:
        grad: [T, Hq, Dv].
        q, k, v, cu_seq_lens, scale, window: as given to `attention_flat_forward`.
        out, lse: what it returned.

    Returns:
        Contiguous [T, Hq, D], [T, Hk, D] and [T, Hk, Dv] in q's dtype.

    Raises:
        ValueError: cu_seq_lens does not cover T.
    """
    wide = torch.promote_types(q.dtype, torch.float32)
    group = q.shape[1] // k.shape[1]
    dq, dk, dv = (torch.zeros(x.shape, dtype=wide, device=x.device) for x in (q, k, v))
    for queries, keys in _pieces(_edges(cu_seq_lens, q.shape[0]), q.shape[1]):
        q_, grad_, out_ = (
            x[queries].to(wide).transpose(0, 1).unflatten(0, (-1, group)) for x in (q, grad, out)
        )
        k_, v_ = (x[keys].to(wide).transpose(0, 1)[:, None] for x in (k, v))
        logs = lse[:, queries].unflatten(0, (-1, group))[..., None]
        share = (_scores(q[queries], k[keys], scale, window) - logs).exp()
        change = share * (grad_ @ v_.transpose(-1, -2) - (grad_ * out_).sum(-1, keepdim=True))
        dq[queries] = scale * (change @ k_).flatten(0, 1).transpose(0, 1)
        dk[keys] += scale * (change.transpose(-1, -2) @ q_).sum(1).transpose(0, 1)
        dv[keys] += (share.transpose(-1, -2) @ grad_).sum(1).transpose(0, 1)
    return dq.to(q.dtype), dk.to(q.dtype), dv.to(q.dtype)


def _pieces(edges: list[int], heads: int) -> Iterator[tuple[slice, slice]]:
    """Rows of queries and of the keys before and beside them, few enough at a time."""
    for start, stop in pairwise(edges):
        step = max(1, _SCORES // (heads * max(1, stop - start)))
        for first in range(start, stop, step):
            last = min(first + step, stop)
            yield slice(first, last), slice(start, last)


def _scores(q: Tensor, k: Tensor, scale: float, window: int | None) -> Tensor:
    """[Hk, Hq / Hk, n, m] of the last n of m rows, minus infinity where nothing is seen."""
    wide = torch.promote_types(q.dtype, torch.float32)
    grouped = q.to(wide).transpose(0, 1).unflatten(0, (k.shape[1], -1))
    scores = grouped @ k.to(wide).permute(1, 2, 0)[:, None] * scale
    visible = _window(k.shape[0], window, q.device)[0, 0, -q.shape[0] :]
    return scores.masked_fill(~visible, -torch.inf)


def _stacked(
    length: int,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    window: int | None,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """As `attention_flat` where all sequences have the same length."""
    grouped = k.shape[1] != q.shape[1]
    q, k, v = (x.unflatten(0, (-1, length)).transpose(1, 2) for x in (q, k, v))
    seen = window if window is not None and window < length else None
    if seen is None and softcap is None and sinks is None:
        out = scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=grouped)
    else:
        step = max(1, _SCORES // (q.shape[1] * length * length))
        parts = zip(q.split(step), k.split(step), v.split(step), strict=True)
        visible = _window(length, seen, q.device)
        out = torch.cat(
            [attention_masked(a, b, c, visible, scale, softcap, sinks) for a, b, c in parts]
        )
    return out.transpose(1, 2).flatten(0, 1)


def _window(length: int, window: int | None, device: torch.device) -> Tensor:
    """bool [1, 1, S, S]: what a causal sequence sees."""
    at = torch.arange(length, device=device)
    apart = at[:, None] - at[None, :]
    visible = apart >= 0
    if window is not None:
        visible = visible & (apart < window)
    return visible[None, None]


def attention_masked(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    visible: Tensor,
    scale: float,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Attention with the softmax written out, for what torch's fused attention does not know.

    Args:
        q: [n, Hq, S, D] floating.
        k: [n, Hk, L, D], Hk divides Hq.
        v: [n, Hk, L, Dv].
        visible: bool [n or 1, 1, S, L]. A row that sees nothing, of padding, gets finite values.
        scale, softcap, sinks: as in `attention_flat`.

    Returns:
        [n, Hq, S, Dv] in q's dtype.
    """
    n, heads, length, _ = q.shape
    wide = torch.promote_types(q.dtype, torch.float32)
    groups = heads // k.shape[1]
    q_ = q.to(wide).unflatten(1, (-1, groups))
    scores = q_ @ k.to(wide)[:, :, None].transpose(-1, -2) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~visible[:, :, None], torch.finfo(wide).min)
    if sinks is not None:
        sink = sinks.to(wide).view(1, -1, groups, 1, 1).expand(n, -1, -1, length, 1)
        scores = torch.cat([scores, sink], -1)
    share = torch.softmax(scores, -1)[..., : k.shape[2]]
    return (share @ v.to(wide)[:, :, None]).flatten(1, 2).to(q.dtype)
