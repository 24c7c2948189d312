"""Blocks of 4 and 8 bits against the formula written out, one value at a time."""

from __future__ import annotations

import inspect

import pytest
import torch

from decal.kernels import native, ops
from decal.quant.nf4 import NF4

CODE = NF4.code(torch.device("cpu"))
SHUFFLED = CODE[torch.tensor([7, 3, 15, 0, 8, 1, 14, 2, 9, 4, 13, 5, 10, 6, 12, 11])]
SIZES = [(1, 32), (31, 32), (64, 64), (129, 64), (4097, 4096), (20_003, 128)]
"""Values and block size: short last blocks, odd counts, one value."""


def nearest(x: torch.Tensor, code: torch.Tensor, block_size: int) -> tuple[torch.Tensor, ...]:
    """Codes and scales by search over all 16 values, block by block, in float64."""
    codes, scales = [], []
    for block in x.float().split(block_size):
        scales.append(block.abs().max())
        scaled = block.double() / scales[-1].double().clamp(min=1e-38)
        codes.append((scaled[:, None] - code.double()[None, :]).abs().argmin(1))
    return torch.cat(codes), torch.stack(scales)


def unpacked(packed: torch.Tensor, n: int) -> torch.Tensor:
    flat = packed.view(-1).long()
    return torch.stack([flat // 16, flat % 16], 1).view(-1)[:n]


@pytest.mark.parametrize(("n", "block_size"), SIZES)
@pytest.mark.parametrize("code", [CODE, SHUFFLED], ids=["ascending", "shuffled"])
def test_every_value_gets_its_nearest_code(n: int, block_size: int, code: torch.Tensor) -> None:
    """Fails with nibbles swapped, with the codes of unsorted tables not mapped back, or if the
    short last block takes another block's scale. A tie in float64 may round either way in
    float32, random values have none."""
    x = torch.randn(n) * 0.02
    packed, absmax = ops.quantize_4bit(x, code, block_size)
    codes, scales = nearest(x, code, block_size)
    assert packed.shape == ((n + 1) // 2, 1)
    assert torch.equal(absmax, scales)
    assert torch.equal(unpacked(packed, n), codes)


def test_midpoints_go_to_the_lower_code() -> None:
    """Fails if the comparison with the midpoint is >= instead of >, or a table cell is off."""
    middle = (CODE[:-1] + CODE[1:]) / 2
    above, below = torch.nextafter(middle, middle + 1), torch.nextafter(middle, middle - 1)
    x = torch.cat([middle, above, below, torch.tensor([1.0])])
    packed, _ = ops.quantize_4bit(x, CODE, 64)
    index = torch.arange(15)
    expected = torch.cat([index, index + 1, index, torch.tensor([15])])
    assert torch.equal(unpacked(packed, 46), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize(("n", "block_size"), SIZES)
def test_dequantize_rounds_the_float32_product_once(
    n: int, block_size: int, dtype: torch.dtype
) -> None:
    """Fails if code or scale is rounded to `dtype` before the product, or the pairs are swapped."""
    codes = torch.randint(0, 16, (n,))
    even = torch.nn.functional.pad(codes, (0, n % 2))
    packed = (even[::2] * 16 + even[1::2]).to(torch.uint8)
    absmax = torch.rand(-(-n // block_size)) * 0.1
    expected = (CODE[codes] * absmax.repeat_interleave(block_size)[:n]).to(dtype)
    assert torch.equal(ops.dequantize_4bit(packed, absmax, CODE, block_size, n, dtype), expected)


def test_chunks_do_not_show() -> None:
    """More values than a chunk, and a ragged end. Fails if a chunk's scales or bytes are taken from
    the wrong place."""
    n = (1 << 20) + 64 * 3 + 7
    x = torch.randn(n)
    packed, absmax = ops.quantize_4bit(x, CODE, 64)
    tail = (1 << 20) - 128
    packed_tail, absmax_tail = ops.quantize_4bit(x[tail:], CODE, 64)
    assert torch.equal(packed[tail // 2 :], packed_tail)
    assert torch.equal(absmax[tail // 64 :], absmax_tail)
    whole = ops.dequantize_4bit(packed, absmax, CODE, 64, n, torch.float32)
    part = ops.dequantize_4bit(packed_tail, absmax_tail, CODE, 64, n - tail, torch.float32)
    assert torch.equal(whole[tail:], part)
    assert (whole - x).abs().max() <= x.abs().max() * (CODE[1:] - CODE[:-1]).max() / 2 + 1e-6


def test_zeros_stay_zero() -> None:
    """Fails if an all-zero block divides by its scale without the clamp (NaN picks a code)."""
    packed, absmax = ops.quantize_4bit(torch.zeros(100), CODE, 64)
    assert absmax[0] == 0
    values = ops.dequantize_4bit(packed, absmax, CODE, 64, 100, torch.float32)
    assert torch.equal(values, torch.zeros(100))


@pytest.mark.parametrize("n", [1, 255, 256, 1003])
def test_8bit_takes_the_nearest_of_256(n: int) -> None:
    """Fails if a block takes the previous block's scale, or the map is not ascending."""
    code = ops.dynamic_map()
    x = torch.randn(n) * 1e-3
    index, absmax = ops.quantize_8bit(x, code, 256)
    scales = absmax.repeat_interleave(256)[:n]
    near = ((x / scales).double()[:, None] - code.double()[None, :]).abs().argmin(1)
    assert torch.equal(index.long(), near)
    values = ops.dequantize_8bit(index, absmax, code, 256)
    assert torch.equal(values, code[index.long()] * scales)


def test_8bit_midpoints_go_to_the_lower_code() -> None:
    """Fails if the search counts midpoints at the value as below it."""
    code = ops.dynamic_map()
    middle = (code[:-1] + code[1:]) / 2
    index, _ = ops.quantize_8bit(torch.cat([middle, torch.tensor([1.0])]), code, 256)
    assert torch.equal(index.long(), torch.tensor([*range(255), 255]))


def test_every_op_explains_its_backend() -> None:
    """Fails if an op is added to the functions and not to the table, or the other way round."""
    functions = {
        name
        for name, value in vars(ops).items()
        if inspect.isfunction(value) and value.__module__ == ops.__name__ and name[0] != "_"
    }
    assert set(ops.explain()) == functions - {"explain"}
    assert ops.explain()["dropout_keep"].backend == ("native" if native.isa() else "torch")
    assert ops.explain()["dynamic_map"].backend == "torch"
