"""Every setting of LoRA on real architectures: what it puts on, what it refuses, what it leaves."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from decal.adapters import AdaptedLayer, ReplacedModule
from decal.config import LoraConfig
from decal.errors import AdapterError, TargetError
from decal.model.adapter import Adapter
from decal.model.inject import (
    adapter_state,
    attach,
    detach,
    full_state,
    load_state,
    replaced_modules,
    trainable_parameters,
)
from decal.quant.base import Recipe
from decal.quant.linear import QuantLinear
from tests.model.test_inject import snapshot
from tests.zoo import VOCABULARY, build

IDS = torch.randint(3, VOCABULARY, (2, 9), generator=torch.Generator().manual_seed(2))
LORA: dict[str, Any] = {"r": 3, "lora_alpha": 5, "lora_dropout": 0.0, "init_lora_weights": False}
QV = ("q_proj", "v_proj")
OPTIONS: dict[str, tuple[str, dict[str, Any]]] = {
    "patterns": ("llama", {"rank_pattern": {"q_proj": 5}, "alpha_pattern": {"v_proj": 9}}),
    "embedding": ("gemma3", {"target_modules": ("q_proj", "embed_tokens", "lm_head")}),
    "head": ("llama", {"modules_to_save": ("lm_head", "embed_tokens")}),
    "norms": ("qwen2", {"modules_to_save": ("norm",), "bias": "all", "lora_bias": True}),
    "biases": ("gpt2", {"target_modules": ("c_attn",), "bias": "all"}),
    "classifier": ("roberta", {"target_modules": ("query",), "modules_to_save": ("classifier",)}),
    "biases of bert": ("bert", {"target_modules": ("query",), "bias": "all"}),
}


def config(**options: Any) -> LoraConfig:
    return LoraConfig(**{**LORA, "target_modules": QV, **options})


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(IDS).logits
    return found


def disturb(model: Any, seed: int = 1) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.2 * torch.randn(parameter.shape, generator=generator)


def quantized(model: Any) -> Any:
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and name != "lm_head":
            layer = QuantLinear.from_linear(module, Recipe(format="nf4"))
            model.set_submodule(name, layer.train(module.training))
    return model


@pytest.mark.parametrize("option", OPTIONS)
def test_attach_counts_trains_and_leaves_without_a_trace(option: str) -> None:
    """Bytes, objects, flags. Mutations: write a bias into the base; forget a wrapper in detach;
    count a shared bias twice."""
    name, options = OPTIONS[option]
    model = build(name)
    list(model.modules())[3].train()
    before, base = snapshot(model), logits(model)
    found = attach(model, config(**options))
    assert trainable_parameters(model)[0] == found.parameters
    disturb(model)
    assert not torch.equal(logits(model), base)
    model(IDS).logits.sum().backward()
    own = [p for p in model.parameters() if p.requires_grad]
    assert all(p.grad is not None for p in own)
    assert all(p.dtype == torch.float32 for p in own)
    detach(model)
    after = snapshot(model)
    torch.testing.assert_close(after.pop("bytes"), before.pop("bytes"), rtol=0, atol=0)
    assert after == before
    assert torch.equal(logits(model), base)
    assert not any(isinstance(m, AdaptedLayer | ReplacedModule) for m in model.modules())


@pytest.mark.parametrize("option", OPTIONS)
def test_a_fresh_adapter_starts_from_the_base(option: str) -> None:
    """To the bit: whole parameters start as the base's. Mutation: start a head anew."""
    name, options = OPTIONS[option]
    model = build(name)
    base = logits(model)
    attach(model, config(**{**options, "init_lora_weights": True}))
    assert torch.equal(logits(model), base)


@pytest.mark.parametrize("option", OPTIONS)
def test_copies_and_casts_keep_the_adapter(option: str) -> None:
    """A deep copy is independent; masters stay float32 when the model is cast.

    Mutations: let places point at the first model; cast masters with `.bfloat16()`.
    """
    name, options = OPTIONS[option]
    model = build(name)
    attach(model, config(**options))
    want = logits(model)
    other = copy.deepcopy(model)
    disturb(other)
    assert torch.equal(logits(model), want)
    assert not torch.equal(logits(other), want)
    masters = {n: p.clone() for n, p in other.named_parameters() if p.requires_grad}
    other.bfloat16()
    assert logits(other).dtype == torch.bfloat16
    for key, parameter in other.named_parameters():
        assert key not in masters or torch.equal(parameter, masters[key])
    other(IDS).logits.float().sum().backward()
    assert all(p.grad.dtype == torch.float32 for p in other.parameters() if p.requires_grad)
    detach(other)
    detach(model)


def test_embeddings_heads_and_biases_on_a_quantized_base() -> None:
    """NF4 layers with biases of their own. Mutation: look for a bias on nn.Linear only."""
    model = quantized(build("qwen2").bfloat16())
    base = logits(model)
    found = attach(
        model,
        config(
            target_modules=("q_proj", "down_proj", "embed_tokens"),
            bias="all",
            modules_to_save=("lm_head",),
        ),
    )
    assert trainable_parameters(model)[0] == found.parameters
    assert "model.layers.0.self_attn.q_proj.bias" in full_state(model)
    assert "model.layers.0.self_attn.k_proj.bias" in replaced_names(model)
    disturb(model)
    model(IDS).logits.float().sum().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    detach(model)
    assert torch.equal(logits(model), base)


def replaced_names(model: Any) -> set[str]:
    return {n for n in full_state(model) if n.rpartition(".")[0] in replaced_modules(model)}


