"""The product of a few rows against the dequantized weight in float64."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch

from decal.kernels import native, native_gemv, native_project
from decal.kernels.native_stored import stored_struct
from decal.kernels.stored import Low, Stored
from decal.quant import FORMATS
from decal.quant.base import Recipe
from decal.quant.codebook import CodebookFormat, nested_map

CPU = torch.device("cpu")
SHAPES = [(1, 64), (7, 128), (3, 1), (5, 63), (33, 576), (2, 1111), (65, 2080), (9, 4096)]
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
    """A weight packed, and its values in float32."""
    fmt = FORMATS[recipe.format]
    packed = fmt.quantize(weight, recipe)
    values = fmt.dequantize(packed, torch.float32)
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


def check(
    x: torch.Tensor, weight: Stored, values: torch.Tensor, more: dict[str, Any] | None = None
) -> None:
    """`values`: the weight in float32; it may count rounded to bf16 instead."""
    found = native_project.project(x, weight, **(more or {}))
    assert found.dtype == torch.bfloat16
    assert found.shape == (x.shape[0], values.shape[0])
    expected, size = extra(**(more or {}))
    # One rounding to bf16, and sums in float32 relative to what is added, or codes and x in
    # integers of 14 bits (native/gemv.cpp).
    size = size + x.double().abs() @ values.double().abs().T
    integers = native.isa() == "avx2" and weight.format == "code4"
    share = 2.0**-15 if integers else 2e-6
    errors = []
    for counted in (values, values.bfloat16()):
        whole = x.double() @ counted.double().T + expected
        room = whole.abs() * 2**-8 + size * share + 1e-30
        errors.append(float(((found.double() - whole).abs() / room).max()))
    assert min(errors) <= 1, errors


def extra(
    bias: torch.Tensor | None = None,
    low: Sequence[Low] = (),
    add: torch.Tensor | None = None,
) -> tuple[Any, Any]:
    """What comes to the product with the weight, and the sum of its terms' sizes."""
    value: Any = 0.0
    size: Any = 0.0
    for each in (bias, add):
        if each is not None:
            value, size = value + each.double(), size + each.double().abs()
    for part in low:
        z, B = part.z.double(), part.factor.double()
        value, size = value + z @ B.T, size + z.abs() @ B.abs().T
    return value, size


@pytest.mark.parametrize("recipe", RECIPES, ids=str)
def test_rows_times_a_packed_weight(isa: str, recipe: Recipe) -> None:
    """Fails when the nibbles are swapped, a scale is another block's, the offset of the scales is
    left out, the last row of an odd number is, or the last values of a row are multiplied by what
    lies behind x."""
    for rows, columns in SHAPES:
        weight, values = stored((torch.randn(rows, columns) * 0.02).bfloat16(), recipe)
        for count in (1, 2, 3, 5, 8):
            check(torch.randn(count, columns).bfloat16(), weight, values)


@pytest.mark.parametrize("rank", [1, 5, 16, 33, 64])
def test_what_is_added_is_rounded_with_the_sum(isa: str, rank: int) -> None:
    """Fails when the update is scaled by an int8 weight's scale, a rank that fills no register
    reads the next row, z's or the residual's rows are taken to lie without gaps, or one of them is
    rounded first."""
    for recipe in (RECIPES[0], RECIPES[-1]):
        for rows, columns in ((7, 128), (33, 576), (5, 63)):
            weight, values = stored((torch.randn(rows, columns) * 0.02).bfloat16(), recipe)
            for count in (1, 3, 8):
                z = torch.full((count, rank + 3), torch.nan).bfloat16()
                add = torch.full((count, rows + 3), torch.nan).bfloat16()
                z[:, :rank], add[:, :rows] = torch.randn(count, rank), torch.randn(count, rows)
                B = torch.randn(rows, rank).bfloat16()
                x, bias = torch.randn(count, columns).bfloat16(), torch.randn(rows).bfloat16()
                more = {"bias": bias, "low": [Low(z[:, :rank], B)], "add": add[:, :rows]}
                check(x, weight, values, more)


