"""Attention by blocks of queries, against the written-out softmax in float64.

Tolerances relative to the norm: float32 1e-5; bf16 6e-3, a rounding of each factor.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from decal.kernels import fused_attention, reference_attention

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 6e-3}
SCALE = 0.3


def inputs(dtype: torch.dtype, lengths: list[int], heads: int, shared: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(sum(lengths))
    widths = [(heads, 24), (shared, 24), (shared, 20), (heads, 20)]
    shapes = [(sum(lengths), n, width) for n, width in widths]
    return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("lengths", [[1], [17, 0, 2, 75], [64, 64]], ids=str)
@pytest.mark.parametrize(("heads", "shared"), [(3, 3), (6, 2)])
@pytest.mark.parametrize("window", [None, 11, 40])
@pytest.mark.parametrize("rounds", [True, False])
def test_both_ways_agree_with_the_reference(
    monkeypatch: pytest.MonkeyPatch,
    dtype: torch.dtype,
    lengths: list[int],
    heads: int,
    shared: int,
    window: int | None,
    rounds: bool,
) -> None:
    """Whether P and dS are rounded or not. Fails when the gradients of shared keys or of blocks are
    not added up, when the scale is dropped, or when a block starts at the wrong key of its
    window."""
    monkeypatch.setattr(fused_attention, "_SCORES", 1)
    monkeypatch.setattr(fused_attention, "multiplies_bf16", lambda: rounds)
    q, k, v, grad = inputs(dtype, lengths, heads, shared)
    edges = torch.tensor([0, *lengths]).cumsum(0)
    out, lse = fused_attention.attention_flat_forward(q, k, v, edges, SCALE, window)
    wide = [x.double() for x in (q, k, v)]
    exact, logs = reference_attention.attention_flat_forward(*wide, edges, SCALE, window)
    found = fused_attention.attention_flat_backward(grad, q, k, v, out, lse, edges, SCALE, window)
    wanted = reference_attention.attention_flat_backward(
        grad.double(), *wide, exact, logs, edges, SCALE, window
    )
    for a, b in zip((out, lse, *found), (exact, logs, *wanted), strict=True):
        assert a.shape == b.shape
        # One token alone moves no score, so dq and dk are noise around zero.
        assert float((a - b).norm()) <= TOLERANCE[dtype] * max(float(b.norm()), 1.0)


def test_what_it_does_not_take_is_left_to_the_reference() -> None:
    """Fails when float64 is computed in float32."""
    q, k, v, _ = inputs(torch.float32, [9], 2, 2)
    edges = torch.tensor([0, 9])
    take = fused_attention.attention_flat_forward
    assert take(q, k, v, edges, SCALE) is not NotImplemented
    assert take(q.double(), k.double(), v.double(), edges, SCALE) is NotImplemented
    assert take(q, k, v, torch.tensor([0, 8]), SCALE) is NotImplemented
