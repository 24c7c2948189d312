"""Merging into the loaded model: every option, no wrapper left, what was tied comes apart."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from decal.adapters import AdaptedLayer, ReplacedModule
from decal.config import LoraConfig
from decal.errors import AdapterError, VerificationError
from decal.model.inject import adapters_of, attach
from decal.quant.base import Recipe
from decal.quant.linear import QuantLinear
from decal.verbs.in_place import merge_in_place
from tests.zoo import VOCABULARY, ZOO, build

IDS = torch.randint(3, VOCABULARY, (2, 9), generator=torch.Generator().manual_seed(2))
LORA: dict[str, Any] = {"r": 3, "lora_alpha": 5, "lora_dropout": 0.0, "init_lora_weights": False}
OPTIONS: dict[str, tuple[str, dict[str, Any]]] = {
    "ranks": ("llama", {"rank_pattern": {"q_proj": 5}, "alpha_pattern": {"v_proj": 9}}),
    "tied embedding": ("gemma3", {"target_modules": ("q_proj", "embed_tokens")}),
    "tied head": ("llama", {"target_modules": ("q_proj", "lm_head")}),
    "both": ("llama", {"target_modules": ("lm_head", "embed_tokens")}),
    "tied head saved": ("llama", {"modules_to_save": ("lm_head",)}),
    "both saved": ("llama", {"modules_to_save": ("lm_head", "embed_tokens")}),
    "biases": ("llama", {"bias": "all", "lora_bias": True}),
    "biases of conv1d": ("gpt2", {"target_modules": ("c_attn", "wte"), "bias": "lora_only"}),
    "classifier": (
        "roberta",
        {"target_modules": ("query",), "modules_to_save": ("classifier",), "bias": "all"},
    ),
}


def adapted(option: str, dtype: torch.dtype = torch.float64) -> Any:
    name, options = OPTIONS[option]
    model = build(name, dtype)
    attach(model, LoraConfig(**{**LORA, "target_modules": ("q_proj", "v_proj"), **options}))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model


@torch.no_grad()
def logits(model: Any) -> Tensor:
    found: Tensor = model(IDS).logits
    return found


@pytest.mark.parametrize("option", OPTIONS)
def test_merged_is_the_adapter_on_the_base(option: str, tmp_path: Path) -> None:
    """float64, 1e-9 relative, and the same after saving and loading with transformers.

    Mutations: write a head's change into the embedding; merge a bias without its scaling; leave a
    wrapper on; forget the transposition of embeddings.
    """
    model = adapted(option)
    names = {n for n, _ in build(OPTIONS[option][0]).named_parameters(remove_duplicate=False)}
    want = logits(model)
    merge_in_place(model)
    assert adapters_of(model) == {}
    assert not any(isinstance(m, AdaptedLayer | ReplacedModule) for m in model.modules())
    assert {n for n, _ in model.named_parameters(remove_duplicate=False)} == names
    assert float((logits(model) - want).abs().max()) < 1e-9 * float(want.abs().max())
    if option.startswith(("tied", "both")):  # what other tools go by
        assert not model.config.get_text_config().tie_word_embeddings
    model.save_pretrained(tmp_path)
    again = ZOO[OPTIONS[option][0]].cls.from_pretrained(tmp_path, dtype=torch.float64).eval()
    stored = again.state_dict()
    assert all(torch.equal(t, stored[key]) for key, t in model.state_dict().items())
    # Gemma's gain is a buffer that is made anew: 1e-8 apart after a cast to float64.
    assert float((logits(again) - want).abs().max()) < 1e-6 * float(want.abs().max())


def test_a_quantized_layer_becomes_an_ordinary_one() -> None:
    """With its bias; others stay packed. Mutation: add the delta to the codes' layer."""
    model = build("qwen2")
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and name != "lm_head":
            model.set_submodule(name, QuantLinear.from_linear(module, Recipe(format="nf4")).eval())
    attach(model, LoraConfig(**LORA, target_modules=("q_proj",), bias="lora_only", lora_bias=True))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.1
    want = logits(model)
    merge_in_place(model)
    assert type(model.model.layers[0].self_attn.q_proj) is nn.Linear
    assert isinstance(model.model.layers[0].self_attn.k_proj, QuantLinear)
    assert float((logits(model) - want).abs().max()) < 1e-4 * float(want.abs().max())


def test_a_bias_without_a_place_is_refused_before_anything_moves() -> None:
    """peft fails half way. Mutation: drop the bias."""
    model = build("qwen3")
    attach(model, LoraConfig(**LORA, target_modules=("q_proj",), lora_bias=True))
    merge_in_place(model)
    attach(model, LoraConfig(**LORA, target_modules=("q_proj",), lora_bias=True))
    with torch.no_grad():
        model.model.layers[1].self_attn.q_proj.adapters["default"].B_bias.add_(1)
    want = logits(model)
    with pytest.raises(AdapterError, match="1 layers have no bias") as caught:
        merge_in_place(model)
    assert "model.layers.1.self_attn.q_proj" in caught.value.details[0]
    assert torch.equal(logits(model), want)


def test_a_value_that_does_not_fit_is_refused_before_anything_moves() -> None:
    """Mutation: round whole parameters while they are put in place."""
    model = adapted("tied head saved", torch.float32).half()
    with torch.no_grad():
        model.lm_head.adapters["default"].weight[0, 0] = 1e6
    with pytest.raises(VerificationError, match=r"lm_head\.weight"):
        merge_in_place(model)
    assert list(adapters_of(model)) == ["default"]
