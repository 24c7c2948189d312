"""QuantLinear: a frozen linear layer whose weight stays packed.

Knows formats and torch modules; no adapters, no models, no files.

The matmul is one autograd function. It saves no tensor at all: a frozen weight needs no dW, so x is
not needed, and dX = dY W takes only the packed parts, which never change after loading. They are
held by reference, not through `save_for_backward`: saved-tensor hooks (offloading, checkpointing)
would otherwise copy the base once per layer call. What autograd's own check would catch, a part
written to between forward and backward, is checked here instead.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from decal.errors import QuantError
from decal.kernels.stored import Stored
from decal.quant import quant_format
from decal.quant.base import Packed, Recipe


def _versions(packed: Packed) -> tuple[int, ...]:
    return tuple(part._version for part in packed.parts.values())


class _QuantMatmul(torch.autograd.Function):
    """y = x W^T + bias for a packed W; dX = dY W; no gradient for W."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, packed: Packed) -> Tensor:  # type: ignore[override]
        ctx.packed, ctx.versions = packed, _versions(packed)
        ctx.bias_dtype = None if bias is None else bias.dtype
        y = quant_format(packed.recipe.format).matmul(x, packed)
        return y if bias is None else y.add_(bias.to(y.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        packed: Packed = ctx.packed
        if _versions(packed) != ctx.versions:
            raise RuntimeError("a packed weight was written to between forward and backward")
        grad_x = grad_bias = None
        if ctx.needs_input_grad[0]:
            grad_x = quant_format(packed.recipe.format).matmul_t(grad, packed)
        if ctx.needs_input_grad[1]:
            grad_bias = grad.flatten(0, -2).sum(0).to(ctx.bias_dtype)
        return grad_x, grad_bias, None


class QuantLinear(nn.Module):
    """A linear layer over a packed weight, a `BaseLayer` of kind "linear".

    The parts are parameters without gradient under the format's part names. `.to()`, `.half()`
    and the like move them between devices but never cast them; they change `compute_dtype` and the
    bias only.

    `transposed_source` says that the layer stands for one whose files hold [in, out] (GPT-2's
    Conv1D). The packed weight is [out, in] all the same; PEFT's `fan_in_fan_out` needs to know.
    """

    kind = "linear"

    def __init__(
        self,
        packed: Packed,
        bias: Tensor | None,
        compute_dtype: torch.dtype,
        *,
        transposed_source: bool = False,
    ):
        """Takes over `packed` and `bias` [out] as they are; `compute_dtype` is weight()'s."""
        super().__init__()
        self.transposed_source = transposed_source
        self.recipe = packed.recipe
        self.shape = packed.shape
        self.out_features, self.in_features = packed.shape
        self.source_dtype = packed.dtype
        self.compute_dtype = compute_dtype
        self.part_names = tuple(packed.parts)
        for name, part in packed.parts.items():
            self.register_parameter(name, nn.Parameter(part, requires_grad=False))
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)

    @classmethod
    def from_linear(cls, linear: nn.Linear, recipe: Recipe) -> QuantLinear:
        """Quantizes one layer; the bias is kept as it is. Raises QuantError."""
        packed = quant_format(recipe.format).quantize(linear.weight, recipe)
        bias = None if linear.bias is None else linear.bias.detach()
        return cls(packed, bias, linear.weight.dtype)

    @classmethod
    def empty(
        cls,
        in_features: int,
        out_features: int,
        bias: bool,
        recipe: Recipe,
        dtype: torch.dtype,
        device: torch.device | str = "meta",
    ) -> QuantLinear:
        """A layer of the right shapes without values, to be filled from a state dict."""
        shape = (out_features, in_features)
        shapes = quant_format(recipe.format).part_shapes(shape, recipe)
        parts = {k: torch.empty(s, dtype=d, device=device) for k, (s, d) in shapes.items()}
        packed = Packed(recipe=recipe, shape=shape, dtype=dtype, parts=parts)
        values = torch.empty(out_features, dtype=dtype, device=device) if bias else None
        return cls(packed, values, dtype)

    @property
    def packed(self) -> Packed:
        """The packed weight; its parts are this layer's parameters, not copies."""
        parts: dict[str, Tensor] = {name: getattr(self, name) for name in self.part_names}
        return Packed(recipe=self.recipe, shape=self.shape, dtype=self.source_dtype, parts=parts)

    @property
    def nbytes(self) -> int:
        """Bytes of all parts, the bias apart."""
        return sum(part.nbytes for part in self.packed.parts.values())

    def weight(self) -> Tensor:
        """The dequantized [out, in] weight in `compute_dtype`."""
        return quant_format(self.recipe.format).dequantize(self.packed, self.compute_dtype)

    def stored(self) -> Stored:
        """The packed weight as the products of `kernels/ops.py` take it, no copy."""
        return quant_format(self.recipe.format).stored(self.packed)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] -> [..., out], computed in x's dtype.

        In training, or where a gradient is needed, the product is that with `weight()`; else it is
        the format's own for inference, which for int8 quantizes x too.
        """
        kind = x.device.type
        if x.dtype == torch.float32 and torch.is_autocast_enabled(kind):
            x = x.to(torch.get_autocast_dtype(kind))
        rows = x.reshape(-1, x.shape[-1])
        if self.training or (torch.is_grad_enabled() and self._needs_grad(x)):
            y = _QuantMatmul.apply(rows, self.bias, self.packed)
        else:
            with torch.no_grad():
                y = quant_format(self.recipe.format).infer(rows, self.packed)
                y = y if self.bias is None else y.add_(self.bias.to(y.dtype))
        # Here, not where the product is: autograd lets models add to this view in place.
        return y if x.dim() == 2 else y.view(*x.shape[:-1], y.shape[-1])

    def _needs_grad(self, x: Tensor) -> bool:
        return x.requires_grad or (self.bias is not None and self.bias.requires_grad)

    def to_linear(self, dtype: torch.dtype) -> nn.Linear:
        """An ordinary layer with the dequantized weight in `dtype`."""
        weight = quant_format(self.recipe.format).dequantize(self.packed, dtype)
        with torch.device("meta"):
            linear = nn.Linear(self.in_features, self.out_features, bias=self.bias is not None)
        linear.weight = nn.Parameter(weight, requires_grad=False)
        if self.bias is not None:
            linear.bias = nn.Parameter(self.bias.detach().to(dtype), requires_grad=False)
        return linear

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, format={self.recipe.format}, "
            f"block_size={self.recipe.block_size}, double={self.recipe.double}"
        )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantLinear:
        parts = list(self.packed.parts.values())

        def moved(tensor: Tensor) -> Tensor:
            new = fn(tensor)
            if new.dtype != tensor.dtype and any(tensor is part for part in parts):
                return tensor.to(new.device)
            return new

        # What fn does to a dtype shows on an empty tensor; the layer may have no bias to ask.
        dtype = fn(torch.empty(0, dtype=self.compute_dtype)).dtype
        super()._apply(moved, recurse)
        self.compute_dtype = dtype
        return self

    def _load_from_state_dict(  # type: ignore[override]
        self, state_dict: dict[str, Tensor], prefix: str, *args: Any
    ) -> None:
        """As torch's, but a part of another dtype is refused: copying would cast codes."""
        for name in self.part_names:
            given, held = state_dict.get(prefix + name), getattr(self, name)
            if given is not None and given.dtype != held.dtype:
                raise QuantError(
                    f"`{prefix}{name}` is {given.dtype} in the state dict, the layer holds "
                    f"{held.dtype}",
                    hint="the weight was quantized with another recipe",
                )
        super()._load_from_state_dict(state_dict, prefix, *args)
