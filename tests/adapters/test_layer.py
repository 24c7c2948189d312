from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

from decal.adapters import AdaptedLayer, Lora, Routing, RoutingState, Slot, routed
from decal.config import LoraConfig


def make(*names: str) -> AdaptedLayer:
    layer = AdaptedLayer(nn.Linear(7, 5).double(), RoutingState())
    for i, name in enumerate(names):
        config = LoraConfig(r=2 + i, lora_alpha=3, init_lora_weights=False)
        slot = Slot(module="m", group="m", adapter=name, shape=(5, 7), device=torch.device("cpu"))
        layer.adapters[name] = Lora.create(config, slot, seed=i).double().eval()
    return layer


def delta(layer: AdaptedLayer, name: str, x: torch.Tensor) -> torch.Tensor:
    A, B, scale = layer.adapters[name].low_rank()[:3]
    return scale * x @ A.T @ B.T


def test_the_default_routing_holds_until_a_pass_brings_its_own() -> None:
    """float64, rtol 1e-9. Mutations: ignore the weights; prefer the model's default."""
    layer, x = make("a", "b"), torch.randn(3, 7, dtype=torch.float64)
    base = layer.base_layer(x)
    assert torch.equal(layer(x), base)
    layer.state.routing = Routing((("a", 1.0),))
    torch.testing.assert_close(layer(x), base + delta(layer, "a", x), rtol=1e-9, atol=1e-12)
    mixed = base + 0.7 * delta(layer, "a", x) - 0.3 * delta(layer, "b", x)
    with routed(Routing((("a", 0.7), ("b", -0.3)))):
        torch.testing.assert_close(layer(x), mixed, rtol=1e-9, atol=1e-12)
    with routed(Routing()):
        assert torch.equal(layer(x), base)


def test_adapters_of_other_layers_are_passed_over() -> None:
    layer, x = make("a"), torch.randn(3, 7, dtype=torch.float64)
    with routed(Routing((("elsewhere", 1.0),))):
        assert torch.equal(layer(x), layer.base_layer(x))


def test_repr_shows_base_and_shapes() -> None:
    text = repr(make("default"))
    assert "(base_layer): Linear(in_features=7, out_features=5, bias=True)" in text
    assert "lora_A: [2, 7], lora_B: [5, 2]" in text


def test_weight_and_bias_are_the_bases() -> None:
    layer = make()
    assert layer.weight is layer.base_layer.weight
    assert layer.bias is layer.base_layer.bias
    assert set(layer.state_dict()) == {"base_layer.weight", "base_layer.bias"}


def test_copies_are_independent() -> None:
    """Mutation: keep the routing state in a global."""
    layer, x = make("a"), torch.randn(3, 7, dtype=torch.float64)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        other.state.routing = Routing((("a", 1.0),))
        assert other.base.module is other.base_layer
        assert torch.equal(layer(x), layer.base_layer(x))
        assert not torch.equal(other(x), layer(x))


def test_only_layers_are_wrapped() -> None:
    with pytest.raises(TypeError, match="Dropout is no layer"):
        AdaptedLayer(nn.Dropout(), RoutingState())
