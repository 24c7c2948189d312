"""Any adaptable module as a `BaseLayer`: logical [out, in], whatever the storage.

Knows no quantized format: a module that satisfies `BaseLayer` by itself (a quantized linear layer
does) is taken as it is. The orientation of transformers' Conv1D, which stores [in, out], ends here.

Recognition is by structure, and strict. A subclass of nn.Linear whose weight does not have the
shape [out, in] (bitsandbytes' packed layers, for example) is no linear layer to us, nor one whose
forward computes more than the product (Llama 4's router). Neither is the output projection of
nn.MultiheadAttention: its owner reads the weight and never calls forward, so an adapter on it would
silently do nothing. An embedding that does more in forward than look rows up and scale them
(learned positions with an offset, a norm) is none either, nor one that changes its own weight
(max_norm).
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from decal.adapters.base import BaseLayer
from decal.kernels.stored import Stored

_PRODUCT = {"super", "forward", "weight", "bias", "T", "t", "linear", "F", "nn", "functional"}
"""What a forward that writes x W^T + b in its own words names (Falcon's)."""
_SCALED = {"super", "forward", "embed_scale", "to", "weight", "dtype"}
"""What the forward of a scaled embedding names, in transformers' two ways to write it."""


@dataclass(frozen=True)
class LinearView:
    """nn.Linear."""

    module: nn.Linear
    kind: str = "linear"

    @property
    def shape(self) -> tuple[int, int]:
        return (self.module.out_features, self.module.in_features)

    @property
    def bias(self) -> Tensor | None:
        return self.module.bias

    def weight(self) -> Tensor:
        return self.module.weight

    def stored(self) -> Stored:
        """The weight as the products of `kernels/ops.py` take it; QuantLinear has this too."""
        return Stored("dense", self.shape, self.module.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.module(x)


@dataclass(frozen=True)
class Conv1DView:
    """transformers' Conv1D, which stores its weight as [in, out]."""

    module: Any
    kind: str = "linear"

    @property
    def shape(self) -> tuple[int, int]:
        columns, rows = self.module.weight.shape
        return (rows, columns)

    @property
    def bias(self) -> Tensor | None:
        bias: Tensor | None = self.module.bias
        return bias

    def weight(self) -> Tensor:
        weight: Tensor = self.module.weight
        return weight.t()

    def stored(self) -> Stored:
        return Stored("dense", self.shape, self.module.weight.t())

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.module(x)
        return y


@dataclass(frozen=True)
class EmbeddingView:
    """nn.Embedding as the linear map of one-hot rows: out = dimensions, in = vocabulary.

    A scaled one computes gain * weight[:, id].
    """

    module: nn.Embedding
    kind: str = "embedding"
    bias: Tensor | None = None

    @property
    def padding_idx(self) -> int | None:
        return self.module.padding_idx

    @property
    def gain(self) -> Any:
        """What forward multiplies looked-up rows with: a number, or a tensor of one number."""
        gain = getattr(self.module, "embed_scale", 1.0)
        return gain.to(self.module.weight.dtype) if isinstance(gain, Tensor) else gain

    @property
    def shape(self) -> tuple[int, int]:
        return (self.module.embedding_dim, self.module.num_embeddings)

    def weight(self) -> Tensor:
        return self.module.weight.t()

    def forward(self, x: Tensor) -> Tensor:
        return self.module(x)


def base_view(module: nn.Module) -> BaseLayer | None:
    """The module as a BaseLayer, or None if it is no layer that an adapter can sit on."""
    weight = getattr(module, "weight", None)
    if isinstance(module, nn.Linear):
        plain = weight is not None and tuple(weight.shape) == (
            module.out_features,
            module.in_features,
        )
        called = type(module) is not nn.modules.linear.NonDynamicallyQuantizableLinear
        return LinearView(module) if plain and called and _multiplies(module) else None
    if isinstance(module, nn.Embedding):
        return EmbeddingView(module) if _looks_up(module) else None
    if type(module).__name__ == "Conv1D" and hasattr(module, "nf"):
        return Conv1DView(module)
    if isinstance(module, BaseLayer):
        return module
    return None


def _multiplies(module: nn.Linear) -> bool:
    """Whether forward is torch's own, or names nothing beyond what x W^T + b needs."""
    forward: Any = inspect.unwrap(type(module).forward)
    return forward is nn.Linear.forward or _PRODUCT.issuperset(forward.__code__.co_names)


def _looks_up(module: nn.Embedding) -> bool:
    """Whether forward is torch's own, or torch's own times `embed_scale`.

    The names in the compiled forward tell; the class name would miss other scaled embeddings.
    """
    forward: Any = inspect.unwrap(type(module).forward)
    plain = forward is nn.Embedding.forward or (
        "embed_scale" in forward.__code__.co_names and _SCALED.issuperset(forward.__code__.co_names)
    )
    return plain and module.max_norm is None and not module.scale_grad_by_freq
