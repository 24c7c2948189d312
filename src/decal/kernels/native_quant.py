"""The compiled quantizers: the ops of reference_quant.py and reference_int8.py, bit for bit.

Knows tensors only. bf16 and float32 are read and written where they lie; other dtypes go through
float32 in chunks small enough for the cache, which changes no bit, since that is what the
reference computes in.
"""

from __future__ import annotations

from collections.abc import Iterator
from ctypes import c_int, c_int64
from typing import Any

import torch
from torch import Tensor

from decal.kernels import native

_CHUNK = 1 << 20
"""Values that are float32 at the same time; a multiple of every block size."""
_GRAIN = 32
"""Blocks of 4-bit codes are a multiple of this."""
_DIRECT = (torch.bfloat16, torch.float32)


def _plain(*tensors: Tensor) -> bool:
    """Whether a kernel may read these: on the CPU, without gaps, outside of autograd."""
    return all(
        x.device.type == "cpu" and x.is_contiguous() and not (x.requires_grad and _recording())
        for x in tensors
    )


def _recording() -> bool:
    return torch.is_grad_enabled()


def _float32(*tensors: Tensor) -> bool:
    return all(x.dtype == torch.float32 for x in tensors)


def _half(dtype: torch.dtype) -> c_int:
    return c_int(dtype == torch.bfloat16)


def _parts(n: int, dtype: torch.dtype, step: int) -> Iterator[slice]:
    """All of [0, n) where a kernel knows the dtype, else pieces."""
    step = max(n, 1) if dtype in _DIRECT else step
    for start in range(0, n, step):
        yield slice(start, min(start + step, n))


def _readable(x: Tensor) -> Tensor:
    return x if x.dtype in _DIRECT else x.float()


def _codebook(code: Tensor) -> tuple[Tensor, Tensor | None]:
    """Midpoints between neighbours in size, and which code each rank has if not the same."""
    sorting = torch.argsort(code, stable=True)
    ascending = code[sorting]
    same = torch.equal(ascending, code)
    return (ascending[:-1] + ascending[1:]) / 2, None if same else sorting.to(torch.uint8)


