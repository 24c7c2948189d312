"""The compiled norm, activation, rotation and loss: one pass over memory each.

The ops of reference_norm.py, reference_swiglu.py, reference_rope.py and reference_loss.py for bf16
and float32 on a CPU, outside of autograd: the blocks that call them have a backward of their own.
Arithmetic is float32 as there; sums run in another order, so results agree to rounding.
"""

from __future__ import annotations

from ctypes import c_float, c_int, c_int64
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from decal.kernels import native
from decal.kernels.reference_loss import IGNORED

_TYPES = (torch.bfloat16, torch.float32)
_ALONE = 1 << 15
"""Elements that one thread handles sooner than a second one wakes up."""


def _taken(*tensors: Tensor) -> bool:
    """Whether a kernel may read these: on the CPU, of one dtype, outside of autograd."""
    dtype = tensors[0].dtype
    recording = torch.is_grad_enabled()
    return dtype in _TYPES and all(
        x.dtype == dtype and x.device.type == "cpu" and not (recording and x.requires_grad)
        for x in tensors
    )


def _alike(*tensors: Tensor) -> bool:
    """Whether all are matrices of one shape."""
    return tensors[0].ndim == 2 and all(x.shape == tensors[0].shape for x in tensors)


def _half(x: Tensor) -> c_int:
    return c_int(x.dtype == torch.bfloat16)


def _sizes(x: Tensor) -> tuple[c_int64, ...]:
    return tuple(c_int64(size) for size in x.shape)


def _threads(x: Tensor) -> c_int:
    return c_int(1 if x.numel() < _ALONE else native.threads())


def _lines(x: Tensor) -> tuple[Any, c_int64, Tensor]:
    """Address and distance of rows without gaps, and what must live on while they are read."""
    x = x if x.stride(1) == 1 else x.contiguous()
    return native.address(x), c_int64(x.stride(0)), x


def _changed(x: Tensor) -> Tensor:
    """x, with autograd told that it was written to."""
    if not x.is_inference():
        increment_version(x)
    return x


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor] | Any:
    """As reference_norm.rms_norm; x and weight of one dtype."""
    run = native.kernel("rms_norm")
    if run is None or not _taken(x, weight) or x.ndim != 2 or weight.shape != x.shape[1:]:
        return NotImplemented
    x, weight = x.contiguous(), weight.contiguous()
    y, rstd = torch.empty_like(x), torch.empty(x.shape[0], dtype=torch.float32, device="cpu")
    run(
        native.address(x),
        native.address(weight),
        _half(x),
        c_float(eps),
        *_sizes(x),
        native.address(y),
        native.address(rstd),
        _threads(x),
    )
    return y, rstd


def rms_norm_backward(
    grad: Tensor, x: Tensor, weight: Tensor, rstd: Tensor, add: Tensor | None = None
) -> Tensor | Any:
    """As reference_norm.rms_norm_backward; all but rstd of one dtype."""
    run = native.kernel("rms_norm_backward")
    rows = [grad, x] if add is None else [grad, x, add]
    if run is None or not _taken(*rows, weight) or not _alike(*rows):
        return NotImplemented
    if weight.shape != x.shape[1:] or rstd.shape != x.shape[:1] or rstd.dtype != torch.float32:
        return NotImplemented
    rows = [part.contiguous() for part in rows]
    weight, rstd = weight.contiguous(), rstd.contiguous()
    dx = torch.empty_like(rows[1])
    run(
        native.address(rows[0]),
        native.address(rows[1]),
        native.address(weight),
        native.address(rstd),
        native.address(rows[2] if add is not None else None),
        _half(x),
        *_sizes(x),
        native.address(dx),
        _threads(x),
    )
    return dx


def swiglu(gate: Tensor, up: Tensor) -> Tensor | Any:
    """As reference_swiglu.swiglu; rows may be strided."""
    run = native.kernel("swiglu")
    if run is None or not _taken(gate, up) or not _alike(gate, up):
        return NotImplemented
    lines = [_lines(gate), _lines(up)]
    out = torch.empty(gate.shape, dtype=gate.dtype, device="cpu")
    read = [part for line in lines for part in line[:2]]
    run(*read, _half(gate), *_sizes(gate), native.address(out), _threads(gate))
    return out


def swiglu_backward(grad: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor, Tensor] | Any:
    """As reference_swiglu.swiglu_backward; rows may be strided."""
    run = native.kernel("swiglu_backward")
    if run is None or not _taken(grad, gate, up) or not _alike(grad, gate, up):
        return NotImplemented
    lines = [_lines(grad), _lines(gate), _lines(up)]
    d_gate, d_up, h = (torch.empty(gate.shape, dtype=gate.dtype, device="cpu") for _ in range(3))
    read = [part for line in lines for part in line[:2]]
    written = [native.address(part) for part in (d_gate, d_up, h)]
    run(*read, _half(gate), *_sizes(gate), *written, _threads(gate))
    return d_gate, d_up, h


def rotate(
    x: Tensor, cos: Tensor, sin: Tensor, inverse: bool = False, out: Tensor | None = None
) -> Tensor | Any:
    """As reference_rope.rotate; rows of x and out may be strided, angles are bf16 or float32."""
    run = native.kernel("rotate")
    if run is None or not _taken(x) or not _taken(cos, sin) or not _alike(cos, sin):
        return NotImplemented
    if x.ndim != 3 or cos.shape[0] != x.shape[0] or cos.shape[1] > x.shape[2] or cos.shape[1] % 2:
        return NotImplemented
    if out is not None and (not _taken(x, out) or out.shape != x.shape or not _dense_heads(out)):
        return NotImplemented
    x = x if _dense_heads(x) else x.contiguous()
    cos, sin = cos.contiguous(), sin.contiguous()
    to = torch.empty(x.shape, dtype=x.dtype, device="cpu") if out is None else out
    run(
        native.address(x),
        c_int64(x.stride(0)),
        _half(x),
        native.address(cos),
        native.address(sin),
        _half(cos),
        c_int(inverse),
        *_sizes(x),
        c_int64(cos.shape[1]),
        native.address(to),
        c_int64(to.stride(0)),
        _threads(x),
    )
    return to if out is None else _changed(to)


def _dense_heads(x: Tensor) -> bool:
    """Whether the heads of a row lie one after the other."""
    return x.stride(2) == 1 and (x.stride(1) == x.shape[2] or x.shape[1] == 1)


def softmax_loss(logits: Tensor, targets: Tensor, gradient: bool) -> Tensor | Any:
    """As reference_loss.softmax_loss; rows may be strided. Targets out of range are left to it."""
    run = native.kernel("softmax_loss")
    if run is None or not _taken(logits) or logits.ndim != 2 or logits.stride(1) != 1:
        return NotImplemented
    if targets.dtype != torch.int64 or targets.shape != logits.shape[:1] or not logits.shape[1]:
        return NotImplemented
    inside = (targets >= 0) & (targets < logits.shape[1]) | (targets == IGNORED)
    if targets.device.type != "cpu" or not inside.all():
        return NotImplemented
    targets = targets.contiguous()
    losses = torch.empty(targets.shape, dtype=torch.float32, device="cpu")
    run(
        native.address(logits),
        c_int64(logits.stride(0)),
        _half(logits),
        native.address(targets),
        *_sizes(logits),
        c_int(gradient),
        native.address(losses),
        _threads(logits),
    )
    if gradient:
        _changed(logits)
    return losses
