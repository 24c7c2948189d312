"""Rotary position embedding in plain torch: the specification, and the fallback on every device.

Knows tensors only; the angles are the caller's. `ops.py` says which implementation runs.

Feature i of the first half of a head turns with feature i of the second (Su et al. 2021, in the
layout of transformers' `rotate_half`). With C the width of cos and sin and i < C / 2,

    y[i]         = x[i] * cos[i] - x[i + C/2] * sin[i]
    y[i + C/2]   = x[i + C/2] * cos[i + C/2] + x[i] * sin[i + C/2]

and features from C on stay as they are (partial rotary). The gradient is the transpose, which is
the inverse where cos and sin are those of one angle:

    x[i]         = y[i] * cos[i] + y[i + C/2] * sin[i + C/2]
    x[i + C/2]   = y[i + C/2] * cos[i + C/2] - y[i] * sin[i]

The two halves of cos and sin are not assumed equal. All is float32 and rounded once; transformers
rounds both products and the sum.
"""

from __future__ import annotations

import torch
from torch import Tensor

from decal.kernels.precision import wide


def rotate(
    x: Tensor, cos: Tensor, sin: Tensor, inverse: bool = False, out: Tensor | None = None
) -> Tensor:
    """x turned by its row's angles, or back.

    Args:
        x: [T, h, D]; rows may be strided, as in a view of some heads of [T, all heads, D].
        cos, sin: [T, C], C even and at most D, in any floating dtype.
        inverse: the transpose instead.
        out: [T, h, D] of x's dtype to be written, new and contiguous by default; may be x itself.

    Returns:
        out.
    """
    width = cos.shape[1]
    first, second = wide(x[..., :width]).chunk(2, dim=-1)
    cos_1, cos_2 = wide(cos[:, None]).chunk(2, dim=-1)
    sin_1, sin_2 = wide(sin[:, None]).chunk(2, dim=-1)
    # The first products are what is written to, so a float32 x may also be `out`.
    turned_1, turned_2 = first * cos_1, second * cos_2
    if inverse:
        turned_1.addcmul_(second, sin_2)
        turned_2.addcmul_(first, sin_1, value=-1)
    else:
        turned_1.addcmul_(second, sin_1, value=-1)
        turned_2.addcmul_(first, sin_2)
    if out is None:
        out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if out is not x:
        out[..., width:] = x[..., width:]
    out[..., : width // 2], out[..., width // 2 : width] = turned_1, turned_2
    return out
