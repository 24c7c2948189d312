"""SwiGLU and its gradient in plain torch: the specification, and the fallback on every device.

Knows tensors only: neither the projections before it nor the one after it.

    h = silu(gate) * up      silu(g) = g * s      s = 1 / (1 + exp(-g))

(Shazeer 2020). All of it is float32 and rounded once. transformers rounds silu(gate) to the dtype
before it multiplies by up; leaving that rounding out is closer to the exact value.

    d_gate = grad * up * (s + silu(g) * (1 - s))      d_up = grad * silu(g)

Backward also returns h, which the gradients of the next projection's adapter need and which is
cheaper to compute again than to keep.
"""

from __future__ import annotations

import torch
from torch import Tensor

from decal.kernels.precision import chunks, wide


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """gate, up [T, F] of one dtype -> silu(gate) * up, [T, F] in it."""
    h = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    for rows in chunks(gate):
        h[rows] = torch.nn.functional.silu(wide(gate[rows])).mul_(up[rows])
    return h


def swiglu_backward(grad: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """grad, gate, up [T, F] of one dtype -> d_gate, d_up and silu(gate) * up, [T, F] in it."""
    found = [torch.empty(gate.shape, dtype=gate.dtype, device=gate.device) for _ in range(3)]
    d_gate, d_up, h = found
    for rows in chunks(gate):
        d, g, u = wide(grad[rows]), wide(gate[rows]), wide(up[rows])
        s = torch.sigmoid(g)
        silu = g * s
        torch.mul(silu, u, out=h[rows])
        torch.mul(d, silu, out=d_up[rows])
        slope = s.addcmul_(silu, 1 - s)
        torch.mul(slope.mul_(u), d, out=d_gate[rows])
    return d_gate, d_up, h
