"""The product of a few rows against the dequantized weight in float64."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from decal.kernels import native, native_gemv
from decal.kernels.stored import Stored
from decal.quant import FORMATS
from decal.quant.base import Recipe
from decal.quant.codebook import CodebookFormat, nested_map

CPU = torch.device("cpu")
SHAPES = [(1, 64), (7, 128), (3, 1), (5, 63), (33, 576), (2, 1111), (65, 2080)]
"""[N, K]: pieces and padding of a row, blocks that straddle rows, rows that begin inside a byte."""
RECIPES = [
    Recipe(format="nf4"),
    Recipe(format="nf4", double=False),
    Recipe(format="fp4", block_size=128),
    Recipe(format="nf4", block_size=4096),
    Recipe(format="int8"),
]

pytestmark = pytest.mark.skipif(not native.available(), reason="the library is not built")


@pytest.fixture(params=native.available())
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    with native.forced(request.param):
        yield request.param


def stored(weight: torch.Tensor, recipe: Recipe) -> tuple[Stored, torch.Tensor]:
    """A weight packed, and its values in bf16."""
    fmt = FORMATS[recipe.format]
    packed = fmt.quantize(weight, recipe)
    values = fmt.dequantize(packed, torch.bfloat16)
    shape, parts = packed.shape, packed.parts
    if not isinstance(fmt, CodebookFormat):
        return Stored("rows8", shape, parts["CB"], parts["SCB"]), values
    held = Stored(
        "code4",
        shape,
        parts["weight_packed"],
        parts["absmax"],
        code=fmt.code(CPU),
        block_size=recipe.block_size,
    )
    if recipe.double:
        held = held._replace(
            nested=parts["nested_absmax"], offset=parts["nested_offset"], table=nested_map(CPU)
        )
    return held, values


def check(x: torch.Tensor, weight: Stored, values: torch.Tensor) -> None:
    found = native_gemv.gemv(x, weight)
    assert found.dtype == torch.bfloat16
    assert found.shape == (x.shape[0], values.shape[0])
    expected = x.double() @ values.double().T
    # One rounding to bf16, and sums in float32 relative to what is added.
    size = x.double().abs() @ values.double().abs().T
    error = (found.double() - expected).abs()
    assert bool((error <= expected.abs() * 2**-8 + size * 2e-6 + 1e-30).all())


@pytest.mark.parametrize("recipe", RECIPES, ids=str)
def test_rows_times_a_packed_weight(isa: str, recipe: Recipe) -> None:
    """Fails when the nibbles are swapped, a scale is another block's, the offset of the scales is
    left out, or the last values of a row are multiplied by what lies behind x."""
    for rows, columns in SHAPES:
        weight, values = stored((torch.randn(rows, columns) * 0.02).bfloat16(), recipe)
        for count in (1, 2, 5, 8):
            check(torch.randn(count, columns).bfloat16(), weight, values)


def test_rows_times_a_dense_weight(isa: str) -> None:
    """Fails when a row of the weight or of x is taken to follow the one before without a gap."""
    for rows, columns in SHAPES:
        wide = torch.randn(rows, columns + 3).bfloat16()
        wide[:, columns:] = torch.nan
        values = wide[:, :columns]
        x = torch.full((8, columns + 5), torch.nan).bfloat16()
        for count in range(1, 9):
            rows_of_x = x[:count, :columns].copy_(torch.randn(count, columns))
            check(rows_of_x, Stored("dense", (rows, columns), values), values)


def test_threads_do_not_show() -> None:
    """Fails when two threads share the rows otherwise than one does."""
    weight, values = stored(torch.randn(257, 576), RECIPES[0])
    x = torch.randn(3, 576).bfloat16()
    check(x, weight, values)
    before = torch.get_num_threads()
    try:
        found = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(native_gemv.gemv(x, weight))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(y, found[0]) for y in found)


def test_what_is_left_to_others() -> None:
    """Fails when float32 rows, too many rows, or columns with gaps are taken."""
    weight, _ = stored(torch.randn(8, 64), RECIPES[0])
    x = torch.randn(9, 128).bfloat16()
    assert native_gemv.gemv(x[:, :64], weight) is NotImplemented
    assert native_gemv.gemv(x[:0, :64], weight) is NotImplemented
    assert native_gemv.gemv(x[:8, ::2], weight) is NotImplemented
    assert native_gemv.gemv(x[:8, :64].float(), weight) is NotImplemented
    dense = Stored("dense", (8, 64), torch.randn(8, 64))
    assert native_gemv.gemv(x[:8, :64], dense) is NotImplemented
    with native.forced("none"):
        assert native_gemv.gemv(x[:8, :64], weight) is NotImplemented
