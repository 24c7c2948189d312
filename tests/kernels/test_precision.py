"""References that take some rows at a time give what they give for all at once."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from decal.kernels import precision, reference_norm, reference_swiglu

ROWS, FEATURES = 7, 33


def parts(count: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    shape = (count, ROWS, FEATURES)
    return list(torch.randn(shape, generator=generator, dtype=torch.float64))


def norm_backward() -> tuple[Tensor, ...]:
    grad, x, add, weight = parts(4)
    rstd = reference_norm.rms_norm(x, weight[0], 1e-5)[1]
    return (reference_norm.rms_norm_backward(grad, x, weight[0], rstd, add),)


@pytest.mark.parametrize(
    "op",
    [
        norm_backward,
        lambda: (reference_swiglu.swiglu(*parts(2)),),
        lambda: reference_swiglu.swiglu_backward(*parts(3)),
    ],
    ids=["norm_backward", "swiglu", "swiglu_backward"],
)
def test_rows_in_chunks(
    monkeypatch: pytest.MonkeyPatch, op: Callable[[], tuple[Tensor, ...]]
) -> None:
    """float64, to the last bits. Fails when a chunk reads or writes the rows of another."""
    whole = op()
    monkeypatch.setattr(precision, "_CPU_CHUNK", 2 * FEATURES + 5)
    for found, wanted in zip(op(), whole, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-14, atol=1e-15)


def test_chunks_cover_the_rows() -> None:
    """Also of no rows and of rows without features. Fails when the last, shorter chunk is lost."""
    x = torch.arange(10.0)[:, None].expand(10, 1 << 17)
    assert [x[rows, 0].tolist() for rows in precision.chunks(x)][-1] == [8.0, 9.0]
    assert not list(precision.chunks(x[:0]))
    assert len(list(precision.chunks(x[:, :0]))) == 1