def quantize_4bit(x: Tensor, code: Tensor, block_size: int) -> tuple[Tensor, Tensor] | Any:
    """As reference_quant.quantize_4bit; blocks of a multiple of 32."""
    run = native.kernel("quantize_4bit")
    sound = x.ndim == 1 and x.is_floating_point() and code.shape == (16,)
    if run is None or not sound or not _plain(x, code) or not _float32(code):
        return NotImplemented
    if block_size % _GRAIN or _CHUNK % block_size:
        return NotImplemented
    midpoints, order = _codebook(code)
    n = x.numel()
    packed = torch.empty(((n + 1) // 2, 1), dtype=torch.uint8, device="cpu")
    absmax = torch.empty(-(-n // block_size), dtype=torch.float32, device="cpu")
    for part in _parts(n, x.dtype, _CHUNK):
        values = _readable(x[part])
        run(
            native.address(values),
            _half(values.dtype),
            c_int64(values.numel()),
            c_int64(block_size),
            native.address(midpoints),
            native.address(order),
            native.address(packed[part.start // 2 :]),
            native.address(absmax[part.start // block_size :]),
            c_int(native.threads()),
        )
    return packed, absmax


def dequantize_4bit(
    packed: Tensor, absmax: Tensor, code: Tensor, block_size: int, n: int, dtype: torch.dtype
) -> Tensor | Any:
    """As reference_quant.dequantize_4bit; blocks of a multiple of 32."""
    run = native.kernel("dequantize_4bit")
    sound = packed.dtype == torch.uint8 and code.shape == (16,) and dtype.is_floating_point
    if run is None or not sound or not _plain(packed, absmax, code):
        return NotImplemented
    if not _float32(absmax, code) or block_size % _GRAIN or _CHUNK % block_size:
        return NotImplemented
    if packed.numel() < (n + 1) // 2 or absmax.numel() < -(-n // block_size):
        return NotImplemented
    flat, scales = packed.view(-1), absmax.view(-1)
    out = torch.empty(n, dtype=dtype, device="cpu")
    for part in _parts(n, dtype, _CHUNK):
        target = out[part]
        values = (
            target
            if dtype in _DIRECT
            else torch.empty(target.shape, dtype=torch.float32, device="cpu")
        )
        run(
            native.address(flat[part.start // 2 :]),
            native.address(scales[part.start // block_size :]),
            native.address(code),
            c_int64(block_size),
            c_int64(values.numel()),
            native.address(values),
            _half(values.dtype),
            c_int(native.threads()),
        )
        if values is not target:
            target.copy_(values)
    return out


def quantize_8bit(x: Tensor, code: Tensor, block_size: int) -> tuple[Tensor, Tensor] | Any:
    """As reference_quant.quantize_8bit."""
    run = native.kernel("quantize_8bit")
    sound = x.ndim == 1 and x.is_floating_point() and code.shape == (256,)
    if run is None or not sound or not _plain(x, code) or not _float32(code):
        return NotImplemented
    x = x.float()
    midpoints = torch.full((256,), torch.inf, dtype=torch.float32, device="cpu")
    torch.add(code[:-1], code[1:], out=midpoints[:-1]).div_(2)
    index = torch.empty(x.shape, dtype=torch.uint8, device="cpu")
    absmax = torch.empty(-(-x.numel() // block_size), dtype=torch.float32, device="cpu")
    run(
        native.address(x),
        c_int64(x.numel()),
        c_int64(block_size),
        native.address(midpoints),
        native.address(index),
        native.address(absmax),
        c_int(native.threads()),
    )
    return index, absmax


def dequantize_8bit(index: Tensor, absmax: Tensor, code: Tensor, block_size: int) -> Tensor | Any:
    """As reference_quant.dequantize_8bit."""
    run = native.kernel("dequantize_8bit")
    sound = index.dtype == torch.uint8 and index.ndim == 1 and code.shape == (256,)
    if run is None or not sound or not _plain(index, absmax, code):
        return NotImplemented
    if not _float32(absmax, code) or absmax.numel() != -(-index.numel() // block_size):
        return NotImplemented
    out = torch.empty(index.shape, dtype=torch.float32, device="cpu")
    run(
        native.address(index),
        native.address(absmax),
        native.address(code),
        c_int64(block_size),
        c_int64(index.numel()),
        native.address(out),
        c_int(native.threads()),
    )
    return out


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor] | Any:
    """As reference_int8.quantize_rows."""
    run = native.kernel("quantize_rows")
    if run is None or x.ndim != 2 or not x.is_floating_point() or not _plain(x) or not x.numel():
        return NotImplemented
    codes = torch.empty(x.shape, dtype=torch.int8, device="cpu")
    absmax = torch.empty(x.shape[0], dtype=torch.float32, device="cpu")
    for part in _parts(x.shape[0], x.dtype, max(1, _CHUNK // x.shape[1])):
        values = _readable(x[part])
        run(
            native.address(values),
            _half(values.dtype),
            c_int64(values.shape[0]),
            c_int64(values.shape[1]),
            native.address(codes[part]),
            native.address(absmax[part]),
            c_int(native.threads()),
        )
    return codes, absmax


def dequantize_rows(codes: Tensor, absmax: Tensor, dtype: torch.dtype) -> Tensor | Any:
    """As reference_int8.dequantize_rows."""
    run = native.kernel("dequantize_rows")
    sound = codes.dtype == torch.int8 and codes.ndim == 2 and dtype.is_floating_point
    if run is None or not sound or not _plain(codes, absmax) or not _float32(absmax):
        return NotImplemented
    if absmax.shape != codes.shape[:1] or not codes.numel():
        return NotImplemented
    out = torch.empty(codes.shape, dtype=dtype, device="cpu")
    for part in _parts(codes.shape[0], dtype, max(1, _CHUNK // codes.shape[1])):
        target = out[part]
        values = (
            target
            if dtype in _DIRECT
            else torch.empty(target.shape, dtype=torch.float32, device="cpu")
        )
        run(
            native.address(codes[part]),
            native.address(absmax[part]),
            c_int64(values.shape[0]),
            c_int64(values.shape[1]),
            native.address(values),
            _half(values.dtype),
            c_int(native.threads()),
        )
        if values is not target:
            target.copy_(values)
    return out
