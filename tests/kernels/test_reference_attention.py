"""Flat attention against a loop over sequences, heads and rows in float64."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from decal.kernels import ops, reference_attention

LENGTHS = {"mixed": [5, 1, 9, 5, 0, 17], "equal": [7, 7, 7], "one": [13], "ones": [1, 1]}
VARIANTS: dict[str, dict[str, object]] = {
    "plain": {},
    "window": {"window": 4},
    "wide window": {"window": 17},
    "softcap": {"softcap": 2.5},
    "sinks": {"sinks": True},
    "all": {"window": 3, "softcap": 1.5, "sinks": True},
}


def written_out(q: Tensor, k: Tensor, v: Tensor, edges: list[int], scale: float, **extra) -> Tensor:
    window, softcap, sinks = (extra.get(key) for key in ("window", "softcap", "sinks"))
    groups = q.shape[1] // k.shape[1]
    rows = []
    for start, stop in pairwise(edges):
        for i in range(start, stop):
            first = start if window is None else max(start, i - window + 1)
            heads = []
            for h in range(q.shape[1]):
                s = scale * k[first : i + 1, h // groups] @ q[i, h]
                s = s if softcap is None else softcap * torch.tanh(s / softcap)
                e = s.exp()
                total = e.sum() if sinks is None else e.sum() + sinks[h].exp()
                heads.append((e[:, None] * v[first : i + 1, h // groups]).sum(0) / total)
            rows.append(torch.stack(heads))
    return torch.stack(rows)


def case(lengths: list[int], variant: dict[str, object]) -> tuple[list[Tensor], list[int], dict]:
    edges = [0, *torch.tensor(lengths).cumsum(0).tolist()]
    T, heads = edges[-1], 6
    q, k, v = (torch.randn(T, h, d) for h, d in ((heads, 8), (2, 8), (2, 5)))
    extra = dict(variant)
    if extra.get("sinks"):
        extra["sinks"] = torch.randn(heads).double().requires_grad_()
    leaves = [x.double().requires_grad_() for x in (q, k, v)]
    return leaves, edges, extra


@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)
def test_equals_the_written_out_softmax(lengths: list[int], variant: dict[str, object]) -> None:
    """Values and gradients to 1e-9 in float64. Fails with sequences that see each other, heads
    grouped in the wrong order, the window off by one, the cap before the scale, a sink outside the
    denominator, or rows put back in the wrong order."""
    leaves, edges, extra = case(lengths, variant)
    inputs = [*leaves, *(x for x in extra.values() if isinstance(x, Tensor))]
    cu = torch.tensor(edges, dtype=torch.int32)
    scale = 0.3
    ours = ops.attention_flat(*leaves, cu, scale, **extra)  # type: ignore[arg-type]
    theirs = written_out(*leaves, edges, scale, **extra)
    assert torch.allclose(ours, theirs, rtol=1e-9, atol=1e-12)
    way = torch.randn_like(ours)
    for a, b in zip(
        torch.autograd.grad(ours, inputs, way),
        torch.autograd.grad(theirs, inputs, way),
        strict=True,
    ):
        assert torch.allclose(a, b, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("scores", [1 << 25, 6 * 17 * 4])
def test_halves_are_the_whole(
    monkeypatch: pytest.MonkeyPatch, lengths: list[int], window: int | None, scores: int
) -> None:
    """Forward and backward apart against autograd, 1e-9 in float64, all queries at once and a few
    at a time. Fails if dk and dv are not summed over heads and pieces, or delta is left out."""
    monkeypatch.setattr(reference_attention, "_SCORES", scores)
    leaves, edges, _ = case(lengths, {})
    cu = torch.tensor(edges)
    whole = written_out(*leaves, edges, 0.3, window=window)
    way = torch.randn_like(whole)
    plain = [x.detach() for x in leaves]
    out, lse = ops.attention_flat_forward(*plain, cu, 0.3, window)
    torch.testing.assert_close(out, whole, rtol=1e-9, atol=1e-12)
    found = ops.attention_flat_backward(way, *plain, out, lse, cu, 0.3, window)
    for a, b in zip(found, torch.autograd.grad(whole, leaves, way), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("name", VARIANTS)
def test_bfloat16_keeps_a_float32_softmax(name: str) -> None:
    """Written out, only the result is rounded, by at most 2^-8 of it. torch's fused attention also
    rounds shares: as much again of the largest value. Fails if scores or shares of the written-out
    softmax are bfloat16."""
    leaves, edges, extra = case(LENGTHS["mixed"], VARIANTS[name])
    leaves = [x.detach().bfloat16() for x in leaves]
    extra = {k: x.detach() if isinstance(x, Tensor) else x for k, x in extra.items()}
    ours = reference_attention.attention_flat(*leaves, torch.tensor(edges), 0.3, **extra)  # type: ignore[arg-type]
    theirs = written_out(*(x.double() for x in leaves), edges, 0.3, **extra)
    assert ours.dtype == torch.bfloat16
    bound = 2**-8 * theirs.abs() + 1e-5
    if name in ("plain", "wide window"):
        bound = bound + 2**-8 * leaves[2].abs().max().double()
    assert bool(((ours.double() - theirs).abs() <= bound).all())


def test_chunks_of_sequences_do_not_show(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if the pieces of a group are put together in another order."""
    leaves, edges, extra = case([7] * 5, VARIANTS["all"])
    cu = torch.tensor(edges)
    whole = ops.attention_flat(*leaves, cu, 1 / math.sqrt(8), **extra)
    monkeypatch.setattr(reference_attention, "_SCORES", 6 * 7 * 7 * 2)
    pieces = ops.attention_flat(*leaves, cu, 1 / math.sqrt(8), **extra)
    assert torch.allclose(whole, pieces, rtol=1e-12)


def test_sequences_must_cover_the_rows() -> None:
    """Fails if the check is dropped: rows past the last edge would be lost or wrong."""
    leaves, _, _ = case([5], {})
    with pytest.raises(ValueError, match="from 0 to 4, q has 5 rows"):
        ops.attention_flat(*leaves, torch.tensor([0, 4]), 1.0)


@pytest.mark.parametrize("variant", [{}, {"softcap": 1.5}, {"sinks": True}], ids=str)
def test_masked_is_flat_where_the_mask_is_causal(variant: dict[str, object]) -> None:
    """1e-9 in float64. Fails with the mask on the wrong axis, or the cap after the mask."""
    leaves, edges, extra = case([9], variant)
    q, k, v = (x.transpose(0, 1)[None] for x in leaves)
    visible = torch.ones(1, 1, 9, 9, dtype=torch.bool).tril()
    masked = ops.attention_masked(q, k, v, visible, 0.3, **extra)  # type: ignore[arg-type]
    flat = ops.attention_flat(*leaves, torch.tensor(edges), 0.3, **extra)  # type: ignore[arg-type]
    torch.testing.assert_close(masked[0].transpose(0, 1), flat, rtol=1e-9, atol=1e-12)


def test_masked_rows_that_see_nothing_are_finite() -> None:
    """Padding on the left. Fails with scores of minus infinity, whose softmax is no number."""
    q, k, v = torch.randn(1, 2, 3, 4), torch.randn(1, 1, 3, 4), torch.randn(1, 1, 3, 4)
    visible = torch.ones(1, 1, 3, 3, dtype=torch.bool).tril()
    visible[..., 0] = False
    assert ops.attention_masked(q, k, v, visible, 0.5, softcap=2.0).isfinite().all()
