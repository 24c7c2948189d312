"""The ops by name: their schemas, and which implementation runs.

Knows no modules and no models. Callers use the functions below and never a backend file. A faster
backend is one more entry in `BACKENDS`, before `torch`. The `reference_*.py` files are the
specification: their docstrings say shapes, dtypes and formulas, and every backend agrees with them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from decal.kernels import (
    fused_attention,
    fused_project,
    native,
    native_attention,
    native_dropout,
    native_elementwise,
    native_gemv,
    native_project,
    native_quant,
    reference_attention,
    reference_dropout,
    reference_int8,
    reference_loss,
    reference_norm,
    reference_project,
    reference_quant,
    reference_rope,
    reference_swiglu,
)
from decal.kernels.stored import Keep, Low, Stored


class Choice(NamedTuple):
    """Which backend runs an op, and why."""

    backend: str
    reason: str


BACKENDS: dict[str, dict[str, Callable[..., Any]]] = {
    "quantize_4bit": {"native": native_quant.quantize_4bit, "torch": reference_quant.quantize_4bit},
    "dequantize_4bit": {
        "native": native_quant.dequantize_4bit,
        "torch": reference_quant.dequantize_4bit,
    },
    "dynamic_map": {"torch": reference_quant.dynamic_map},
    "quantize_8bit": {"native": native_quant.quantize_8bit, "torch": reference_quant.quantize_8bit},
    "dequantize_8bit": {
        "native": native_quant.dequantize_8bit,
        "torch": reference_quant.dequantize_8bit,
    },
    "quantize_rows": {"native": native_quant.quantize_rows, "torch": reference_int8.quantize_rows},
    "dequantize_rows": {
        "native": native_quant.dequantize_rows,
        "torch": reference_int8.dequantize_rows,
    },
    "int8_matmul": {"torch": reference_int8.int8_matmul},
    "dropout_keep": {
        "native": native_dropout.dropout_keep,
        "torch": reference_dropout.dropout_keep,
    },
    "project": {
        "native": native_project.project,
        "torch fused": fused_project.project,
        "torch": reference_project.project,
    },
    "project_adapted": {
        "native": native_gemv.project_adapted,
        "torch": reference_project.project_adapted,
    },
    "project_back": {
        "native": native_project.project_back,
        "torch fused": fused_project.project_back,
        "torch": reference_project.project_back,
    },
    "into_rank": {
        "native": native_project.into_rank,
        "torch fused": fused_project.into_rank,
        "torch": reference_project.into_rank,
    },
    "over_rows": {
        "native": native_project.over_rows,
        "torch fused": fused_project.over_rows,
        "torch": reference_project.over_rows,
    },
    "rms_norm": {"native": native_elementwise.rms_norm, "torch": reference_norm.rms_norm},
    "rms_norm_backward": {
        "native": native_elementwise.rms_norm_backward,
        "torch": reference_norm.rms_norm_backward,
    },
    "swiglu": {"native": native_elementwise.swiglu, "torch": reference_swiglu.swiglu},
    "swiglu_backward": {
        "native": native_elementwise.swiglu_backward,
        "torch": reference_swiglu.swiglu_backward,
    },
    "rotate": {"native": native_elementwise.rotate, "torch": reference_rope.rotate},
    "softmax_loss": {
        "native": native_elementwise.softmax_loss,
        "torch": reference_loss.softmax_loss,
    },
    "attention_flat": {
        "native": native_attention.attention_flat,
        "torch": reference_attention.attention_flat,
    },
    "attention_flat_forward": {
        "native": native_attention.attention_flat_forward,
        "torch fused": fused_attention.attention_flat_forward,
        "torch": reference_attention.attention_flat_forward,
    },
    "attention_flat_backward": {
        "native": native_attention.attention_flat_backward,
        "torch fused": fused_attention.attention_flat_backward,
        "torch": reference_attention.attention_flat_backward,
    },
    "attention_masked": {"torch": reference_attention.attention_masked},
}
"""Implementations of each op by backend, the preferred one first."""


together = native_project.Together
"""A context in which compiled products are put off to its end."""
_PRODUCTS = frozenset(("project", "project_back", "into_rank", "over_rows"))
"""Ops that may be put off."""


def _run(op: str, *args: Any) -> Any:
    """The answer of the first backend that takes these arguments; `torch` takes all."""
    for name, backend in BACKENDS[op].items():
        if name != "native" or op not in _PRODUCTS:
            native_project.catch_up()
        found = backend(*args)
        if found is not NotImplemented:
            return found
    raise TypeError(f"no backend takes the arguments of {op}")


def explain() -> dict[str, Choice]:
    """For every op the backend that is asked first, and why.

    A compiled op leaves to torch what it does not take: other devices and dtypes.
    """
    found, reason = native.isa(), native.why()
    absent = f"no compiled kernels: {reason}; training is several times slower"
    choices = {}
    for op, backends in BACKENDS.items():
        if "native" not in backends:
            choices[op] = Choice("torch", "the only implementation")
        else:
            choices[op] = Choice("native", reason) if found else Choice("torch", absent)
    return choices


def quantize_4bit(x: Tensor, code: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    """x [n], code float32 [16] -> uint8 [(n + 1) // 2, 1], float32 absmax [blocks]."""
    return _run("quantize_4bit", x, code, block_size)


def dequantize_4bit(
    packed: Tensor, absmax: Tensor, code: Tensor, block_size: int, n: int, dtype: torch.dtype
) -> Tensor:
    """Packed codes and float32 scales -> [n] in `dtype`, one float32 product rounded once."""
    return _run("dequantize_4bit", packed, absmax, code, block_size, n, dtype)


def dynamic_map(device: torch.device | str = "cpu") -> Tensor:
    """float32 [256], ascending: the signed dynamic 8-bit code."""
    return _run("dynamic_map", device)


def quantize_8bit(x: Tensor, code: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    """x [n], code float32 [256] ascending -> uint8 [n], float32 absmax [blocks]."""
    return _run("quantize_8bit", x, code, block_size)


def dequantize_8bit(index: Tensor, absmax: Tensor, code: Tensor, block_size: int) -> Tensor:
    """uint8 [n] and float32 scales -> float32 [n]."""
    return _run("dequantize_8bit", index, absmax, code, block_size)


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """x [n, k] -> int8 [n, k], float32 absmax [n]."""
    return _run("quantize_rows", x)


def dequantize_rows(codes: Tensor, absmax: Tensor, dtype: torch.dtype) -> Tensor:
    """int8 [n, k] and float32 scales [n] -> [n, k] in `dtype`."""
    return _run("dequantize_rows", codes, absmax, dtype)


def int8_matmul(a: Tensor, b: Tensor) -> Tensor:
    """int8 [n, k] times the transpose of int8 [m, k] -> int32 [n, m], exact."""
    return _run("int8_matmul", a, b)


def dropout_keep(
    seed: int,
    epoch: int,
    adapter: int,
    input: int,
    sample_ids: Tensor,
    positions: Tensor,
    features: int,
    p: float,
) -> Tensor:
    """int64 [T] ids and positions -> bool [T, features], true with probability 1 - p."""
    args = (seed, epoch, adapter, input, sample_ids, positions, features, p)
    return _run("dropout_keep", *args)


def project(
    x: Tensor,
    weight: Stored,
    bias: Tensor | None = None,
    low: Sequence[Low] = (),
    add: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """x [T, K] -> x W^T + bias + z B^T + add, [T, N], in `out` if given; low: z [n, r], B [N, r].

    Takes no part in autograd.
    """
    return _run("project", x, weight, bias, low, add, out)


def project_adapted(
    x: Tensor, weight: Stored, bias: Tensor | None, A: Tensor, B: Tensor, scale: float
) -> Tensor:
    """x [T, K] -> x W^T + bias + (x A^T) (scale B)^T, [T, N], for masters A, B. No gradient."""
    return _run("project_adapted", x, weight, bias, A, B, scale)


def project_back(
    parts: Sequence[tuple[Tensor, Stored]],
    low: Sequence[Low] = (),
    keep: Keep | None = None,
) -> Tensor:
    """Pairs (g [T, N], W [N, K]) -> sum g W + keep . (dz A), [T, K]; low: dz [n, R], A [R, K]."""
    return _run("project_back", parts, low, keep)


def into_rank(x: Tensor, A: Tensor, keep: Keep | None = None, out: Tensor | None = None) -> Tensor:
    """x [T, K], A [R, K] -> (keep . x) A^T, [T, R], in `out` if given."""
    return _run("into_rank", x, A, keep, out)


def over_rows(p: Tensor, q: Tensor, keep: Keep | None = None, scale: float = 1.0) -> Tensor:
    """p [T, M], q [T, N] -> scale * p^T (keep . q), [M, N], float32 (float64 of float64)."""
    return _run("over_rows", p, q, keep, scale)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x [T, F], weight [F] -> weight * x / sqrt(mean(x^2) + eps) and that 1 / sqrt, [T]."""
    return _run("rms_norm", x, weight, eps)


def rms_norm_backward(
    grad: Tensor, x: Tensor, weight: Tensor, rstd: Tensor, add: Tensor | None = None
) -> Tensor:
    """The gradient of `rms_norm`'s x from that of its y, [T, F], plus `add`."""
    return _run("rms_norm_backward", grad, x, weight, rstd, add)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """gate, up [T, F] -> silu(gate) * up."""
    return _run("swiglu", gate, up)


def swiglu_backward(grad: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """grad, gate, up [T, F] -> the gradients of gate and up, and silu(gate) * up again."""
    return _run("swiglu_backward", grad, gate, up)


def rotate(
    x: Tensor, cos: Tensor, sin: Tensor, inverse: bool = False, out: Tensor | None = None
) -> Tensor:
    """x [T, h, D], cos and sin [T, C <= D] -> x turned, or turned back; `out` may be x."""
    return _run("rotate", x, cos, sin, inverse, out)


def softmax_loss(logits: Tensor, targets: Tensor, gradient: bool) -> Tensor:
    """logits [T, V], int64 targets [T] -> losses [T]; logits may become their own gradient."""
    return _run("softmax_loss", logits, targets, gradient)


def attention_flat(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seq_lens: Tensor,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """q [T, Hq, D], k [T, Hk, D], v [T, Hk, Dv] -> [T, Hq, Dv], causal inside each sequence."""
    return _run("attention_flat", q, k, v, cu_seq_lens, scale, window, softcap, sinks)


def attention_flat_forward(
    q: Tensor, k: Tensor, v: Tensor, cu_seq_lens: Tensor, scale: float, window: int | None = None
) -> tuple[Tensor, Tensor]:
    """`attention_flat` without autograd -> [T, Hq, Dv], float32 log-sum-exp [Hq, T]."""
    return _run("attention_flat_forward", q, k, v, cu_seq_lens, scale, window)


def attention_flat_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_seq_lens: Tensor,
    scale: float,
    window: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of q, k and v from that of `out`; out and lse as the forward op gave them."""
    args = (grad, q, k, v, out, lse, cu_seq_lens, scale, window)
    return _run("attention_flat_backward", *args)


def attention_masked(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    visible: Tensor,
    scale: float,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """q [n, Hq, S, D], k [n, Hk, L, D], v [n, Hk, L, Dv] -> [n, Hq, S, Dv], where visible."""
    return _run("attention_masked", q, k, v, visible, scale, softcap, sinks)
