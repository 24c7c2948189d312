"""RMSNorm and its gradient in plain torch: the specification, and the fallback on every device.

Knows tensors only: no module, no residual stream. `ops.py` says which implementation runs.

    n = x / sqrt(mean(x^2) + eps)      y = weight * n

(Zhang and Sennrich 2019). The norm's own arithmetic is float32; n is rounded to x's dtype before
weight multiplies it, as in transformers' LlamaRMSNorm, so bfloat16 rounds twice.

With 1 / sqrt(...) kept as `rstd`, dn = grad * weight and the mean taken over features,

    dx = rstd * (dn - n * mean(dn * n))

The weight's own gradient is left out: norms are frozen where this op is used.
"""

from __future__ import annotations

import torch
from torch import Tensor

from decal.kernels.precision import chunks, wide


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x [T, F], weight [F] -> y [T, F] in the dtype that both promote to, and rstd [T].

    rstd is float32; float64 where x is.
    """
    values = wide(x)
    rstd = torch.rsqrt(values.square().mean(1) + eps)
    return weight * (values * rstd[:, None]).to(x.dtype), rstd


def rms_norm_backward(
    grad: Tensor, x: Tensor, weight: Tensor, rstd: Tensor, add: Tensor | None = None
) -> Tensor:
    """The gradient of x, plus `add`: [T, F] in x's dtype, float32 inside, rounded once.

    Args:
        grad: [T, F], the gradient of y.
        x, weight: as given to `rms_norm`.
        rstd: [T], as `rms_norm` returned it.
        add: [T, F] or None: the gradient that reaches x past the norm.
    """
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    for rows in chunks(x):
        factor = rstd[rows, None]
        normal = wide(x[rows]) * factor
        inner = wide(grad[rows]) * wide(weight)
        inner.addcmul_(normal, (inner * normal).mean(1, keepdim=True), value=-1)
        dx[rows] = inner.mul_(factor) if add is None else inner.mul_(factor).add_(add[rows])
    return dx
