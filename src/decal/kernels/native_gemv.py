"""Products with a few rows of x in compiled code: calls of native/gemv.cpp.

Up to `MOST` rows reading the weight takes most of the time, so it is unpacked once for all of them.
`multiply` knows addresses only: kernels/native_project.py has looked at the tensors.
"""

from __future__ import annotations

from ctypes import byref, c_float, c_int, c_int64, c_void_p
from typing import Any

import torch
from torch import Tensor

from decal.kernels import native
from decal.kernels.native_stored import (
    StoredStruct,
    is_rows,
    pointer,
    readable,
    stored_struct,
)
from decal.kernels.stored import Low, Stored

MOST = 8
"""Rows in one call."""


def multiply(
    x: Tensor,
    weight: StoredStruct,
    out: Tensor,
    bias: Tensor | None = None,
    low: Low | None = None,
    add: Tensor | None = None,
) -> bool:
    """Writes what the op `project` returns into `out`, for x bf16 [T, K] with T from 1 to `MOST`.

    Summed in float32 and rounded once. A 4-bit weight counts as it is dequantized to bf16, or to
    float32 where the processor has no products of bf16; an int8 one counts as it is.

    Returns:
        Whether it did; False for more rows or none, or without the library.
    """
    run = native.kernel("gemv")
    if run is None or not 1 <= x.shape[0] <= MOST:
        return False
    z, B = (None, None) if low is None else (low.z, low.factor)
    run(
        byref(weight),
        *_rows(x),
        c_int64(x.shape[0]),
        c_void_p(pointer(bias)),
        *_rows(z),
        c_int64(0 if z is None else z.shape[1]),
        *_rows(B),
        *_rows(add),
        *_rows(out),
        c_int(native.threads()),
    )
    return True


def _rows(x: Tensor | None) -> tuple[c_void_p, c_int64]:
    """Where the rows begin, and the distance between two."""
    return c_void_p(pointer(x)), c_int64(0 if x is None else x.stride(0))


def project_adapted(
    x: Tensor, weight: Stored, bias: Tensor | None, A: Tensor, B: Tensor, scale: float
) -> Any:
    """As reference_project.project_adapted, for bf16 x [T, K] with T from 1 to `MOST`.

    Equal to the bit to `project` and `into_rank` of the rounded factors; in Python those two and
    two casts take longer than reading the weight of a small layer.
    """
    run, (N, K) = native.kernel("gemv_adapted"), weight.shape
    if run is None or not 1 <= x.shape[0] <= MOST or not is_rows(x, (x.shape[0], K)):
        return NotImplemented
    if not readable(weight) or (bias is not None and not is_rows(bias[None], (1, N))):
        return NotImplemented
    r = A.shape[0]
    if not (_masters(A, (r, K)) and _masters(B, (N, r))):
        return NotImplemented
    out = x.new_empty(x.shape[0], N)
    run(
        byref(stored_struct(weight)),
        *_rows(x),
        c_int64(x.shape[0]),
        c_void_p(pointer(bias)),
        c_void_p(A.data_ptr()),
        c_void_p(B.data_ptr()),
        c_int64(r),
        c_float(scale),
        *_rows(out),
        c_int(native.threads()),
    )
    return out


def _masters(x: Tensor, shape: tuple[int, int]) -> bool:
    """Whether x is a float32 matrix of this shape on a CPU, without gaps."""
    return x.dtype == torch.float32 and x.is_cpu and x.shape == shape and x.is_contiguous()
