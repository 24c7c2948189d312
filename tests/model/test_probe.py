"""The trial pass of attach: models that compute past their adapters are refused, others pass.

The models are real ones whose code was changed in one place, as fused kernels and custom blocks do.
"""

from __future__ import annotations

from collections.abc import Callable
from types import MethodType
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from decal.adapters import Lora
from decal.config import LoraConfig
from decal.errors import AdapterError
from decal.model.adapter import Adapter
from decal.model.inject import adapted_layers, adapters_of, attach, detach
from tests import zoo

NEW = LoraConfig(r=3, lora_alpha=7)
ACTING = LoraConfig(r=3, lora_alpha=7, init_lora_weights=False)


def model(dtype: torch.dtype = torch.float32) -> Any:
    return zoo.build("llama", dtype)


def trained(config: LoraConfig = ACTING, dtype: torch.dtype = torch.float32) -> Adapter:
    """An adapter of the untouched model, its B not zero."""
    healthy = model(dtype)
    attach(healthy, config)
    return Adapter.from_model(healthy)


def around(mlp: Any, x: Tensor) -> Tensor:
    """Reads a weight instead of calling its layer."""
    up = functional.linear(x, mlp.up_proj.weight, mlp.up_proj.bias)
    return mlp.down_proj(mlp.act_fn(mlp.gate_proj(x)) * up)


def dead(mlp: Any, x: Tensor) -> Tensor:
    """Calls a layer and throws its output away."""
    mlp.gate_proj(x)
    return mlp.down_proj(mlp.act_fn(mlp.up_proj(x)))


def cut(mlp: Any, x: Tensor) -> Tensor:
    """Uses a layer without a gradient through it."""
    with torch.no_grad():
        gate = mlp.gate_proj(x)
    return mlp.down_proj(mlp.act_fn(gate) * mlp.up_proj(x))


def changed(how: Callable[[Any, Tensor], Tensor], dtype: torch.dtype = torch.float32) -> Any:
    found = model(dtype)
    mlp = found.model.layers[1].mlp
    mlp.forward = MethodType(how, mlp)
    return found


@pytest.mark.parametrize("name", zoo.ZOO)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_real_architectures_pass_without_a_word(name: str, dtype: torch.dtype) -> None:
    """Fails when the tolerance forgets a dtype's rounding, or a model gets the wrong inputs."""
    found = zoo.build(name, dtype)
    attach(found, ACTING)
    adapter = Adapter.from_model(found)
    detach(found)
    notes = attach(found, adapter).notes
    assert not [note for note in notes if "tried" in note]


@pytest.mark.parametrize("targets", [["embed_tokens", "lm_head"], "all-linear"])
@pytest.mark.parametrize("extra", [{"lora_bias": True}, {"bias": "all"}])
def test_embeddings_heads_and_biases_pass(targets: Any, extra: dict[str, Any]) -> None:
    """Fails when what the factors say leaves out the bias, the gain or the scaling."""
    if "lora_bias" in extra and targets != "all-linear":
        targets = ["lm_head"]
    config = LoraConfig(r=3, lora_alpha=7, target_modules=targets, **extra)
    found = model(torch.bfloat16)
    attach(found, config.model_copy(update={"init_lora_weights": False}))
    with torch.no_grad():
        for parameter in found.parameters():
            if parameter.requires_grad and parameter.ndim == 1:
                parameter.add_(0.3)
    adapter = Adapter.from_model(found)
    assert not attach(model(torch.bfloat16), adapter).notes


@pytest.mark.parametrize("new", [True, False])
def test_a_projection_that_is_never_called_is_named(new: bool) -> None:
    """Fails when nobody counts the calls."""
    found = changed(around)
    with pytest.raises(AdapterError) as error:
        attach(found, NEW if new else trained())
    assert "does not act on 1 of 14 modules" in error.value.message
    assert "model.layers.1.mlp.up_proj: the model goes around it" in error.value.details[0]
    assert not adapters_of(found)
    assert not adapted_layers(found)


def test_an_adapter_that_does_nothing_there_may_stay() -> None:
    """Fails when a B of zeros counts as an effect that is lost."""
    adapter = trained()
    adapter.tensors["model.layers.1.mlp.up_proj"].B.zero_()
    notes = attach(changed(around), adapter).notes
    assert notes == ("not used by a short text, tried apart: model.layers.1.mlp.up_proj",)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_dead_branch_is_named(dtype: torch.dtype) -> None:
    """Fails when being called counts as being used."""
    with pytest.raises(AdapterError) as error:
        attach(changed(dead, dtype), trained(dtype=dtype))
    (line,) = error.value.details
    assert line == "model.layers.1.mlp.gate_proj: its output does not reach the model's result"


