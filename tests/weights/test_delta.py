"""The sum of one weight and one delta, and what rounding left of it."""

from __future__ import annotations

import pytest
import torch

from decal.adapters.base import LowRank
from decal.errors import VerificationError
from decal.weights import delta as module
from decal.weights.delta import Effect, FileDelta, add_delta, cast


def _delta(out: int, inner: int, r: int = 3, scale: float = 7 / 3, size: float = 0.1) -> FileDelta:
    return FileDelta(LowRank(size * torch.randn(r, inner), torch.randn(out, r), scale, 0.0))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("transposed", [False, True])
def test_against_float64(dtype: torch.dtype, transposed: bool) -> None:
    """Within half of the last place of the output, plus float32's error of the product (a few
    times 2^-24 of its terms). Fails if the scaling is dropped, if the delta is rounded to 16 bits
    before the sum, or if the transposition is left out."""
    delta = _delta(11, 11)._replace(transposed=transposed)
    weight = torch.randn(11, 11).to(dtype)
    effect = Effect()
    result = add_delta("w", weight, delta, dtype, effect)
    A, B, scale, *_ = delta.low_rank
    update = scale * (B.double() @ A.double())
    exact = weight.double() + (update.T if transposed else update)
    product = 8 * 2**-24 * scale * (B.double().abs() @ A.double().abs())
    product = product.T if transposed else product
    eps = torch.finfo(dtype).eps
    assert result.dtype == dtype
    assert ((result.double() - exact).abs() <= 0.5 * eps * exact.abs() * 1.01 + product).all()
    assert effect.survival == pytest.approx(1, abs=4 * eps + 1e-5)


@pytest.mark.parametrize("rows", [1, 2, 5, 100])
def test_slices_change_nothing(monkeypatch: pytest.MonkeyPatch, rows: int) -> None:
    """Fails if a slice is skipped, or taken from other rows of the delta than of the weight."""
    delta, weight = _delta(13, 7), torch.randn(13, 7).bfloat16()
    whole, effect = Effect(), Effect()
    expected = add_delta("w", weight, delta, torch.bfloat16, whole)
    monkeypatch.setattr(module, "_SLICE", rows * 7)
    assert torch.equal(add_delta("w", weight, delta, torch.bfloat16, effect), expected)
    assert (effect.should_move, effect.stayed) == (whole.should_move, whole.stayed)
    assert effect.kept == pytest.approx(whole.kept, rel=1e-6)


def test_rounding_that_eats_small_deltas_is_counted() -> None:
    """At delta/W of about 0.001 most bf16 weights do not move; float32 holds it all. Fails if the
    weights that stayed are counted among all and not where the delta is not zero."""
    delta = _delta(64, 48, size=3e-4)
    delta.low_rank.A[:, :24] = 0
    weight = torch.randn(64, 48)
    effect = Effect()
    add_delta("w", weight.bfloat16(), delta, torch.bfloat16, effect)
    assert effect.should_move == 64 * 24
    assert effect.unmoved is not None
    assert 0.5 < effect.unmoved < 0.99
    assert effect.survival is not None
    assert 0.3 < effect.survival < 3
    effect = Effect()
    add_delta("w", weight, delta, torch.float32, effect)
    assert effect.survival == pytest.approx(1, abs=1e-3)
    assert effect.unmoved < 0.02


def test_a_delta_that_vanishes_is_named() -> None:
    effect = Effect()
    weight = torch.ones(5, 4).bfloat16()
    add_delta("zero", weight, _delta(5, 4, scale=0.0), torch.bfloat16, effect)
    assert (effect.survival, effect.unmoved, effect.lost) == (None, None, [])
    add_delta("tiny", weight, _delta(5, 4, size=1e-6), torch.bfloat16, effect)
    assert (effect.survival, effect.unmoved, effect.lost) == (0.0, 1.0, ["tiny"])


def test_what_does_not_fit_is_refused() -> None:
    big = torch.full((3, 4), 60_000.0)
    delta = FileDelta(LowRank(torch.ones(1, 4), torch.ones(3, 1), 9_000.0, 0.0))
    with pytest.raises(VerificationError, match=r"tensor `w` .*float16 \(limit 65504\)"):
        add_delta("w", big, delta, torch.float16, Effect())
    assert add_delta("w", big, delta, torch.float32, Effect()).max() == 69_000
    with pytest.raises(VerificationError, match="tensor `v`"):
        cast("v", 2 * big, torch.float16)
    assert cast("v", big, torch.float16).dtype == torch.float16


def test_shapes() -> None:
    assert _delta(5, 4).shape == (5, 4)
    assert _delta(5, 4)._replace(transposed=True).shape == (4, 5)
