"""Row-wise 8-bit integers in plain torch: the specification, and the fallback on every device.

Knows tensors only: no module, no format, no model. `ops.py` says which implementation runs.

A row of a matrix is stored as int8 codes and one float32 scale, its largest magnitude:

    code = round(value * (127 / absmax))        halves go to the even neighbour
    value = code * absmax / 127                 in float32, rounded once

Both formulas are taken in bitsandbytes' order of operations, so that codes and values are equal bit
for bit. A row of zeros has scale 0 and codes 0.

The integer product is exact. float32 adds whole numbers without error below 2**24, and a product
of two codes is at most 127**2 = 16129, so 1024 of them fit; longer rows are added in pieces, and
the pieces in int32. `torch._int_mm` does the same in one call, but runs scalar code on processors
without 8-bit dot products and refuses many shapes on a GPU.
"""

from __future__ import annotations

import torch
from torch import Tensor

_CHUNK = 1 << 22
"""Values that are float32 at the same time."""
_EXACT = 1024
_PER_STEP = 7.874015718698502e-3
"""1 / 127 as float32."""


def _rows(matrix: Tensor) -> int:
    return max(1, _CHUNK // max(1, matrix.shape[1]))


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """floating [n, k], finite -> int8 [n, k] and float32 absmax [n]; computed in float32."""
    codes = torch.empty(x.shape, dtype=torch.int8, device=x.device)
    absmax = torch.empty(x.shape[0], dtype=torch.float32, device=x.device)
    size = _rows(x)
    for start in range(0, x.shape[0], size):
        part = x[start : start + size].float()
        largest = part.abs().amax(1)
        factor = torch.where(largest > 0, 127.0 / largest, 0.0)
        codes[start : start + size] = (part * factor[:, None]).round_()
        absmax[start : start + size] = largest
    return codes, absmax


def dequantize_rows(codes: Tensor, absmax: Tensor, dtype: torch.dtype) -> Tensor:
    """int8 [n, k], float32 [n] -> [n, k] in `dtype`: float32 products, rounded once."""
    out = torch.empty(codes.shape, dtype=dtype, device=codes.device)
    size = _rows(codes)
    for start in range(0, codes.shape[0], size):
        rows = slice(start, start + size)
        out[rows] = codes[rows] * absmax[rows, None] * _PER_STEP
    return out


def int8_matmul(a: Tensor, b: Tensor) -> Tensor:
    """int8 [n, k] times the transpose of int8 [m, k] -> int32 [n, m], exact."""
    total = torch.zeros(a.shape[0], b.shape[0], dtype=torch.int32, device=a.device)
    for start in range(0, a.shape[1], _EXACT):
        columns = slice(start, start + _EXACT)
        total += torch.matmul(a[:, columns].float(), b[:, columns].float().T).int()
    return total
