"""4-bit formats that are a table of 16 values: everything but the table.

Knows tensors and the ops on them; no module, no checkpoint keys. A format is one instance, made in
a file of its own (`nf4.py`).

Parts of a packed weight of n = out * in values, b = block_size:

    weight_packed   uint8   [(n + 1) // 2, 1]      two codes to a byte, the first in the high nibble
    absmax          float32 [ceil(n / b)]          one scale per block; with double quantization
                    uint8   [ceil(n / b)]          an index into the dynamic map
    nested_absmax   float32 [ceil(n / b / 256)]    double only: one scale per 256 scales
    nested_offset   float32 []                     double only: what was subtracted from all scales

Blocks run over the flattened weight and straddle rows where `in` is not a multiple of b.

Double quantization (Dettmers et al. 2023, QLoRA): scales are positive and alike, so their mean is
subtracted and the rest is kept in 8 bits; scale = map[index] * nested_absmax + nested_offset. The
mean is taken in float64 and rounded to float32 once. A float32 mean depends on the number of
threads and the device, and with it every scale; the same weight would then not quantize to the same
bytes twice.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from decal.errors import QuantError
from decal.kernels import ops
from decal.kernels.stored import NESTED_BLOCK_SIZE, Stored
from decal.quant.base import Packed, Recipe, check_weight, times, times_transpose

BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)


@lru_cache(maxsize=16)
def _table(values: tuple[float, ...], device: torch.device) -> Tensor:
    return torch.tensor(values, dtype=torch.float32, device=device)


@lru_cache(maxsize=16)
def nested_map(device: torch.device) -> Tensor:
    """The 256 values of quantized scales, float32 ascending."""
    return ops.dynamic_map(device)


@dataclass(frozen=True)
class CodebookFormat:
    """A 4-bit format: a name and 16 values of at most 1 in magnitude."""

    name: str
    values: tuple[float, ...]
    blocks: bool = True

    def code(self, device: torch.device) -> Tensor:
        """The values as float32 [16]; entry i is what code i stands for."""
        return _table(self.values, device)

    def quantize(self, weight: Tensor, recipe: Recipe) -> Packed:
        """Packs a floating [out, in] weight.

        Raises:
            QuantError: not two-dimensional, empty, not floating, NaN or infinite values, or a
                block size that bitsandbytes does not know.
        """
        check_recipe(recipe)
        check_weight(self.name, weight)
        flat = weight.detach().reshape(-1)
        packed, absmax = ops.quantize_4bit(flat, self.code(flat.device), recipe.block_size)
        parts = {"weight_packed": packed, "absmax": absmax}
        if recipe.double:
            offset = absmax.double().mean().float()
            index, nested = ops.quantize_8bit(
                absmax - offset, nested_map(flat.device), NESTED_BLOCK_SIZE
            )
            parts |= {"absmax": index, "nested_absmax": nested, "nested_offset": offset}
        rows, columns = weight.shape
        return Packed(recipe=recipe, shape=(rows, columns), dtype=weight.dtype, parts=parts)

    def absmax(self, packed: Packed) -> Tensor:
        """float32 [ceil(n / block_size)]: the scales, dequantized if they were quantized."""
        parts = packed.parts
        if not packed.recipe.double:
            return parts["absmax"]
        scales = ops.dequantize_8bit(
            parts["absmax"],
            parts["nested_absmax"],
            nested_map(parts["absmax"].device),
            NESTED_BLOCK_SIZE,
        )
        return scales.add_(parts["nested_offset"])

    def dequantize(self, packed: Packed, dtype: torch.dtype) -> Tensor:
        """The [out, in] weight in `dtype`: one float32 product per value, rounded once."""
        rows, columns = packed.shape
        codes = packed.parts["weight_packed"]
        flat = ops.dequantize_4bit(
            codes,
            self.absmax(packed),
            self.code(codes.device),
            packed.recipe.block_size,
            rows * columns,
            dtype,
        )
        return flat.view(rows, columns)

    def stored(self, packed: Packed) -> Stored:
        """The weight as the products take it; the parts themselves, no copies."""
        parts, double = packed.parts, packed.recipe.double
        codes = parts["weight_packed"]
        return Stored(
            "code4",
            packed.shape,
            codes,
            parts["absmax"],
            nested=parts["nested_absmax"] if double else None,
            offset=parts["nested_offset"] if double else None,
            table=nested_map(codes.device) if double else None,
            code=self.code(codes.device),
            block_size=packed.recipe.block_size,
        )

    def matmul(self, x: Tensor, packed: Packed) -> Tensor:
        """x [..., in] times the weight's transpose -> [..., out] in x's dtype."""
        return times_transpose(x, self.stored(packed))

    def matmul_t(self, grad: Tensor, packed: Packed) -> Tensor:
        """grad [..., out] times the weight -> [..., in] in grad's dtype."""
        return times(grad, self.stored(packed))

    def infer(self, x: Tensor, packed: Packed) -> Tensor:
        """`matmul`: activations are never quantized."""
        return self.matmul(x, packed)

    def part_shapes(
        self, shape: tuple[int, int], recipe: Recipe
    ) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Names, shapes and dtypes of the parts, without any data."""
        n = shape[0] * shape[1]
        scales = -(-n // recipe.block_size)
        parts: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
            "weight_packed": (((n + 1) // 2, 1), torch.uint8),
            "absmax": ((scales,), torch.uint8 if recipe.double else torch.float32),
        }
        if recipe.double:
            parts["nested_absmax"] = ((-(-scales // NESTED_BLOCK_SIZE),), torch.float32)
            parts["nested_offset"] = ((), torch.float32)
        return parts


def check_recipe(recipe: Recipe) -> None:
    """Raises QuantError for a block size that the packed layout does not know."""
    if recipe.block_size not in BLOCK_SIZES:
        raise QuantError(
            f"block size {recipe.block_size} is not one of {', '.join(map(str, BLOCK_SIZES))}"
        )
