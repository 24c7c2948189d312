"""Norms of differences: those of the full matrices, though these are never formed."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from decal.errors import DecalError
from decal.store.tensorfile import read_header, save_tensors
from decal.weights.difference import (
    Factors,
    Norms,
    delta_norms,
    stored_norms,
    tensor_norms,
    total,
)


def factors(r: int, scale: float, seed: int) -> Factors:
    generator = torch.Generator().manual_seed(seed)
    return Factors(
        torch.randn(r, 23, generator=generator), torch.randn(17, r, generator=generator), scale
    )


def full(f: Factors) -> torch.Tensor:
    return f.scale * f.B.double() @ f.A.double()


@pytest.mark.parametrize("ranks", [(3, 3), (2, 5), (19, 21)])
def test_deltas_of_any_ranks(ranks: tuple[int, int]) -> None:
    """float64: 1e-12 relative. Fails when a scale is dropped, or the sign of the second delta."""
    a, b = factors(ranks[0], 2.5, 1), factors(ranks[1], 0.7, 2)
    found = delta_norms(a, b)
    wanted = full(a).norm(), full(b).norm(), (full(a) - full(b)).norm()
    assert found == pytest.approx([float(x) for x in wanted], rel=1e-12)


def test_nearly_equal_deltas_keep_their_distance() -> None:
    """A relative change of 1e-10. Fails with Gram matrices, which square the numbers."""
    a = factors(4, 1.5, 3)
    b = Factors(a.A.double() * (1 + 1e-10), a.B.double(), a.scale)
    assert delta_norms(a, b).relative == pytest.approx(1e-10, rel=1e-3)


def test_other_factors_of_the_same_delta() -> None:
    """Fails when factors are compared instead of what they make."""
    a = factors(4, 1.5, 4)
    q = torch.linalg.qr(torch.randn(4, 4, dtype=torch.float64)).Q
    b = Factors(q.T @ a.A.double(), a.B.double() @ q * 3, a.scale / 3)
    relative = delta_norms(a, b).relative
    assert relative is not None
    assert relative < 1e-14


def test_relative_is_symmetric_and_defined_at_zero() -> None:
    """Fails when the difference is divided by the first norm."""
    assert Norms(0.0, 2.0, 2.0).relative == Norms(2.0, 0.0, 2.0).relative == 1.0
    assert Norms(0.0, 0.0, 0.0).relative == 0.0
    assert Norms(math.nan, 1.0, math.nan).relative is None
    assert Norms(1.0, math.inf, math.inf).relative is None


def test_total_is_the_norm_of_all() -> None:
    """Fails when norms are added instead of their squares."""
    assert total([Norms(3, 0, 4), Norms(4, 5, 3)]) == Norms(5, 5, 5)


def test_chunks_make_no_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails when the last, shorter chunk is lost."""
    a, b = torch.randn(7, 11), torch.randn(7, 11)
    monkeypatch.setattr("decal.weights.difference._CHUNK", 10)
    wanted = [float(x.double().norm()) for x in (a, b, a.double() - b.double())]
    assert tensor_norms(a, b) == pytest.approx(wanted, rel=1e-12)


def test_codes_have_no_distance(tmp_path: Path) -> None:
    """Fails when packed integers are subtracted; dtypes of numbers may differ."""
    tensors = {
        "codes": torch.arange(6, dtype=torch.uint8),
        "half": torch.ones(6, dtype=torch.bfloat16),
        "whole": torch.full((6,), 3.0),
    }
    save_tensors(tmp_path / "t.safetensors", tensors, {"format": "pt"})
    entries = read_header(tmp_path / "t.safetensors", DecalError).entries
    assert stored_norms(entries["codes"], entries["codes"]) is None
    norms = stored_norms(entries["half"], entries["whole"])
    assert norms is not None
    assert norms.relative == pytest.approx(2 / 3)
