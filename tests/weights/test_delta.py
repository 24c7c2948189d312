"""The sum of one weight and one delta."""

from __future__ import annotations

import pytest
import torch

from decal.adapters.base import LowRank
from decal.errors import VerificationError
from decal.weights import delta as module
from decal.weights.delta import FileDelta, add_delta, cast


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
    result = add_delta("w", weight, delta, dtype)
    A, B, scale, *_ = delta.low_rank
    update = scale * (B.double() @ A.double())
    exact = weight.double() + (update.T if transposed else update)
    product = 8 * 2**-24 * scale * (B.double().abs() @ A.double().abs())
    product = product.T if transposed else product
    eps = torch.finfo(dtype).eps
    assert result.dtype == dtype
    assert ((result.double() - exact).abs() <= 0.5 * eps * exact.abs() * 1.01 + product).all()


@pytest.mark.parametrize("rows", [1, 2, 5, 100])
def test_slices_change_nothing(monkeypatch: pytest.MonkeyPatch, rows: int) -> None:
    """Fails if a slice is skipped, or taken from other rows of the delta than of the weight."""
    delta, weight = _delta(13, 7), torch.randn(13, 7).bfloat16()
    expected = add_delta("w", weight, delta, torch.bfloat16)
    monkeypatch.setattr(module, "_SLICE", rows * 7)
    assert torch.equal(add_delta("w", weight, delta, torch.bfloat16), expected)


def test_what_does_not_fit_is_refused() -> None:
    big = torch.full((3, 4), 60_000.0)
    delta = FileDelta(LowRank(torch.ones(1, 4), torch.ones(3, 1), 9_000.0, 0.0))
    with pytest.raises(VerificationError, match=r"tensor `w` .*float16 \(limit 65504\)"):
        add_delta("w", big, delta, torch.float16)
    assert add_delta("w", big, delta, torch.float32).max() == 69_000
    with pytest.raises(VerificationError, match="tensor `v`"):
        cast("v", 2 * big, torch.float16)
    assert cast("v", big, torch.float16).dtype == torch.float16


def test_shapes() -> None:
    assert _delta(5, 4).shape == (5, 4)
    assert _delta(5, 4)._replace(transposed=True).shape == (4, 5)
