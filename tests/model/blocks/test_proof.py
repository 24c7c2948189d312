"""The proof's second stage: layers on which bf16 itself is off by more than any fixed bound."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from decal.kernels import native
from decal.model.blocks import proof
from decal.model.inject import attach
from tests.model.blocks.test_blocks import config, fused
from tests.zoo import build


def large_biases(factor: float) -> Any:
    """As some Qwen2 models have them: attention scores are hundreds."""
    model = build("qwen2", torch.bfloat16)
    with torch.no_grad():
        for layer in model.model.layers:
            for projection in (layer.self_attn.q_proj, layer.self_attn.k_proj):
                projection.bias *= factor
    return model


@pytest.fixture
def seconds(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The adapters that were held against float64."""
    called: list[str] = []
    real = proof._in_float64

    def counted(layer: Any, block: Any, name: str, *rest: Any) -> Any:
        called.append(name)
        return real(layer, block, name, *rest)

    monkeypatch.setattr(proof, "_in_float64", counted)
    return called


@pytest.mark.skipif(native.isa() is None, reason="plain torch rounds too often for such biases")
@pytest.mark.parametrize("factor", [20, 30, 60])
def test_rounding_of_the_layer_itself_is_no_difference(factor: float, seconds: list[str]) -> None:
    """Fails when the first stage alone decides, float64 sees other factors or angles, or every
    single gradient must be as near as the layer's own."""
    model = large_biases(factor)
    attach(model, config())
    assert seconds
    assert fused(model) == [True, True]


@pytest.mark.parametrize("wrong", ["scale", "bias", "all"])
def test_mistakes_show_against_float64(
    wrong: str, seconds: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fails when the second stage grants more than the layer's own rounding."""
    real = proof.run

    def run(plan: Any, x: Tensor) -> Tensor:
        how, (qkv, *rest) = plan.attention, plan.groups
        if wrong == "scale":
            plan = plan._replace(attention=how._replace(scale=1.1 * how.scale))
        if wrong == "bias":
            lines = (qkv.lines[0]._replace(bias=None), *qkv.lines[1:])
            plan = plan._replace(groups=(qkv._replace(lines=lines), *rest))
        y: Tensor = real(plan, x)
        return y + 0.1 * (y - x) if wrong == "all" else y

    monkeypatch.setattr(proof, "run", run)
    model = large_biases(20)
    attach(model, config())
    assert seconds
    assert fused(model) == [False, False]
    assert all("steps differ" in why for why in model.decal_adapters.fused.values())


def test_mistakes_of_bf16_alone_show(seconds: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails when agreement in float64 is enough."""
    real = proof.run

    def run(plan: Any, x: Tensor) -> Tensor:
        y: Tensor = real(plan, x)
        return x + 2 * (y - x) if x.dtype == torch.bfloat16 else y

    monkeypatch.setattr(proof, "run", run)
    model = large_biases(20)
    attach(model, config())
    assert seconds
    assert all("times" in why for why in model.decal_adapters.fused.values())


def test_a_trial_that_fails_is_no_proof(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails when attach raises what a layer raises."""
    model = build("llama")

    def forward(self: Any, x: Tensor, *, mine: int, **kwargs: Any) -> Tensor:
        return x + mine

    monkeypatch.setattr(type(model.model.layers[0]), "forward", forward)
    monkeypatch.setattr("decal.model.inject.probe", lambda *args, **kwargs: [])
    attach(model, config())
    assert fused(model) == [False, False]
    assert "trial failed: TypeError" in model.decal_adapters.fused["model.layers.0"]
