"""4-bit and 8-bit blocks in plain torch: the specification, and the fallback on every device.

Knows tensors only: no module, no format, no model. `ops.py` says which implementation runs.

Layout of 4-bit weights (bitsandbytes' own, so that no second copy is ever needed): the weight is
flattened row-major, cut into blocks of `block_size` values that share one scale (the largest
magnitude of the block, `absmax`), and each value is replaced by the index of the nearest code
value. Two indices share a byte, the first in the high nibble. An odd count is padded with the
index that zero gets. The last block may be short.

    value[i] = code[index[i]] * absmax[i // block_size]      one float32 product, rounded once

Nearest is decided by midpoints: index = the number of midpoints between neighbouring code values
that lie strictly below value / absmax. Full blocks multiply by the reciprocal, the short last block
divides: both round differently, and bitsandbytes does it so. Equal bits matter more here than one
rule for both, because adapters trained on one set of codes are wrong on another.

Quantizing finds the index without a search: [-1, 1] is cut into equal cells so small that no two
midpoints share one; per cell a table holds the count of midpoints in lower cells and the one
midpoint, if any, inside. One multiplication, two small lookups and one comparison replace the
binary search (`torch.bucketize` runs four times slower) and give the same answer, because rounding
keeps the order of cells.

Dequantizing looks up whole bytes: a table of the 256 pairs of code values, read as one 64-bit item,
halves the lookups and needs no shift and no mask. Work is done in chunks so that the temporaries
stay in the cache, and dequantizing allocates its own once: fresh pages cost more than the
arithmetic. On an accelerator the chunks are larger, since launches cost more than memory.
A 65536-entry table of four values at a time was tried: no faster, it no longer fits the L1 cache.
"""

from __future__ import annotations

import torch
from torch import Tensor

_CPU_CHUNK = 1 << 20
"""Values per chunk on a CPU; a multiple of every block size."""
_CPU_BLOCKS = 1 << 12
"""Blocks that are dequantized at one time on a CPU."""
_DEVICE_CHUNK = 1 << 26
_TINY = 1e-38
"""Smallest scale that is divided by, as in bitsandbytes."""


def _chunk(device: torch.device) -> int:
    return _CPU_CHUNK if device.type == "cpu" else _DEVICE_CHUNK


