"""The compiled quantizers give the bits of the torch reference, on every instruction set."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from decal.kernels import native, native_quant, reference_int8, reference_quant
from decal.quant.codebook import BLOCK_SIZES
from decal.quant.fp4 import FP4
from decal.quant.nf4 import NF4

CPU = torch.device("cpu")
CODES = {"nf4": NF4.code(CPU), "fp4": FP4.code(CPU)}
DTYPES = [torch.bfloat16, torch.float32, torch.float16]
MAP = reference_quant.dynamic_map()

pytestmark = pytest.mark.skipif(not native.available(), reason="the library is not built")


@pytest.fixture(params=native.available())
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    with native.forced(request.param):
        yield request.param


def same(found: object, expected: object) -> bool:
    """Equal in shape, dtype and every bit, the signs of zeros included."""
    if isinstance(found, tuple) and isinstance(expected, tuple):
        return all(same(a, b) for a, b in zip(found, expected, strict=True))
    assert isinstance(found, torch.Tensor), found
    assert isinstance(expected, torch.Tensor)
    if found.dtype != expected.dtype or found.shape != expected.shape:
        return False
    size = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[found.element_size()]
    return torch.equal(found.view(size), expected.view(size))


def hard(n: int, dtype: torch.dtype) -> torch.Tensor:
    """Values of many magnitudes, with blocks of zeros, of denormals, and of one magnitude."""
    x = torch.randn(n) * 0.02
    for start, values in enumerate((0.0, -0.0, 1e-40, -3e-39, 2e-38, 6e-8, 60000.0, -1.0)):
        x[start * 4096 + 64 : start * 4096 + 200] = values
    x[5::31] *= 1e-3
    return x.to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CODES)
def test_codes_and_scales_of_every_block_size(isa: str, name: str, dtype: torch.dtype) -> None:
    """Fails when the short last block multiplies by the reciprocal, or its scale is not raised to
    the least one; when FP4's ranks are not mapped to its codes; when zero is rounded up."""
    for block_size in BLOCK_SIZES:
        for n in (1, 2, 31, block_size, 2 * block_size + 1, 40_000, 40_961):
            x = hard(n, dtype)
            args = (x, CODES[name], block_size)
            found = native_quant.quantize_4bit(*args)
            assert same(found, reference_quant.quantize_4bit(*args)), (block_size, n)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
