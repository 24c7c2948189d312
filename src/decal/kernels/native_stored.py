"""A stored weight as the library sees it: `Stored` of native/stored.h, field by field.

Knows no ops. The struct holds addresses only; the tensors behind them must outlive the call.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from decal.kernels.stored import NESTED_BLOCK_SIZE, Stored

_FORMATS = {"dense": 0, "code4": 1, "rows8": 2}


class StoredStruct(ctypes.Structure):
    """The fields in the order of native/stored.h."""

    _fields_ = (
        ("format", ctypes.c_int32),
        ("block_size", ctypes.c_int32),
        ("rows", ctypes.c_int64),
        ("cols", ctypes.c_int64),
        ("stride", ctypes.c_int64),
        ("data", ctypes.c_void_p),
        ("scales", ctypes.c_void_p),
        ("nested", ctypes.c_void_p),
        ("table", ctypes.c_void_p),
        ("code", ctypes.c_void_p),
        ("offset", ctypes.c_float),
    )


def dense_struct(x: Tensor) -> StoredStruct:
    """A bf16 matrix without gaps inside its rows, as a weight."""
    rows, cols = x.shape
    return StoredStruct(0, 0, rows, cols, x.stride(0), x.data_ptr(), 0, 0, 0, 0, 0.0)


def stored_struct(weight: Stored) -> StoredStruct:
    """The weight as the library sees it; its tensors must outlive the call."""
    if weight.format == "dense":
        return dense_struct(weight.data)
    double = weight.nested is not None
    return StoredStruct(
        format=_FORMATS[weight.format],
        block_size=weight.block_size,
        rows=weight.shape[0],
        cols=weight.shape[1],
        stride=weight.shape[1],
        data=weight.data.data_ptr(),
        scales=pointer(weight.scales),
        nested=pointer(weight.nested),
        table=pointer(weight.table) if double else 0,
        code=pointer(weight.code),
        offset=float(weight.offset) if weight.offset is not None else 0.0,
    )


def readable(weight: Stored) -> bool:
    """Whether a kernel may read this weight: bf16 rows or packed, on a CPU, as large as it says."""
    parts = [x for x in weight[2:8] if isinstance(x, Tensor)]
    if any(not x.is_cpu for x in parts):
        return False
    if weight.format == "dense":
        return is_rows(weight.data, weight.shape)
    rows, cols = weight.shape
    if weight.scales is None or not all(x.is_contiguous() for x in parts):
        return False
    if weight.format == "rows8":
        return weight.data.shape == weight.shape and weight.scales.shape == (rows,)
    if not _floats(weight.code, 16):
        return False
    blocks = -(-rows * cols // weight.block_size)
    held = weight.data.numel() == (rows * cols + 1) // 2 and weight.scales.numel() == blocks
    if weight.nested is None:
        return held and weight.scales.dtype == torch.float32
    groups = -(-blocks // NESTED_BLOCK_SIZE)
    nested = _floats(weight.nested, groups) and _floats(weight.table, 256)
    return held and weight.scales.dtype == torch.uint8 and nested


def _floats(x: Tensor | None, count: int) -> bool:
    return x is not None and x.dtype == torch.float32 and x.numel() == count


def transposed(weight: Stored) -> bool:
    """Whether the weight is a bf16 matrix whose columns have no gaps: stored as [K, N]."""
    if weight.format != "dense" or readable(weight):
        return False
    rows, cols = weight.shape
    return weight.data.ndim == 2 and is_rows(weight.data.t(), (cols, rows))


def is_rows(x: Tensor, shape: tuple[int, int]) -> bool:
    """Whether x is a bf16 matrix of this shape on a CPU, without gaps inside its rows."""
    if x.dtype != torch.bfloat16 or not x.is_cpu or x.shape != shape:
        return False
    return x.shape[1] <= 1 or x.stride(1) == 1


def pointer(tensor: Tensor | None) -> int:
    """A tensor's memory; 0 for None."""
    return 0 if tensor is None else tensor.data_ptr()
