"""A trained adapter meets a model: all that it holds has a place there, or nothing is attached."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from decal.config import LoraConfig
from decal.errors import AdapterError, DecalWarning
from decal.model.adapter import Adapter
from decal.model.inject import adapter_state, adapters_of, attach, full_state
from decal.store.peft import LoraTensors
from tests.zoo import build

CONFIG = LoraConfig(
    r=3,
    lora_alpha=5,
    target_modules=("q_proj", "embed_tokens"),
    rank_pattern={"1.self_attn.q_proj": 4},
    modules_to_save=("lm_head",),
    bias="lora_only",
    init_lora_weights=False,
)
FIRST = "model.layers.0.self_attn.q_proj"
EMBED = "model.embed_tokens"


@pytest.fixture(scope="module")
def adapter() -> Adapter:
    model = build("llama")
    attach(model, CONFIG, seed=4)
    for parameter in full_state(model).values():
        parameter.data.add_(1)
    return Adapter.from_model(model, source="out/sft", base="org/small")


def test_everything_arrives(adapter: Adapter) -> None:
    """Mutation: load the factors and forget the rest."""
    model = build("llama")
    attach(model, adapter)
    for name, parts in adapter_state(model).items():
        assert torch.equal(parts.A, adapter.tensors[name].A)
        assert torch.equal(parts.B, adapter.tensors[name].B)
    full = full_state(model)
    assert sorted(full) == [
        "lm_head.weight",
        "model.layers.0.self_attn.q_proj.bias",
        "model.layers.1.self_attn.q_proj.bias",
    ]
    assert all(torch.equal(p, adapter.full[n]) for n, p in full.items())
    again = Adapter.from_model(model)
    assert again.embeddings == adapter.embeddings == {EMBED}
    assert again.parameters == adapter.parameters == sum(p.numel() for p in trained(model))


def trained(model: Any) -> list[torch.Tensor]:
    return [p for p in model.parameters() if p.requires_grad]


def misfit(adapter: Adapter, change: str) -> Adapter:
    tensors, full = dict(adapter.tensors), dict(adapter.full)
    A, B, _ = tensors[FIRST]
    if change == "rank":
        tensors[FIRST] = LoraTensors(torch.ones(4, 54), torch.ones(60, 4))
    elif change == "own bias":
        tensors[FIRST] = LoraTensors(A, B, torch.ones(60))
    elif change == "embedding":
        return replace(adapter, embeddings=frozenset())
    elif change == "head":
        del full["lm_head.weight"]
    elif change == "vocabulary":
        full["lm_head.weight"] = torch.ones(9, 54)
    elif change == "norm":
        full["model.norm.weight"] = torch.ones(54)
    elif change == "other base":
        return replace(adapter, base_copies={f"{EMBED}.weight": torch.ones(263, 54)})
    elif change == "resized":
        return replace(adapter, base_copies={f"{EMBED}.weight": torch.ones(300, 54)})
    elif change == "no such":
        return replace(adapter, base_copies={"score.weight": torch.ones(3, 54)})
    return replace(adapter, tensors=tensors, full=full)


@pytest.mark.parametrize(
    ("change", "count", "detail"),
    [
        ("rank", "1 of 3 tensors have the wrong shape", "r=4, its config says r=3"),
        ("own bias", "1 of 3 tensors", "has a bias of B, its config says lora_bias=False"),
        ("embedding", "1 of 3 tensors", "adapter expects a linear layer, base has an embedding"),
        ("head", "1 of 3 whole parameters are missing", "lm_head.weight: the settings train it"),
        ("vocabulary", "1 of 3 whole parameters have the wrong shape", "[9, 54], base has [263"),
        ("norm", "1 of 4 whole parameters are not asked for", "model.norm.weight: the settings"),
        ("other base", "1 of 1 base weights stored with it differ", "or is another base's"),
        ("resized", "1 of 1 base weights", "the vocabulary was resized"),
        ("no such", "1 of 1 base weights", "score.weight: the base has no such parameter"),
    ],
)
def test_each_misfit_is_named(adapter: Adapter, change: str, count: str, detail: str) -> None:
    """F7, F19: peft loads most of these with a warning. Mutation: drop one of the checks."""
    model = build("llama")
    with pytest.raises(AdapterError) as caught:
        attach(model, misfit(adapter, change))
    assert count in caught.value.message
    assert detail in "\n".join(caught.value.details)
    assert adapters_of(model) == {}


def test_other_values_may_be_allowed_and_other_shapes_not(adapter: Adapter) -> None:
    """Fails when the permission is lost on its way, goes without a word, or covers shapes."""
    with pytest.warns(DecalWarning, match="holds 1 base weights that differ: model.embed_tokens"):
        attach(build("llama"), misfit(adapter, "other base"), allow_other_base=True)
    with pytest.raises(AdapterError, match="1 of 1 base weights"):
        attach(build("llama"), misfit(adapter, "resized"), allow_other_base=True)


def test_several_misfits_are_one_error(adapter: Adapter) -> None:
    model = build("llama")
    broken = misfit(misfit(misfit(adapter, "rank"), "head"), "other base")
    with pytest.raises(AdapterError) as caught:
        attach(model, broken)
    assert caught.value.message == (
        "adapter `out/sft` does not fit base `LlamaForCausalLM`: 1 of 3 tensors have the wrong"
        " shape, 1 of 3 whole parameters are missing, 1 of 1 base weights stored with it differ"
    )
    assert len(caught.value.details) == 3
    assert caught.value.hint == "the adapter was trained on `org/small` (adapter_config.json)"


def test_a_copy_of_the_base_is_compared_in_the_bases_dtype(adapter: Adapter) -> None:
    """Mutation: compare a float32 copy with bf16 weights as they are."""
    model = build("llama")
    copies = {f"{EMBED}.weight": model.model.embed_tokens.weight.detach().clone()}
    attach(model.bfloat16(), replace(adapter, base_copies=copies))
    assert list(adapters_of(model)) == ["default"]


def test_settings_of_a_trained_adapter_may_do_nothing(adapter: Adapter) -> None:
    """peft names two heads of classifiers, and keeps patterns that fit nothing."""
    config = CONFIG.model_copy(
        update={
            "modules_to_save": ("lm_head", "classifier"),
            "rank_pattern": {**CONFIG.rank_pattern, "w1": 9},
            "exclude_modules": ("vision_tower",),
        }
    )
    attach(build("llama"), replace(adapter, config=config))
