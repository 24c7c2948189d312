"""Row-wise 8-bit integers: codes, values and the exact product."""

from __future__ import annotations

import pytest
import torch

from decal.kernels import ops, reference_int8


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_values_come_back_within_half_a_step(dtype: torch.dtype) -> None:
    """Half of absmax / 127, and the row's largest to float32 rounding. Fails if rows share a scale,
    or codes are cut off instead of rounded."""
    x = (torch.randn(37, 51) * torch.logspace(-3, 2, 37)[:, None]).to(dtype)
    codes, absmax = ops.quantize_rows(x)
    assert codes.dtype == torch.int8
    assert torch.equal(absmax, x.float().abs().amax(1))
    values = ops.dequantize_rows(codes, absmax, torch.float32)
    step = absmax[:, None] / 127
    assert bool(((values - x.float()).abs() <= step * (0.5 + 1e-5)).all())
    assert torch.equal(values, codes.float() * absmax[:, None] * 7.874015718698502e-3)


def test_a_row_of_zeros_stays_zero() -> None:
    """Fails if it is divided by its scale: NaN becomes some integer."""
    x = torch.zeros(3, 8)
    x[1] = torch.linspace(-1, 1, 8)
    codes, absmax = ops.quantize_rows(x)
    assert absmax[0] == absmax[2] == 0
    assert not codes[[0, 2]].any()
    assert codes[1, -1] == 127


def test_pieces_of_rows_and_columns_make_no_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if a piece writes into another's rows, or its product is not added."""
    x = torch.randn(41, 77)
    whole = ops.quantize_rows(x)
    values = ops.dequantize_rows(*whole, torch.bfloat16)
    product = ops.int8_matmul(whole[0], whole[0])
    monkeypatch.setattr(reference_int8, "_CHUNK", 200)
    monkeypatch.setattr(reference_int8, "_EXACT", 10)
    pieces = ops.quantize_rows(x)
    assert all(torch.equal(a, b) for a, b in zip(whole, pieces, strict=True))
    assert torch.equal(ops.dequantize_rows(*whole, torch.bfloat16), values)
    assert torch.equal(ops.int8_matmul(whole[0], whole[0]), product)


@pytest.mark.parametrize("k", [1, 1023, 1024, 1025, 5000])
def test_the_product_is_exact(k: int) -> None:
    """All ones of one sign are the worst case. Fails if more than 1024 products are added in
    float32: 5000 * 127**2 is beyond 2**24."""
    a = torch.full((3, k), 127, dtype=torch.int8)
    a[1, ::2] = -126
    b = torch.full((2, k), 127, dtype=torch.int8)
    b[1, ::3] = 1
    assert torch.equal(ops.int8_matmul(a, b).long(), a.long() @ b.long().T)


def test_empty_inputs_have_empty_results() -> None:
    """A batch without rows. Fails if a piece of no rows is reduced."""
    codes, absmax = ops.quantize_rows(torch.zeros(0, 8))
    assert codes.shape == (0, 8)
    assert absmax.shape == (0,)
    assert ops.int8_matmul(codes, torch.ones(2, 8, dtype=torch.int8)).shape == (0, 2)
