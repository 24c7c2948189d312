from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from decal.adapters import BaseLayer, base_view


class Packed(nn.Module):
    """Satisfies BaseLayer by itself."""

    kind, shape, bias = "linear", (3, 5), None

    def weight(self) -> Tensor:
        return torch.ones(3, 5)

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight().T


def test_linear_and_conv1d_read_the_same_way() -> None:
    """Odd shapes. Mutation: leave Conv1D's weight as it is stored."""
    for module in (nn.Linear(5, 7), Conv1D(7, 5)):
        nn.init.normal_(module.bias)
        view = base_view(module)
        assert isinstance(view, BaseLayer)
        assert (view.kind, view.shape) == ("linear", (7, 5))
        x = torch.randn(4, 5)
        torch.testing.assert_close(view.forward(x), x @ view.weight().T + view.bias)


def test_embedding_is_a_map_of_one_hot_rows() -> None:
    view = base_view(nn.Embedding(11, 3))
    assert view is not None
    assert (view.kind, view.shape, view.bias) == ("embedding", (3, 11), None)
    ids = torch.tensor([4, 0])
    one_hot = nn.functional.one_hot(ids, 11).float()
    torch.testing.assert_close(view.forward(ids), one_hot @ view.weight().T)


def test_a_base_layer_is_taken_as_it_is() -> None:
    layer = Packed()
    assert base_view(layer) is layer


def test_what_is_no_layer_is_none() -> None:
    """A linear subclass with packed storage, and a projection nobody calls, among them.

    Mutation: accept every nn.Linear by its class.
    """
    packed = nn.Linear(8, 4)
    packed.weight = nn.Parameter(torch.zeros(16, 1, dtype=torch.uint8), requires_grad=False)
    assert base_view(packed) is None
    assert base_view(nn.MultiheadAttention(4, 2).out_proj) is None
    assert base_view(nn.Dropout()) is None
    assert base_view(nn.LayerNorm(3)) is None


class OwnWords(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = x @ self.weight.T
        return y if self.bias is None else y + self.bias


class Router(nn.Linear):
    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        y = super().forward(x)
        return torch.topk(y, 1)[1], y


def test_a_subclass_that_computes_more_than_the_product_is_no_layer() -> None:
    """Falcon writes the product, Llama 4's router returns a choice. Mutations: accept torch's
    own forward alone; accept every subclass."""
    view = base_view(OwnWords(5, 7))
    assert view is not None
    assert (view.kind, view.shape) == ("linear", (7, 5))
    assert base_view(Router(5, 7)) is None
