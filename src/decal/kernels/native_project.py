"""project, project_back, into_rank and over_rows in compiled code: calls of native/gemm.cpp.

Takes bf16 tensors on a CPU; anything else is left to the reference. Weights that are not bf16 or
packed are left too: a float32 weight would have to be rounded first.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from decal.kernels import native
from decal.kernels.native_stored import StoredStruct, dense_struct, pointer, stored_struct
from decal.kernels.stored import Keep, Stored

_NOTHING, _AFTER_FIRST, _LEFT, _RIGHT = range(4)
_ROUNDED, _FLOATS, _TRANSPOSED = range(3)
_MOST = 14
"""Segments in one call."""


class _Segment(ctypes.Structure):
    _fields_ = (
        ("a", ctypes.c_void_p),
        ("lda", ctypes.c_int64),
        ("k", ctypes.c_int64),
        ("across", ctypes.c_int32),
        ("weight", StoredStruct),
    )


class _Keep(ctypes.Structure):
    _fields_ = (
        ("offset", ctypes.c_void_p),
        ("factor", ctypes.c_void_p),
        ("column", ctypes.c_void_p),
        ("least", ctypes.c_int32),
    )


class _Product(ctypes.Structure):
    _fields_ = (
        ("segments", ctypes.POINTER(_Segment)),
        ("count", ctypes.c_int32),
        ("M", ctypes.c_int64),
        ("N", ctypes.c_int64),
        ("keep", ctypes.POINTER(_Keep)),
        ("masked", ctypes.c_int32),
        ("bias", ctypes.c_void_p),
        ("add", ctypes.c_void_p),
        ("ldadd", ctypes.c_int64),
        ("out", ctypes.c_void_p),
        ("ldout", ctypes.c_int64),
        ("output", ctypes.c_int32),
    )


def project(
    x: Tensor,
    weight: Stored,
    bias: Tensor | None = None,
    low: tuple[Tensor, Tensor] | None = None,
    add: Tensor | None = None,
) -> Any:
    rows = [x, *(low or ()), *(t for t in (add,) if t is not None)]
    if not _takes(rows, [weight], bias):
        return NotImplemented
    out = x.new_empty(x.shape[0], weight.shape[0])
    segments = [_segment(x, weight, across=False)]
    if low is not None:
        segments.append(_segment(low[0], dense_struct(low[1]), across=False))
    _multiply(segments, out, bias=bias, add=add)
    return out


def project_back(
    parts: Sequence[tuple[Tensor, Stored]],
    low: tuple[Tensor, Tensor] | None = None,
    keep: Keep | None = None,
) -> Any:
    rows = [grad for grad, _ in parts] + [*(low or ())]
    if not _takes(rows, [weight for _, weight in parts]) or len(parts) >= _MOST:
        return NotImplemented
    grad, weight = parts[0]
    out = grad.new_empty(grad.shape[0], weight.shape[1])
    segments = [] if low is None else [_segment(low[0], dense_struct(low[1]), across=True)]
    segments += [_segment(grad, weight, across=True) for grad, weight in parts]
    masked = low is not None and keep is not None
    _multiply(segments, out, keep=keep, masked=_AFTER_FIRST if masked else _NOTHING)
    return out


def into_rank(x: Tensor, A: Tensor, keep: Keep | None = None) -> Any:
    if not _takes([x, A], []):
        return NotImplemented
    out = x.new_empty(x.shape[0], A.shape[0])
    segments = [_segment(x, dense_struct(A), across=False)]
    _multiply(segments, out, keep=keep, masked=_NOTHING if keep is None else _LEFT)
    return out


def over_rows(p: Tensor, q: Tensor, keep: Keep | None = None) -> Any:
    if not _takes([p, q], []):
        return NotImplemented
    out = p.new_empty(p.shape[1], q.shape[1], dtype=torch.float32)
    swapped = p.shape[1] > q.shape[1] and keep is None
    left, right = (q, p) if swapped else (p, q)
    turned = left.t().contiguous()  # by name: a segment holds addresses only
    segments = [_segment(turned, dense_struct(right), across=True)]
    masked = _NOTHING if keep is None else _RIGHT
    _multiply(segments, out, keep=keep, masked=masked, output=_TRANSPOSED if swapped else _FLOATS)
    return out


def _takes(rows: Sequence[Tensor], weights: Sequence[Stored], bias: Tensor | None = None) -> bool:
    """Whether the library is there and takes these: bf16 rows without gaps inside, on a CPU."""
    if native.kernel("gemm") is None:
        return False
    for x in rows:
        if x.dtype != torch.bfloat16 or x.device.type != "cpu" or x.dim() != 2:
            return False
        if x.stride(1) != 1 and x.shape[1] > 1:
            return False
    if bias is not None and (bias.dtype != torch.bfloat16 or not bias.is_contiguous()):
        return False
    return all(weight.format != "dense" or _is_rows(weight.data) for weight in weights)


def _is_rows(x: Tensor) -> bool:
    return x.dtype == torch.bfloat16 and (x.stride(1) == 1 or x.shape[1] == 1)


def _segment(a: Tensor, weight: Stored | StoredStruct, *, across: bool) -> _Segment:
    stored = weight if isinstance(weight, StoredStruct) else stored_struct(weight)
    return _Segment(a.data_ptr(), a.stride(0), a.shape[1], int(across), stored)


def _multiply(
    segments: list[_Segment],
    out: Tensor,
    *,
    keep: Keep | None = None,
    masked: int = _NOTHING,
    output: int = _ROUNDED,
    bias: Tensor | None = None,
    add: Tensor | None = None,
) -> None:
    M, N = out.shape if output != _TRANSPOSED else (out.shape[1], out.shape[0])
    words = None
    if keep is not None and masked != _NOTHING:
        words = ctypes.pointer(
            _Keep(
                keep.offset.data_ptr(), keep.factor.data_ptr(), keep.column.data_ptr(), keep.least
            )
        )
    product = _Product(
        segments=(_Segment * len(segments))(*segments),
        count=len(segments),
        M=M,
        N=N,
        keep=words,
        masked=masked,
        bias=pointer(bias),
        add=pointer(add),
        ldadd=0 if add is None else add.stride(0),
        out=out.data_ptr(),
        ldout=out.stride(0),
        output=output,
    )
    kernel = native.kernel("gemm")
    assert kernel is not None
    kernel(ctypes.byref(product), native.threads())
