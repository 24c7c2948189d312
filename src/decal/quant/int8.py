"""LLM.int8 (Dettmers et al. 2022, arXiv 2208.07339): one scale per row of 8-bit integers.

Knows tensors and the ops on them; no module, no checkpoint keys.

Parts of a packed weight [out, in]:

    CB    int8     [out, in]
    SCB   float32  [out]        the row's largest magnitude; weight = CB * SCB / 127

The weight is rounded to float16 first, as bitsandbytes does, and that is what is quantized:
`Packed.dtype` is float16 whatever came in. There are no blocks and no second level of scales, so
`block_size` and `double` of a recipe mean nothing here; the packed weight's recipe holds their
defaults, so that two recipes that differ in them only give one identity.

Training computes with the dequantized weight, exactly. Inference (`infer`) quantizes the
activations as well, row by row, and multiplies integers. Columns of x in which any value reaches
6.0 keep 16 bits: a few such features carry most of what a large model computes, and one of them in
a row would leave the others a handful of codes. Which columns these are is decided over all rows of
a call, so a row's result depends, within the rounding of 8 bits, on the rows beside it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from decal.kernels import ops
from decal.kernels.stored import Stored
from decal.quant.base import Packed, Recipe, check_weight, times, times_transpose

OUTLIER = 6.0
"""Magnitude of activations from which a column keeps 16 bits."""


@dataclass(frozen=True)
class RowFormat:
    """8-bit integers with one scale per row."""

    name: str
    blocks: bool = False

    def quantize(self, weight: Tensor, recipe: Recipe) -> Packed:
        """Packs a floating [out, in] weight.

        Raises:
            QuantError: not two-dimensional, empty, not floating, or values that are NaN or beyond
                float16.
        """
        check_weight(self.name, weight, torch.float16)
        codes, absmax = ops.quantize_rows(weight.detach().to(torch.float16))
        return Packed(
            recipe=Recipe(format=recipe.format),
            shape=(weight.shape[0], weight.shape[1]),
            dtype=torch.float16,
            parts={"CB": codes, "SCB": absmax},
        )

    def dequantize(self, packed: Packed, dtype: torch.dtype) -> Tensor:
        """The [out, in] weight in `dtype`, computed in float32 and rounded once."""
        return ops.dequantize_rows(packed.parts["CB"], packed.parts["SCB"], dtype)

    def stored(self, packed: Packed) -> Stored:
        """The weight as the products take it; the parts themselves, no copies."""
        return Stored("rows8", packed.shape, packed.parts["CB"], packed.parts["SCB"])

    def matmul(self, x: Tensor, packed: Packed) -> Tensor:
        """x [..., in] times the weight's transpose -> [..., out] in x's dtype."""
        return times_transpose(x, self.stored(packed))

    def matmul_t(self, grad: Tensor, packed: Packed) -> Tensor:
        """grad [..., out] times the weight -> [..., in] in grad's dtype."""
        return times(grad, self.stored(packed))

    def infer(self, x: Tensor, packed: Packed) -> Tensor:
        """x [..., in] -> [..., out] in x's dtype, through 8-bit activations; no gradient."""
        codes, scales = packed.parts["CB"], packed.parts["SCB"]
        rows = x.reshape(-1, packed.shape[1])
        outliers = rows.abs() >= OUTLIER
        columns = outliers.any(0).nonzero().view(-1)
        plain = rows.masked_fill(outliers, 0).to(torch.float16)
        x_codes, x_scales = ops.quantize_rows(plain)
        x_codes[:, columns] = 0
        product = ops.int8_matmul(x_codes, codes)
        y = (product * (x_scales[:, None] * scales) / 127.0**2).to(x.dtype)
        if columns.numel():
            kept = ops.dequantize_rows(codes[:, columns], scales, x.dtype)
            y = torch.addmm(y, rows[:, columns], kept.T)
        return y if x.dim() == 2 else y.view(*x.shape[:-1], packed.shape[0])

    def part_shapes(
        self, shape: tuple[int, int], recipe: Recipe
    ) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Names, shapes and dtypes of the parts, without any data."""
        return {"CB": (shape, torch.int8), "SCB": (shape[:1], torch.float32)}


INT8 = RowFormat(name="int8")