def test_a_branch_without_gradient_is_not_dead() -> None:
    """Fails when the autograd graph alone decides."""
    attach(changed(cut), trained())


def test_a_second_reference_is_found() -> None:
    """Fails when only the wrapper is watched, and not the layer under it."""
    found = model()
    mlp = found.model.layers[0].mlp
    kept = [mlp.up_proj]

    def forward(self: Any, x: Tensor) -> Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(x)) * kept[0](x) + self.up_proj(x))

    mlp.forward = MethodType(forward, mlp)
    with pytest.raises(AdapterError, match=r"layers\.0\.mlp\.up_proj: the model calls its base"):
        attach(found, trained())


def test_wrong_arithmetic_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails when outputs are not compared with the factors: here the scaling is lost."""
    adapter, right = trained(), Lora.forward

    def unscaled(self: Lora, *args: Any, **kwargs: Any) -> Tensor:
        self.scale, scale = 1.0, self.scale
        y = right(self, *args, **kwargs)
        self.scale = scale
        return y

    monkeypatch.setattr(Lora, "forward", unscaled)
    with pytest.raises(AdapterError, match="on 14 of 14 modules") as error:
        attach(model(torch.bfloat16), adapter)
    assert "its output moves by 0.43 times what its factors say" in error.value.details[0]


def test_a_replaced_forward_is_found() -> None:
    """Fails when `forward` is watched on the class: an object's own one wins over it."""
    found = model()
    attach(found, NEW, "first")
    layer = adapted_layers(found)["model.layers.0.mlp.up_proj"]
    layer.forward = layer.base_layer.forward  # type: ignore[method-assign]
    with pytest.raises(AdapterError, match="up_proj: its base layer did not run"):
        attach(found, trained(), "second")


class Experts(nn.Module):
    """A mixture that no router makes fair: the first expert takes all."""

    def __init__(self, mlps: list[nn.Module]):
        super().__init__()
        self.experts = nn.ModuleList(mlps)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.experts[0](x)
        return y


def test_experts_that_no_token_chose_are_a_note() -> None:
    """Fails when every module must run on every text; they are tried on random rows."""
    found = model()
    layer = found.model.layers[0]
    layer.mlp = Experts([layer.mlp, model().model.layers[0].mlp])
    notes = attach(found, ACTING).notes
    first = "model.layers.0.mlp.experts.1.gate_proj"
    assert notes == (f"not used by a short text, tried apart: {first} (and 2 more)",)


def test_a_model_that_cannot_run_says_so() -> None:
    """Fails when the model's own error escapes, or is kept silent."""

    def broken(mlp: Any, x: Tensor) -> Tensor:
        raise ValueError("pixels wanted")

    notes = attach(changed(broken), trained()).notes
    assert notes == ("the adapter was not tried in a whole pass: ValueError: pixels wanted",)


def test_the_trial_leaves_no_trace() -> None:
    """Fails when a hook, a forward, a training flag or a gradient stays behind."""
    found = model().train()
    found.model.layers[0].eval()
    flags = {name: module.training for name, module in found.named_modules()}
    state = torch.random.get_rng_state()
    attach(found, ACTING)
    assert torch.equal(torch.random.get_rng_state(), state)
    for module in found.modules():
        assert "forward" not in module.__dict__ or "decal_block" in module.__dict__
        assert not module._forward_hooks
    assert all(parameter.grad is None for parameter in found.parameters())
    detach(found)
    assert {name: module.training for name, module in found.named_modules()} == flags


def test_skeletons_are_passed_over() -> None:
    """Fails when a model without values is run."""
    with torch.device("meta"):
        skeleton = zoo.ZOO["llama"].cls(zoo.ZOO["llama"].config())
    assert attach(skeleton, NEW).names


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rounding_is_no_deviation(dtype: torch.dtype) -> None:
    """Fails when the bound is relative to sums whose terms cancel, as they do at small ranks."""
    found = model(dtype)
    for seed in range(15):
        config = ACTING.model_copy(update={"r": 1 + seed % 2, "lora_alpha": 60.0})
        attach(found, config, seed=seed)
        detach(found)