@pytest.mark.parametrize("rank", [1, 5, 16, 33])
def test_an_adapter_in_one_call_is_the_same_to_the_bit(isa: str, rank: int) -> None:
    """Fails when a factor is not scaled, not rounded, or read from where another one lies; when z
    is not rounded; or when the bias is added to z as well."""
    for recipe in (None, RECIPES[0], RECIPES[2], RECIPES[-1]):
        for rows, columns in ((7, 128), (33, 576), (5, 63), (400, 640)):
            dense = (torch.randn(rows, columns) * 0.02).bfloat16()
            weight = Stored("dense", (rows, columns), dense)
            if recipe is not None:
                weight, _ = stored(dense, recipe)
            A, B = torch.randn(rank, columns), torch.randn(rows, rank)
            for count in (1, 3, 8):
                x, bias = torch.randn(count, columns).bfloat16(), torch.randn(rows).bfloat16()
                z = native_project.into_rank(x, A.bfloat16())
                low = [Low(z, (B * 0.7).bfloat16())]
                apart = native_project.project(x, weight, bias, low)
                found = native_gemv.project_adapted(x, weight, bias, A, B, 0.7)
                assert torch.equal(found, apart)


def test_an_adapter_in_one_call_takes_only_what_it_can_read(isa: str) -> None:
    """Fails when the number of rows, a shape, a dtype or a gap is not looked at."""
    weight = Stored("dense", (5, 8), torch.randn(5, 8).bfloat16())
    x, A, B = torch.randn(2, 8).bfloat16(), torch.randn(3, 8), torch.randn(5, 3)

    def takes(x: torch.Tensor = x, A: torch.Tensor = A, B: torch.Tensor = B) -> bool:
        return native_gemv.project_adapted(x, weight, None, A, B, 1.0) is not NotImplemented

    assert takes()
    assert not takes(x=torch.randn(9, 8).bfloat16())
    assert not takes(x=torch.randn(2, 8))
    assert not takes(x=torch.randn(2, 9).bfloat16())
    assert not takes(A=A.bfloat16())
    assert not takes(A=torch.randn(3, 9))
    assert not takes(A=torch.randn(3, 9)[:, :8])
    assert not takes(B=torch.randn(5, 4))


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


@pytest.mark.parametrize("times", [30.0, 1000.0, 1e5])
def test_large_features_take_nothing_from_the_others(isa: str, times: float) -> None:
    """Nor does a row that has them from the rows beside it, to the bit. Fails when what integers of
    a block lose is left out, or taken for another row."""
    weight, values = stored((torch.randn(33, 640) * 0.02).bfloat16(), RECIPES[0])
    for count in (1, 3, 4, 7):
        x = torch.randn(count, 640).bfloat16()
        plain = native_project.project(x, weight)
        x[0, [5, 300]] *= times
        found = native_project.project(x, weight)
        assert torch.equal(found[1:], plain[1:])
        shares = []
        for counted in (values, values.bfloat16()):  # as in `check`
            exact = x.double() @ counted.double().T
            rounding = (exact.bfloat16().double() - exact).norm(dim=1)
            shares.append(float(((found.double() - exact).norm(dim=1) / rounding).max()))
        assert min(shares) <= 1.5, shares


def test_large_values_stay_finite(isa: str) -> None:
    """Fails when sums of integers get their unit last: they are 2^14 times the result."""
    weight, values = stored((torch.randn(64, 640) * 0.02).bfloat16(), RECIPES[0])
    x = torch.zeros(2, 640).bfloat16()
    x[:, 7] = 1e36
    check(x, weight, values)
    assert native_project.project(x, weight).isfinite().all()


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
            found.append(native_project.project(x, weight))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(y, found[0]) for y in found)


def test_what_is_left_to_others() -> None:
    """Fails when too many rows are taken, or rows where there is no library."""
    weight, values = stored(torch.randn(8, 64), RECIPES[0])
    held, x, out = (
        stored_struct(weight),
        torch.randn(9, 64).bfloat16(),
        torch.zeros(9, 8).bfloat16(),
    )
    assert not native_gemv.multiply(x, held, out)
    assert not native_gemv.multiply(x[:0], held, out[:0])
    with native.forced("none"):
        assert not native_gemv.multiply(x[:8], held, out[:8])
    assert not bool(out.any())
    check(x, weight, values)


def test_as_near_as_torch_on_the_dequantized_weight(isa: str) -> None:
    """The error against the weight in float32 is no more than a product of bf16 has. Fails when
    codes are rounded besides the values they stand for."""
    weight, values = stored((torch.randn(256, 1024) * 0.02).bfloat16(), RECIPES[0])
    x = torch.randn(8, 1024).bfloat16()
    expected = x.double() @ values.double().T
    theirs = torch.nn.functional.linear(x, values.bfloat16()).double() - expected
    ours = native_project.project(x, weight).double() - expected
    assert float(ours.norm()) <= 1.02 * float(theirs.norm())
