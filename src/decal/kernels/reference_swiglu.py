"""SwiGLU and its gradient in plain torch: the specification, and the fallback on every device.

Knows tensors only: neither the projections before it nor the one after it.

    h = silu(gate) * up      silu(g) = g * s      s = 1 / (1 + exp(-g))

(Shazeer 2020). All of it is float32 and rounded once. transformers rounds silu(gate) to the dtype
before it multiplies by up; leaving that rounding out is closer to the exact value.

    d_gate = grad * up * s * (1 + g * (1 - s))      d_up = grad * silu(g)

Backward also returns h, which the gradients of the next projection's adapter need and which is
cheaper to compute again than to keep.
"""

from __future__ import annotations

import torch
from torch import Tensor

from decal.kernels.precision import wide


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """gate, up [T, F] of one dtype -> silu(gate) * up, [T, F] in it."""
    g = wide(gate)
    return (g * torch.sigmoid(g) * wide(up)).to(gate.dtype)


def swiglu_backward(grad: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """grad, gate, up [T, F] of one dtype -> d_gate, d_up and silu(gate) * up, [T, F] in it."""
    d, g, u = wide(grad), wide(gate), wide(up)
    s = torch.sigmoid(g)
    d_gate = d * u * (s * (1 + g * (1 - s)))
    d_up = d * (g * s)
    return d_gate.to(gate.dtype), d_up.to(gate.dtype), (g * s * u).to(gate.dtype)
