"""Products with a few rows of x in compiled code: calls of native/gemv.cpp.

Knows addresses only: kernels/native_project.py has looked at the tensors. Up to `MOST` rows reading
the weight takes most of the time, so it is unpacked once for all of them.
"""

from __future__ import annotations

from ctypes import byref, c_int, c_int64, c_void_p

from torch import Tensor

from decal.kernels import native
from decal.kernels.native_stored import StoredStruct, pointer
from decal.kernels.stored import Low

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