def test_the_halves_of_a_tied_pair_are_adapted_apart() -> None:
    """F5, F6. Mutation: adapt what both share."""
    for target, other in (("lm_head", "embed_tokens"), ("embed_tokens", "lm_head")):
        model = build("llama")
        attach(model, config(target_modules=(target,)))
        assert [n.rpartition(".")[2] for n in adapter_state(model)] == [target]
        layer = model.get_submodule("lm_head" if other == "lm_head" else "model.embed_tokens")
        assert not isinstance(layer, AdaptedLayer)
        assert model.lm_head.weight is model.model.embed_tokens.weight
        adapter = Adapter.from_model(model)
        assert adapter.embeddings == (
            {"model.embed_tokens"} if target == "embed_tokens" else frozenset()
        )
        assert adapter.parameters == 3 * (VOCABULARY + 54)


@pytest.mark.parametrize(
    ("name", "options", "text"),
    [
        (
            "llama",
            {"target_modules": ("lm_head",), "modules_to_save": ("layers",)},
            "ModuleList, is never called itself",
        ),
        ("llama", {"modules_to_save": ("act_fn",)}, "has no parameters"),
        ("llama", {"lora_bias": True, "target_modules": ("embed_tokens",)}, "lora_bias cannot"),
        ("gpt2", {"target_modules": ("act",)}, "which is a"),
    ],
)
def test_what_cannot_be_trained_is_refused(name: str, options: dict[str, Any], text: str) -> None:
    model = build(name)
    before = snapshot(model)
    with pytest.raises(TargetError, match=text):
        attach(model, config(**options))
    after = snapshot(model)
    torch.testing.assert_close(after.pop("bytes"), before.pop("bytes"), rtol=0, atol=0)
    assert after == before


def test_quantized_modules_cannot_be_saved() -> None:
    """Mutation: copy the codes as if they were weights."""
    model = quantized(build("llama"))
    with pytest.raises(TargetError, match="1 of 2 modules_to_save cannot be") as caught:
        attach(model, config(modules_to_save=("model.norm", "layers.0.mlp")))
    assert "model.layers.0.mlp, a LlamaMLP, is quantized" in str(caught.value)
    assert "quant.skip_modules" in str(caught.value.hint)


def test_running_statistics_stay_the_bases() -> None:
    model = nn.Sequential()
    model.body, model.head = nn.Linear(5, 4), nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 3))
    with pytest.raises(TargetError, match="running statistics"):
        attach(model, LoraConfig(target_modules=("body",), modules_to_save=("head",)))


@pytest.mark.parametrize(("bias", "which"), [("lora_only", "target modules"), ("all", "modules")])
def test_biases_that_are_not_there_are_said(bias: str, which: str) -> None:
    """Tutorials set lora_only on models without biases, and nothing happens."""
    found = attach(build("qwen3"), config(bias=bias))
    assert found.notes == (f"bias: {bias} trains nothing: the {which} have no biases",)
    assert attach(build("llama"), config(bias=bias)).notes == ()


def test_whole_parameters_are_loaded_strictly() -> None:
    """Mutation: skip names that are not the adapter's."""
    model = build("llama")
    attach(model, config(modules_to_save=("model.norm",), bias="lora_only", lora_bias=True))
    state = adapter_state(model)
    full = {n: p.detach() + 1 for n, p in full_state(model).items()}
    assert next(iter(full)) == "model.layers.0.self_attn.q_proj.bias"
    tensors = {n: (p.A, p.B, p.bias) for n, p in state.items()}
    for broken, count in (
        ({n: t for n, t in full.items() if n != "model.norm.weight"}, 9),
        ({**full, "x": full["model.norm.weight"]}, 10),
        ({**full, "model.norm.weight": torch.ones(3)}, 9),
    ):
        with pytest.raises(AdapterError, match=f"1 of {count} modules do not fit"):
            load_state(model, "default", tensors, broken)
    with pytest.raises(AdapterError, match="4 of 9 modules do not fit"):
        load_state(model, "default", {n: (p.A, p.B) for n, p in state.items()}, full)
    load_state(model, "default", tensors, full)
    assert all(torch.equal(p, full[n]) for n, p in full_state(model).items())


def test_a_shared_bias_stays_shared() -> None:
    """A masked language model's head keeps its bias under two names, of which one computes.

    Mutation: give both names a master of their own; one would never get a gradient.
    """
    from transformers import BertConfig, BertForMaskedLM

    sizes = {"hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 4}
    model = BertForMaskedLM(BertConfig(**sizes, intermediate_size=30, vocab_size=VOCABULARY)).eval()
    found = attach(model, config(target_modules=("query",), bias="all"))
    full = full_state(model)
    assert full["cls.predictions.bias"] is full["cls.predictions.decoder.bias"]
    assert trainable_parameters(model)[0] == found.parameters
    model(IDS).logits.sum().backward()
    assert all(p.grad is not None for p in full.values())


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing:FutureWarning")
def test_a_plain_torch_loop_drops_in_training_only() -> None:
    """As transformers' Trainer runs it: no routing of ours, checkpointing, evaluation in between.

    Mutations: drop nothing without a key; draw another mask when layers run again.
    """
    model = build("qwen3")
    attach(model, config(target_modules="all-linear", lora_dropout=0.4))
    quiet = logits(model)
    assert torch.equal(logits(model), quiet)
    model.train()
    assert not torch.equal(logits(model), logits(model))

    def gradients() -> list[Tensor]:
        torch.manual_seed(3)
        model(input_ids=IDS, labels=IDS, use_cache=False).loss.backward()
        found = [p.grad.clone() for p in model.parameters() if p.grad is not None]
        model.zero_grad()
        return found

    plain = gradients()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    torch.testing.assert_close(gradients(), plain, rtol=0, atol=0)
    assert torch.equal(logits(model.eval()), quiet)
