"""Fused decoder layers against transformers' own, on real architectures.

transformers computes RMSNorm in float32 also in a float64 model. Where float64 is compared, its norms
are replaced by exact ones, so that equality can be asked to 1e-9.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from decal.adapters import DropoutKey, Routing, current_routing, routed
from decal.config import LoraConfig
from decal.model import attention, switches
from decal.model.blocks import pieces, proof, swap
from decal.model.inject import adapted_layers, attach, detach, disabled, mixed, use
from decal.quant import Recipe
from decal.quant.linear import QuantLinear
from tests.zoo import VOCABULARY, build

FAMILY = ("llama", "mistral", "qwen2", "qwen3")
LENGTHS = (1, 9, 6)
IDS = torch.randint(0, VOCABULARY, (1, sum(LENGTHS)), generator=torch.Generator().manual_seed(1))


def config(**own: Any) -> LoraConfig:
    shared = {"r": 3, "lora_alpha": 7, "lora_dropout": 0.0, "init_lora_weights": False}
    return LoraConfig(**{**shared, **own})


@pytest.fixture
def exact_norms(monkeypatch: pytest.MonkeyPatch) -> None:
    def norm(self: Any, x: Tensor) -> Tensor:
        rstd = torch.rsqrt(x.square().mean(-1, keepdim=True) + self.variance_epsilon)
        return self.weight * (x * rstd)

    for name in FAMILY:
        kind = type(build(name).model.layers[0].input_layernorm)
        monkeypatch.setattr(kind, "forward", norm)


def quantize(model: nn.Module, form: str) -> None:
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is nn.Linear and name != "lm_head":
                setattr(parent, name, QuantLinear.from_linear(child, Recipe(format=form)))


def model_with(
    name: str, config: LoraConfig, dtype: torch.dtype = torch.float64, form: str | None = None
) -> Any:
    model = build(name, dtype)
    if form is not None:
        quantize(model, form)
    attach(model, config, seed=4)
    return model.to(dtype)


def fused(model: Any) -> list[bool]:
    return [not reason for reason in model.decal_adapters.fused.values()]


def dropout_key(p: float) -> DropoutKey | None:
    if not p:
        return None
    ids = torch.cat([torch.full((n,), i) for i, n in enumerate(LENGTHS)])
    positions = torch.cat([torch.arange(n) for n in LENGTHS])
    return DropoutKey(seed=5, epoch=1, sample_ids=ids, positions=positions)


def recompute() -> tuple[Any, Any]:
    routing = current_routing()
    return routed(routing), routed(routing)


def results(
    model: Any,
    *,
    p: float = 0.0,
    checkpointing: bool = False,
    weights: tuple[tuple[str, float], ...] = (("default", 1.0),),
) -> dict[str, Tensor]:
    """Loss, and gradients of the input embeddings and of every trained parameter."""
    embeds = model.get_input_embeddings()(IDS).detach().requires_grad_()
    ends = torch.tensor((0, *LENGTHS)).cumsum(0).to(torch.int32)
    positions = torch.cat([torch.arange(n) for n in LENGTHS])[None]
    kwargs = {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends, "max_length_q": 9, "max_length_k": 9}
    again = switches.checkpointed(model, recompute) if checkpointing else nullcontext()
    model.train()
    model.zero_grad()
    token = attention._FLAT.set(True)
    try:
        with routed(Routing(weights, dropout_key(p))), attention.flat_attention(model), again:
            logits = model(
                inputs_embeds=embeds, position_ids=positions, use_cache=False, **kwargs
            ).logits
            target = torch.linspace(-1, 1, logits.numel()).view(logits.shape).sin()
            loss = (logits * target.to(logits)).sum()
            loss.backward()
    finally:
        attention._FLAT.reset(token)
    found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return {**found, "loss": loss.detach(), "embeddings": embeds.grad}


def unfused(model: Any) -> Any:
    plain = copy.deepcopy(model)
    swap.release(plain)
    return plain


class Calls:
    """Counts the passes through a fused layer."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.count = 0
        self.real = swap.run
        monkeypatch.setattr(swap, "run", self)

    def __call__(self, *args: Any) -> Tensor:
        self.count += 1
        return self.real(*args)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    return Calls(monkeypatch)


def assert_same(found: dict[str, Tensor], wanted: dict[str, Tensor], room: float = 1e-9) -> None:
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        assert found[name].dtype == value.dtype, name
        assert float((found[name] - value).norm()) <= room * float(value.norm()), name


@pytest.mark.usefixtures("exact_norms")
@pytest.mark.parametrize("name", FAMILY)
@pytest.mark.parametrize("form", [None, "nf4"])
@pytest.mark.parametrize("p", [0.0, 0.1])
def test_results_are_the_layers_own(name: str, form: str | None, p: float, calls: Calls) -> None:
    """float64, 1e-9: loss, input and every factor. Fails when the scaling is dropped, a bias or a
    window is forgotten, heads are not normed, k turns with q's angles reversed, 1 / (1 - p) is left
    out, or the residual's gradient is."""
    model = model_with(name, config(lora_dropout=p), form=form)
    assert fused(model) == [True, True]
    found = results(model, p=p)
    assert calls.count == 2
    wanted = results(unfused(model), p=p)
    assert calls.count == 2
    assert_same(found, wanted)