@pytest.mark.parametrize("name", CODES)
def test_values_of_every_block_size(isa: str, name: str, dtype: torch.dtype) -> None:
    """Fails when code or scale is rounded before the product, when denormals are flushed, or when
    the nibbles are swapped."""
    scales = torch.rand(2000) * 0.1
    scales[::7], scales[1::7], scales[2::7] = 0.0, 1e-39, 60000.0
    for block_size in BLOCK_SIZES:
        for n in (1, 2, 31, block_size, 2 * block_size + 1, 40_000, 40_961):
            packed = torch.randint(0, 256, ((n + 1) // 2, 1), dtype=torch.uint8)
            args = (packed, scales[: -(-n // block_size)].clone(), CODES[name], block_size, n)
            found = native_quant.dequantize_4bit(*args, dtype)
            assert same(found, reference_quant.dequantize_4bit(*args, dtype)), (block_size, n)


@pytest.mark.parametrize("name", CODES)
def test_ties_go_to_the_lower_value(isa: str, name: str) -> None:
    """Fails when a comparison with a midpoint is >= instead of >."""
    ascending = CODES[name].sort().values
    middle = (ascending[:-1] + ascending[1:]) / 2
    near = [middle, middle.nextafter(middle + 1), middle.nextafter(middle - 1)]
    for end in ([torch.ones(19)], [torch.ones(18)]):
        x = torch.cat([*near, *end])
        args = (x, CODES[name], 64)
        assert same(native_quant.quantize_4bit(*args), reference_quant.quantize_4bit(*args))


def test_any_order_of_any_code(isa: str) -> None:
    """Fails when the order of a codebook is taken from its positive half."""
    code = torch.rand(16) * 2 - 1
    for dtype in DTYPES:
        args = (hard(40_961, dtype), code, 64)
        assert same(native_quant.quantize_4bit(*args), reference_quant.quantize_4bit(*args))


def test_chunks_and_threads_do_not_show(isa: str) -> None:
    """Fails when a thread's or a chunk's blocks begin at another place than the reference's."""
    n = (1 << 20) + 64 * 3 + 7
    for dtype in DTYPES:
        args = (torch.randn(n).to(dtype), CODES["nf4"], 64)
        packed, absmax = native_quant.quantize_4bit(*args)
        assert same((packed, absmax), reference_quant.quantize_4bit(*args))
        back = (packed, absmax, CODES["nf4"], 64, n, dtype)
        assert same(native_quant.dequantize_4bit(*back), reference_quant.dequantize_4bit(*back))


@pytest.mark.parametrize("block_size", [1, 7, 256])
def test_scales_in_8_bits(isa: str, block_size: int) -> None:
    """Fails when the search ends one midpoint off, or the last block is not divided."""
    middle = (MAP[:-1] + MAP[1:]) / 2
    for n in (1, 63, 256, 513, 40_961):
        x = hard(n, torch.float32)
        x[: min(n, 255)] = middle[: min(n, 255)]
        args = (x, MAP, block_size)
        index, absmax = reference_quant.quantize_8bit(*args)
        assert same(native_quant.quantize_8bit(*args), (index, absmax)), n
        back = (index, absmax, MAP, block_size)
        assert same(native_quant.dequantize_8bit(*back), reference_quant.dequantize_8bit(*back))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_of_8_bit_integers(isa: str, dtype: torch.dtype) -> None:
    """Fails when halves are rounded away from zero, when 127 / absmax is one division, or when the
    two products that make a value are taken in the other order."""
    for rows, columns in ((1, 1), (3, 31), (5, 64), (41, 1001)):
        x = hard(rows * columns, dtype).view(rows, columns)
        x[0] = 0
        codes, absmax = reference_int8.quantize_rows(x)
        assert same(native_quant.quantize_rows(x), (codes, absmax)), (rows, columns)
        back = (codes, absmax, dtype)
        assert same(native_quant.dequantize_rows(*back), reference_int8.dequantize_rows(*back))


def test_halves_go_to_the_even_code(isa: str) -> None:
    """Fails when a half is rounded up, or codes are cut off instead of rounded."""
    x = torch.arange(-127, 127.5, 0.5)[None].contiguous()
    assert same(native_quant.quantize_rows(x), reference_int8.quantize_rows(x))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nan_and_infinity_show_in_the_scales(isa: str, dtype: torch.dtype) -> None:
    """Fails when the largest magnitude is a maximum of floats, which leaves NaN out."""
    x = torch.randn(9, 77).to(dtype)
    for row, column in enumerate((0, 3, 20, 63, 64, 76)):
        x[row, column] = torch.nan
    x[6, 76], x[7, 1], x[7, 2] = -torch.inf, torch.nan, torch.inf
    codes, absmax = native_quant.quantize_rows(x)
    wanted_codes, wanted = reference_int8.quantize_rows(x)
    assert torch.equal(codes, wanted_codes)
    torch.testing.assert_close(absmax, wanted, rtol=0, atol=0, equal_nan=True)
    flat = x.view(-1)
    for block_size in (64, 256):
        found = native_quant.quantize_8bit(flat, MAP, block_size)[1]
        bad = flat.split(block_size)
        assert found.isnan().tolist() == [bool(part.isnan().any()) for part in bad]
        found = native_quant.quantize_4bit(flat, CODES["nf4"], block_size)[1]
        assert found.isnan().tolist() == [bool(part.isnan().any()) for part in bad]


def test_what_the_library_does_not_take_is_left_to_the_reference() -> None:
    """Fails when a strided tensor is read as if it had no gaps, or without the library at all."""
    x, code = torch.randn(256), CODES["nf4"]
    assert native_quant.quantize_4bit(x[::2], code, 64) is NotImplemented
    assert native_quant.quantize_4bit(x, code, 16) is NotImplemented
    assert native_quant.quantize_4bit(x, code.double(), 64) is NotImplemented
    assert native_quant.quantize_4bit(x.to("meta"), code, 64) is NotImplemented
    assert native_quant.quantize_rows(x.view(16, 16).T) is NotImplemented
    packed, absmax = native_quant.quantize_4bit(x, code, 64)
    short = (packed, absmax[:-1], code, 64, 256, torch.float32)
    assert native_quant.dequantize_4bit(*short) is NotImplemented
    with native.forced("none"):
        assert native_quant.quantize_4bit(x, code, 64) is NotImplemented
        assert native_quant.quantize_8bit(x, MAP, 256) is NotImplemented
        assert native_quant.quantize_rows(x.view(16, 16)) is NotImplemented
