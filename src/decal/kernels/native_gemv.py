"""y = x W^T for a few rows of x in compiled code: calls of native/gemv.cpp.

Takes bf16 rows on a CPU and weights in bf16 or packed; anything else is for another product. Up to
`MOST` rows reading the weight takes all the time, so the weight is unpacked once for all of them.
"""

from __future__ import annotations

from ctypes import byref, c_int, c_int64
from typing import Any

import torch
from torch import Tensor

from decal.kernels import native
from decal.kernels.native_stored import stored_struct
from decal.kernels.stored import Stored

MOST = 8
"""Rows in one call."""


def gemv(x: Tensor, weight: Stored) -> Tensor | Any:
    """x bf16 [T, K], T from 1 to 8, times a stored [N, K] -> bf16 [T, N], summed in float32."""
    run = native.kernel("gemv")
    if run is None or x.ndim != 2 or not 1 <= x.shape[0] <= MOST or not _takes(x, weight):
        return NotImplemented
    y = x.new_empty(x.shape[0], weight.shape[0])
    run(
        byref(stored_struct(weight)),
        native.address(x),
        c_int64(x.stride(0)),
        c_int64(x.shape[0]),
        native.address(y),
        c_int64(y.stride(0)),
        c_int(native.threads()),
    )
    return y


def _takes(x: Tensor, weight: Stored) -> bool:
    tensors = [x, weight.data, weight.scales, weight.nested, weight.table, weight.code]
    if any(t is not None and t.device.type != "cpu" for t in tensors):
        return False
    if x.dtype != torch.bfloat16 or x.shape[1] != weight.shape[1] or not _rows(x):
        return False
    if weight.format == "dense":
        return weight.data.dtype == torch.bfloat16 and _rows(weight.data)
    return all(t is None or t.is_contiguous() for t in tensors[1:])


def _rows(x: Tensor) -> bool:
    """Whether the values of a row lie one after the other."""
    return x.shape[1] <= 1 or x.stride(1) == 1
