"""A stored weight as the library sees it: `Stored` of native/stored.h, field by field.

Knows no ops. The struct holds addresses only; the tensors behind them must outlive the call.
"""

from __future__ import annotations

import ctypes

from torch import Tensor

from decal.kernels.stored import Stored

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


def pointer(tensor: Tensor | None) -> int:
    """A tensor's memory; 0 for None."""
    return 0 if tensor is None else tensor.data_ptr()
