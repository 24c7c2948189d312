"""attention_flat and its two halves in compiled code: calls of native/attention.cpp.

Takes bf16 tensors on a CPU, without soft cap and sinks; anything else is left to the reference, as
are cu_seq_lens that do not ascend from 0 to T (the kernel trusts them). Rows may lie any distance
apart, so that q, k and v can be views of one fused buffer; other strides are copied.
"""

from __future__ import annotations

import ctypes
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from decal.kernels import native


def attention_flat(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seq_lens: Tensor,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Any:
    """As the reference, differentiable in q, k and v."""
    if softcap is not None or sinks is not None:
        return NotImplemented
    if not _takes("attention_forward", q, k, v, cu_seq_lens, scale, window):
        return NotImplemented
    return _Attention.apply(q, k, v, cu_seq_lens, scale, window)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, edges: Tensor, scale: float, window: int | None
    ) -> Tensor:
        q, k, v = (_by_rows(x) for x in (q, k, v))  # here, so that backward need not copy again
        out, lse = attention_flat_forward(q, k, v, edges, scale, window)
        ctx.save_for_backward(q, k, v, out, lse, edges)
        ctx.scale, ctx.window = scale, window
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse, edges = ctx.saved_tensors
        found = attention_flat_backward(grad, q, k, v, out, lse, edges, ctx.scale, ctx.window)
        return *found, None, None, None


def attention_flat_forward(
    q: Tensor, k: Tensor, v: Tensor, cu_seq_lens: Tensor, scale: float, window: int | None
) -> Any:
    """As the reference."""
    if not _takes("attention_forward", q, k, v, cu_seq_lens, scale, window):
        return NotImplemented
    q, k, v = (_by_rows(x) for x in (q, k, v))
    out = q.new_empty(q.shape[0], q.shape[1], v.shape[2])
    lse = q.new_empty(q.shape[1], q.shape[0], dtype=torch.float32)
    tensors = [native.address(x) for x in (q, k, v, out, lse)]
    _call("attention_forward", tensors, (q, k, v), cu_seq_lens, scale, window)
    return out, lse


def attention_flat_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_seq_lens: Tensor,
    scale: float,
    window: int | None,
) -> Any:
    """As the reference."""
    if not _takes("attention_backward", q, k, v, cu_seq_lens, scale, window):
        return NotImplemented
    if grad.dtype != q.dtype or out.dtype != q.dtype or lse.dtype != torch.float32:
        return NotImplemented
    if not grad.shape == out.shape == (*q.shape[:2], v.shape[2]):
        return NotImplemented
    if lse.shape != (q.shape[1], q.shape[0]) or not (grad.is_cpu and out.is_cpu and lse.is_cpu):
        return NotImplemented
    q, k, v = (_by_rows(x) for x in (q, k, v))
    grad, out, lse = grad.contiguous(), out.contiguous(), lse.contiguous()
    found = tuple(torch.empty(x.shape, dtype=x.dtype, device="cpu") for x in (q, k, v))
    tensors = [native.address(x) for x in (grad, q, k, v, out, lse, *found)]
    _call("attention_backward", tensors, (q, k, v), cu_seq_lens, scale, window)
    return found


def _takes(
    kernel: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seq_lens: Tensor,
    scale: float,
    window: int | None,
) -> bool:
    if any(x.dtype != torch.bfloat16 or not x.is_cpu or x.ndim != 3 for x in (q, k, v)):
        return False
    (T, heads, dim), (_, key_heads, _) = q.shape, k.shape
    fits = k.shape == (T, key_heads, dim) and v.shape[:2] == (T, key_heads)
    if not fits or key_heads < 1 or heads % key_heads:
        return False
    if native.kernel(kernel) is None or scale <= 0 or (window is not None and window < 1):
        return False
    edges = cu_seq_lens.tolist()
    return edges[0] == 0 and edges[-1] == q.shape[0] and all(a <= b for a, b in pairwise(edges))


def _by_rows(x: Tensor) -> Tensor:
    """x [T, h, D], with heads and elements next to each other."""
    return x if x[:1].is_contiguous() else x.contiguous()


def _call(
    name: str,
    tensors: list[ctypes.c_void_p],
    inputs: tuple[Tensor, Tensor, Tensor],
    cu_seq_lens: Tensor,
    scale: float,
    window: int | None,
) -> None:
    q, k, v = inputs
    edges = cu_seq_lens.to("cpu", torch.int64).contiguous()
    sizes = (q.shape[1], k.shape[1], q.shape[2], v.shape[2], *(x.stride(0) for x in inputs))
    shape = (ctypes.c_int64 * 8)(*sizes, q.shape[0] + 1 if window is None else window)
    run = native.kernel(name)
    assert run is not None
    count = ctypes.c_int64(edges.numel() - 1)
    scale_ = ctypes.c_float(scale)
    threads = ctypes.c_int(native.threads())
    run(*tensors, native.address(edges), count, shape, scale_, threads)
