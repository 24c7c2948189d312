"""project, project_back, into_rank and over_rows in compiled code: calls of native/gemm.cpp.

Takes bf16 tensors on a CPU; anything else is left to the reference. Weights that are not bf16 or
packed are left too: a float32 weight would have to be rounded first.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from decal.kernels import native, native_gemv
from decal.kernels.native_stored import (
    StoredStruct,
    dense_struct,
    is_rows,
    pointer,
    readable,
    stored_struct,
    transposed,
)
from decal.kernels.stored import Keep, Low, Stored

_NOTHING, _AFTER_LEADING, _LEFT, _RIGHT = range(4)
_ROUNDED, _FLOATS, _TRANSPOSED = range(3)


class _Segment(ctypes.Structure):
    _fields_ = (
        ("a", ctypes.c_void_p),
        ("lda", ctypes.c_int64),
        ("k", ctypes.c_int64),
        ("begin", ctypes.c_int64),
        ("end", ctypes.c_int64),
        ("across", ctypes.c_int32),
        ("turned", ctypes.c_int32),
        ("weight", StoredStruct),
    )


class _Keep(ctypes.Structure):
    _fields_ = (
        ("offset", ctypes.c_void_p),
        ("factor", ctypes.c_void_p),
        ("column", ctypes.c_void_p),
        ("least", ctypes.c_void_p),
        ("every", ctypes.c_int64),
    )


class _Product(ctypes.Structure):
    op: str
    """Which made it: benches ask."""
    held: Any
    """What has the memory that it points into."""
    _fields_ = (
        ("segments", ctypes.POINTER(_Segment)),
        ("count", ctypes.c_int32),
        ("leading", ctypes.c_int32),
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
        ("factor", ctypes.c_float),
        ("seconds", ctypes.c_double),
    )


class _How(NamedTuple):
    """What is done to a product beside multiplying."""

    keep: Keep | None = None
    masked: int = _NOTHING
    leading: int = 0
    """Segments that `_AFTER_LEADING` masks."""
    output: int = _ROUNDED
    factor: float = 1.0
    """Of a sum that is left in float32."""


_PLAIN = _How()


class _Waiting(threading.local):
    """Products of the block that this thread is in; None outside."""

    products: list[_Product] | None = None
    compiled = False
    """Whether there is a kernel for them, looked up once for the block."""


_WAITING = _Waiting()


class Together:
    """Inside the block products are put off; at its end they run in one call, in their order.

    For products that follow each other: coming back to Python between them takes longer than some
    of them do. What they read lives until then; only ops may look at what they return before it.
    Of blocks in blocks the outermost counts.
    """

    def __enter__(self) -> None:
        self._outermost = _WAITING.products is None
        if self._outermost:
            _WAITING.products, _WAITING.compiled = [], native.kernel("gemm") is not None

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self._outermost:
            products, _WAITING.products = _WAITING.products, None
            if kind is None and products:
                send(products)


def catch_up() -> None:
    """Runs what has been put off: something that is no product will read it."""
    products = _WAITING.products
    if products:
        _WAITING.products = []
        send(products)


def send(products: list[_Product]) -> None:
    kernel = native.kernel("gemm")
    assert kernel is not None
    addresses = (ctypes.c_void_p * len(products))(*map(ctypes.addressof, products))
    kernel(addresses, ctypes.c_int64(len(products)), native.threads())


def project(
    x: Tensor,
    weight: Stored,
    bias: Tensor | None = None,
    low: Sequence[Low] = (),
    add: Tensor | None = None,
    out: Tensor | None = None,
) -> Any:
    T, (N, K) = x.shape[0], weight.shape
    rows = [(x, (T, K))]
    rows += [(part.factor, (N, part.z.shape[1])) for part in low]
    if add is not None:
        rows.append((add, (T, N)))
    if bias is not None:
        rows.append((bias[None], (1, N)))
    if out is not None:
        rows.append((out, (T, N)))
    if not _takes(rows, [weight]) or not _apart(low, T):
        return NotImplemented
    out = x.new_empty(T, N) if out is None else out
    held, turned = _held(weight)
    whole = low[0] if len(low) == 1 and low[0].z.shape[0] == T else None
    few = not turned and (whole is not None or not low)
    if few and T <= native_gemv.MOST:
        catch_up()
        if native_gemv.multiply(x, held, out, bias, whole, add):
            return out
    segments = [_segment(x, held, across=turned)]
    segments += [_segment(p.z, dense_struct(p.factor), across=False, start=p.start) for p in low]
    _multiply("project", segments, out, (x, weight, low), bias=bias, add=add)
    return out


def project_back(
    parts: Sequence[tuple[Tensor, Stored]],
    low: Sequence[Low] = (),
    keep: Keep | None = None,
) -> Any:
    T, K = parts[0][0].shape[0], parts[0][1].shape[1]
    rows = [(grad, (T, weight.shape[0])) for grad, weight in parts]
    rows += [(part.factor, (part.z.shape[1], K)) for part in low]
    weights = [weight for _, weight in parts]
    if not _takes(rows, weights) or any(weight.shape[1] != K for weight in weights):
        return NotImplemented
    if not _apart(low, T) or not _covers(keep, T, K):
        return NotImplemented
    out = parts[0][0].new_empty(T, K)
    segments = [_segment(p.z, dense_struct(p.factor), across=True, start=p.start) for p in low]
    for grad, weight in parts:
        held, turned = _held(weight)
        segments.append(_segment(grad, held, across=not turned))
    masked = _AFTER_LEADING if low and keep is not None else _NOTHING
    _multiply("project_back", segments, out, (parts, low), _How(keep, masked, len(low)))
    return out


def into_rank(x: Tensor, A: Tensor, keep: Keep | None = None, out: Tensor | None = None) -> Any:
    (T, K), R = x.shape, A.shape[0]
    turned = A.stride(0) == 1 and A.stride(1) != 1
    matrix = (A.t(), (K, R)) if turned else (A, (R, K))
    out = x.new_empty(T, R) if out is None else out
    if not _takes([(x, (T, K)), matrix, (out, (T, R))], []) or not _covers(keep, T, K):
        return NotImplemented
    held = dense_struct(matrix[0])
    if keep is None and not turned and T <= native_gemv.MOST:
        catch_up()
        if native_gemv.multiply(x, held, out):
            return out
    segments = [_segment(x, held, across=turned)]
    masked = _NOTHING if keep is None else _LEFT
    _multiply("into_rank", segments, out, (x, A), _How(keep, masked))
    return out


def over_rows(p: Tensor, q: Tensor, keep: Keep | None = None, scale: float = 1.0) -> Any:
    (T, M), N = p.shape, q.shape[1]
    if not _takes([(p, (T, M)), (q, (T, N))], []) or not _covers(keep, T, N):
        return NotImplemented
    out = p.new_empty(M, N, dtype=torch.float32)
    swapped = M > N and keep is None
    left, right = (q, p) if swapped else (p, q)
    segment = _Segment(
        left.data_ptr(), left.stride(0), T, 0, left.shape[1], 1, 1, dense_struct(right)
    )
    masked = _NOTHING if keep is None else _RIGHT
    output = _TRANSPOSED if swapped else _FLOATS
    how = _How(keep, masked, output=output, factor=scale)
    _multiply("over_rows", [segment], out, (p, q), how)
    return out


def _takes(rows: Sequence[tuple[Tensor, tuple[int, int]]], weights: Sequence[Stored]) -> bool:
    """Whether the library is there and takes these, the matrices with the shapes they must have.

    The kernel trusts every size; what does not fit is left to torch, which says what is wrong.
    """
    waits = _WAITING.products is not None
    if not (_WAITING.compiled if waits else native.kernel("gemm") is not None):
        return False
    return all(is_rows(*pair) for pair in rows) and all(
        readable(weight) or transposed(weight) for weight in weights
    )


def _apart(low: Sequence[Low], rows: int) -> bool:
    """Whether every part has rows of its own among so many, and can be read."""
    end = 0
    for part in sorted(low, key=lambda part: part.start):
        if part.start < end or not is_rows(part.z, (part.z.shape[0], part.z.shape[1])):
            return False
        end = part.start + part.z.shape[0]
    return end <= rows


def _covers(keep: Keep | None, rows: int, features: int) -> bool:
    if keep is None:
        return True
    sizes = ((keep.offset, rows), (keep.factor, rows), (keep.column, features), (keep.least, rows))
    return all(x.is_cpu and x.dtype == torch.int32 and x.shape == (n,) for x, n in sizes) and all(
        x.is_contiguous() for x in (keep.offset, keep.factor, keep.column)
    )


def _held(weight: Stored) -> tuple[StoredStruct, bool]:
    """The weight as it lies in memory, and whether that is as [K, N] (Conv1D's)."""
    turned = transposed(weight)
    return dense_struct(weight.data.t()) if turned else stored_struct(weight), turned


def _segment(a: Tensor, weight: StoredStruct, *, across: bool, start: int = 0) -> _Segment:
    rows, k = a.shape
    return _Segment(a.data_ptr(), a.stride(0), k, start, start + rows, int(across), 0, weight)


def _multiply(
    op: str,
    segments: list[_Segment],
    out: Tensor,
    read: Any,
    how: _How = _PLAIN,
    *,
    bias: Tensor | None = None,
    add: Tensor | None = None,
) -> None:
    M, N = out.shape if how.output != _TRANSPOSED else (out.shape[1], out.shape[0])
    words, keep = None, how.keep
    if keep is not None and how.masked != _NOTHING:
        words = ctypes.pointer(
            _Keep(
                *(x.data_ptr() for x in (keep.offset, keep.factor, keep.column, keep.least)),
                keep.least.stride(0),
            )
        )
    product = _Product(
        segments=(_Segment * len(segments))(*segments),
        count=len(segments),
        leading=how.leading,
        M=M,
        N=N,
        keep=words,
        masked=how.masked,
        bias=pointer(bias),
        add=pointer(add),
        ldadd=0 if add is None else add.stride(0),
        out=out.data_ptr(),
        ldout=out.stride(0),
        output=how.output,
        factor=how.factor,
    )
    product.op, product.held = op, (read, out, keep, bias, add)
    if _WAITING.products is None:
        send([product])
    else:
        _WAITING.products.append(product)