def _normalized(x: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    """x / absmax of its block, flat, and the absmax per block, both float32."""
    x = x.float()
    full = x.numel() - x.numel() % block_size
    blocks = x[:full].view(-1, block_size)
    absmax = blocks.abs().amax(1) if full else x.new_empty(0)
    scaled = (blocks * (1.0 / absmax.clamp(min=_TINY))[:, None]).view(-1)
    if full < x.numel():
        last = x[full:].abs().amax().clamp(min=_TINY)
        absmax = torch.cat([absmax, last[None]])
        scaled = torch.cat([scaled, x[full:] / last])
    return scaled, absmax


def _cells(midpoints: Tensor) -> tuple[int, Tensor, Tensor]:
    """The cell tables of the module docstring: cells per unit, lower count, inner midpoint."""
    per_unit = 8
    while True:
        cell = _cell(midpoints, per_unit).long()
        if cell.unique().numel() == cell.numel():
            break
        per_unit *= 2
        if per_unit > 1 << 20:
            raise ValueError("code values closer than 1e-6 cannot be told apart")
    index = torch.arange(2 * per_unit + 1, device=midpoints.device)
    below = (cell[None, :] < index[:, None]).sum(1).to(torch.uint8)
    inside = midpoints.new_full((2 * per_unit + 1,), torch.inf)
    inside[cell] = midpoints
    return per_unit, below, inside


def _cell(x: Tensor, per_unit: int) -> Tensor:
    return x.add(1.0).mul_(float(per_unit)).to(torch.int32)


def quantize_4bit(x: Tensor, code: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    """Packs `x` into 4-bit codes.

    Args:
        x: floating [n], finite; computed in float32.
        code: float32 [16], the values, in any order; at most 1 in magnitude.
        block_size: values that share a scale; divides 2**20.

    Returns:
        uint8 [(n + 1) // 2, 1] and float32 absmax [ceil(n / block_size)].
    """
    sorting = torch.argsort(code, stable=True)
    ascending = code[sorting]
    per_unit, below, inside = _cells((ascending[:-1] + ascending[1:]) / 2)
    order = None if torch.equal(ascending, code) else sorting.to(torch.uint8)
    n, chunk = x.numel(), _chunk(x.device)
    packed = torch.empty((n + 1) // 2, dtype=torch.uint8, device=x.device)
    absmax = torch.empty(-(-n // block_size), dtype=torch.float32, device=x.device)
    for start in range(0, n, chunk):
        scaled, part = _normalized(x[start : start + chunk], block_size)
        first = start // block_size
        absmax[first : first + part.numel()] = part
        if scaled.numel() % 2:
            scaled = torch.nn.functional.pad(scaled, (0, 1))
        cell = _cell(scaled, per_unit)
        index = below.index_select(0, cell)
        index += (scaled > inside.index_select(0, cell)).view(torch.uint8)
        if order is not None:
            index = order.index_select(0, index.int())
        byte = packed[start // 2 : (start + scaled.numel()) // 2]
        torch.bitwise_or(index[::2] << 4, index[1::2], out=byte)
    return packed.unsqueeze(1), absmax


def dequantize_4bit(
    packed: Tensor, absmax: Tensor, code: Tensor, block_size: int, n: int, dtype: torch.dtype
) -> Tensor:
    """The `n` values of `packed` in `dtype`: float32 code[index] * absmax, rounded once.

    Args:
        packed: uint8, (n + 1) // 2 items in any shape.
        absmax: float32 [ceil(n / block_size)].
        code: float32 [16].
        block_size: values that share a scale; divides 2**20.
        n: how many values.
        dtype: floating dtype of the result.

    Returns:
        [n] in `dtype`.
    """
    packed = packed.reshape(-1)
    pairs = torch.stack([code.repeat_interleave(16), code.repeat(16)], 1)
    pairs = pairs.view(torch.float64).view(-1)
    out = torch.empty(n, dtype=dtype, device=packed.device)
    on_cpu = packed.device.type == "cpu"
    chunk = min(block_size * _CPU_BLOCKS, _CPU_CHUNK) if on_cpu else _DEVICE_CHUNK
    index = torch.empty(min(chunk, n + 1) // 2, dtype=torch.int32, device=packed.device)
    looked_up = torch.empty(index.shape, dtype=torch.float64, device=packed.device)
    for start in range(0, n, chunk):
        stop = min(start + chunk, n)
        size = (stop + 1 - start) // 2
        index[:size] = packed[start // 2 : start // 2 + size]
        torch.index_select(pairs, 0, index[:size], out=looked_up[:size])
        values = looked_up.view(torch.float32)[: stop - start]
        scales = absmax[start // block_size : -(-stop // block_size)]
        full = values.numel() - values.numel() % block_size
        values[:full].view(-1, block_size).mul_(scales[: full // block_size, None])
        if full < values.numel():
            values[full:].mul_(scales[-1])
        out[start:stop] = values
    return out


def dynamic_map(device: torch.device | str = "cpu") -> Tensor:
    """The signed 8-bit "dynamic" code (Dettmers 2015, arXiv 1511.04561), float32 [256], ascending.

    One decade per exponent e = 0..6 from 1e-6 up to 1: 2**e values of either sign at the midpoints
    of 2**e equal parts of [0.1, 1], times 10**(e - 6); and 0 and 1. The float32 steps are those of
    bitsandbytes, so the values are equal bit for bit.
    """
    values = [0.0, 1.0]
    for exponent in range(7):
        edges = torch.linspace(0.1, 1.0, 2**exponent + 1, dtype=torch.float32, device="cpu")
        decade = (10 ** (exponent - 6)) * ((edges[:-1] + edges[1:]) / 2)
        values += decade.tolist() + (-decade).tolist()
    return torch.tensor(sorted(values), dtype=torch.float32, device=device)


def quantize_8bit(x: Tensor, code: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    """Replaces every value by the index of the nearest code value, by the midpoint rule.

    Args:
        x: floating [n], finite; computed in float32.
        code: float32 [256], ascending, at most 1 in magnitude.
        block_size: values that share a scale.

    Returns:
        uint8 [n] and float32 absmax [ceil(n / block_size)].
    """
    scaled, absmax = _normalized(x, block_size)
    index = torch.bucketize(scaled, (code[:-1] + code[1:]) / 2, out_int32=True)
    return index.to(torch.uint8), absmax


def dequantize_8bit(index: Tensor, absmax: Tensor, code: Tensor, block_size: int) -> Tensor:
    """float32 [n]: code[index] * absmax of the block. Shapes as in `quantize_8bit`."""
    values = code.index_select(0, index.int())
    full = values.numel() - values.numel() % block_size
    values[:full].view(-1, block_size).mul_(absmax[: full // block_size, None])
    if full < values.numel():
        values[full:].mul_(absmax[-1])
    return values
