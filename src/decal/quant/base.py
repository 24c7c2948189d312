"""What a quantization format is: a pair of pure functions between a tensor and packed bytes.

Knows no adapters, no models and no checkpoint keys. One file per format stands beside this one;
`quant/__init__.py` holds the registry.

A packed weight never changes after it was made, and its layout in memory is bitsandbytes' layout:
there is no second copy in another order.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor, dtype, float32

from decal.errors import QuantError
from decal.kernels import ops
from decal.kernels.stored import Stored


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What was asked for: enough to quantize the same tensor to the same bytes again."""

    format: str
    """Registry name of the format."""
    block_size: int = 64
    """Weights that share one scale; means nothing to a format without blocks (int8)."""
    double: bool = True
    """Whether the scales are quantized too; means nothing to a format without blocks."""


@dataclass(frozen=True, kw_only=True)
class Packed:
    """One quantized weight.

    `parts` are the tensors that must be stored, by the format's own part names (for 4-bit formats:
    `weight_packed` uint8 [n/2, 1], `absmax`, and with double quantization `nested_absmax`,
    `nested_offset` float32 []; for int8 `CB` and `SCB`). They hold all that varies: the codebooks
    are the format's.
    """

    recipe: Recipe
    shape: tuple[int, int]
    """[out, in] of the weight in logical orientation."""
    dtype: dtype
    """dtype of the weight that was quantized (int8 quantizes float16 only)."""
    parts: dict[str, Tensor]


class QuantFormat(Protocol):
    """One format. All methods are pure."""

    @property
    def name(self) -> str:
        """The registry's name for it."""
        ...

    @property
    def blocks(self) -> bool:
        """Whether a recipe's `block_size` and `double` mean anything."""
        ...

    def quantize(self, weight: Tensor, recipe: Recipe) -> Packed:
        """Packs a [out, in] floating weight; raises QuantError for what it cannot hold."""
        ...

    def dequantize(self, packed: Packed, dtype: dtype) -> Tensor:
        """The [out, in] weight in `dtype`, computed in float32 and rounded once."""
        ...

    def stored(self, packed: Packed) -> Stored:
        """The weight as the products of `kernels/ops.py` take it, without a copy."""
        ...

    def matmul(self, x: Tensor, packed: Packed) -> Tensor:
        """x [..., in] times the weight's transpose -> [..., out], in x's dtype, no gradient."""
        ...

    def matmul_t(self, grad: Tensor, packed: Packed) -> Tensor:
        """grad [..., out] times the weight -> [..., in], in grad's dtype, no gradient."""
        ...

    def infer(self, x: Tensor, packed: Packed) -> Tensor:
        """As `matmul`, in the way the format computes when nothing is trained."""
        ...

    def part_shapes(
        self, shape: tuple[int, int], recipe: Recipe
    ) -> dict[str, tuple[tuple[int, ...], dtype]]:
        """Names, shapes and dtypes of the parts of a weight of `shape`, without any data."""
        ...


def times_transpose(x: Tensor, weight: Stored) -> Tensor:
    """x [..., in] times the transpose of a weight [out, in] -> [..., out] in x's dtype."""
    y = ops.project(x.reshape(-1, x.shape[-1]), weight)
    return y if x.dim() == 2 else y.view(*x.shape[:-1], weight.shape[0])


def times(grad: Tensor, weight: Stored) -> Tensor:
    """grad [..., out] times a weight [out, in] -> [..., in] in grad's dtype."""
    rows = grad.reshape(-1, grad.shape[-1]).contiguous()
    return ops.project_back([(rows, weight)]).view(*grad.shape[:-1], weight.shape[1])


def check_weight(name: str, weight: Tensor, held: dtype = float32) -> None:
    """Raises QuantError unless `weight` is a floating matrix whose values are finite in `held`."""
    shape = list(weight.shape)
    if weight.ndim != 2 or not weight.numel():
        raise QuantError(f"{name} holds weights of two dimensions, this one is {shape}")
    if not weight.is_floating_point():
        raise QuantError(
            f"{name} quantizes floating weights, this one {shape} is {weight.dtype}",
            hint="it may be quantized already",
        )
    low, high = weight.detach().aminmax()
    # The sum of finite limits may overflow, so each is tested by itself.
    if not bool((low.to(held).isfinite() & high.to(held).isfinite()).item()):
        bad = ~weight.detach().to(held).isfinite()
        row, column = bad.nonzero()[0].tolist()
        text = str(held).removeprefix("torch.")
        raise QuantError(
            f"weight {shape} holds {int(bad.sum())} values that are NaN or infinite in {text}",
            details=[f"the first is {float(weight[row, column])} at [{row}, {column}]"],
            hint="the checkpoint is damaged, or was saved in a dtype too small for it",
        )
