"""What a quantization format is: a pair of pure functions between a tensor and packed bytes.

Knows no adapters, no models and no checkpoint keys. One file per format stands beside this one;
`quant/__init__.py` holds the registry.

A packed weight never changes after it was made, and its layout in memory is bitsandbytes' layout:
there is no second copy in another order.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor, dtype


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What was asked for: enough to quantize the same tensor to the same bytes again."""

    format: str
    """Registry name of the format."""
    block_size: int = 64
    """Weights that share one scale."""
    double: bool = True
    """Whether the scales are quantized too."""


@dataclass(frozen=True, kw_only=True)
class Packed:
    """One quantized weight.

    `parts` are the tensors that must be stored, by the format's own part names (for 4-bit formats:
    `weight_packed` uint8 [n/2, 1], `absmax`, and with double quantization `nested_absmax`,
    `nested_offset` float32 []). They hold all that varies: the codebooks are the format's.
    """

    recipe: Recipe
    shape: tuple[int, int]
    """[out, in] of the weight in logical orientation."""
    dtype: dtype
    """dtype of the weight that was quantized."""
    parts: dict[str, Tensor]


class QuantFormat(Protocol):
    """One format. All methods are pure."""

    @property
    def name(self) -> str:
        """The registry's name for it."""
        ...

    def quantize(self, weight: Tensor, recipe: Recipe) -> Packed:
        """Packs a [out, in] floating weight; raises QuantError for what it cannot hold."""
        ...

    def dequantize(self, packed: Packed, dtype: dtype) -> Tensor:
        """The [out, in] weight in `dtype`, computed in float32 and rounded once."""
        ...

    def matmul(self, x: Tensor, packed: Packed) -> Tensor:
        """x [..., in] times the weight's transpose -> [..., out], in x's dtype, no gradient."""
        ...

    def matmul_t(self, grad: Tensor, packed: Packed) -> Tensor:
        """grad [..., out] times the weight -> [..., in], in grad's dtype, no gradient."""
        ...

    def part_shapes(
        self, shape: tuple[int, int], recipe: Recipe
    ) -> dict[str, tuple[tuple[int, ...], dtype]]:
        """Names, shapes and dtypes of the parts of a weight of `shape`, without any data."""
        ...
