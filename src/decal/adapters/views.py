"""Any adaptable module as a `BaseLayer`: logical [out, in], whatever the storage.

Knows no quantized format: a module that satisfies `BaseLayer` by itself (a quantized linear layer
does) is taken as it is. The orientation of transformers' Conv1D, which stores [in, out], ends here.

Recognition is by structure, and strict. A subclass of nn.Linear whose weight does not have the
shape [out, in] (bitsandbytes' packed layers, for example) is no linear layer to us, and neither is
the output projection of nn.MultiheadAttention: its owner reads the weight and never calls forward,
so an adapter on it would silently do nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from decal.adapters.base import BaseLayer


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

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.module(x)
        return y


@dataclass(frozen=True)
class EmbeddingView:
    """nn.Embedding as the linear map of one-hot rows: out = dimensions, in = vocabulary."""

    module: nn.Embedding
    kind: str = "embedding"
    bias: Tensor | None = None

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
        return LinearView(module) if plain and called else None
    if isinstance(module, nn.Embedding):
        return EmbeddingView(module)
    if type(module).__name__ == "Conv1D" and hasattr(module, "nf"):
        return Conv1DView(module)
    if isinstance(module, BaseLayer):
        return module
    return None
