"""F16: rsLoRA, biases of B and resized vocabularies are scaled or added wrongly in merges.

Where each way of merging and mixing has its own scaling, some forget the square root of rsLoRA, or
that B's bias is scaled like B A. Here there is one scaling, for all of them.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from decal.adapters import lora
from decal.config import LoraConfig
from decal.errors import AdapterError
from decal.model.inject import attach, use
from decal.verbs import plan_merge
from decal.verbs.in_place import merge_in_place
from decal.verbs.load import load_base
from decal.verbs.merge import merge
from tests import zoo
from tests.failures.situations import draw, logits, off, read, tuned

IDS = torch.arange(5, 30)[None]
FILE = "adapter_model.safetensors"
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "bias of B": {"lora_bias": True},
    "ranks, alphas and rslora": {
        "use_rslora": True,
        "rank_pattern": {"k_proj": 5},
        "alpha_pattern": {"v_proj": 4},
    },
    "all of it": {"use_rslora": True, "lora_bias": True, "bias": "all"},
}
SETTINGS = {"r": 3, "lora_alpha": 7, "target_modules": ["q_proj", "k_proj", "v_proj"]}


def merged(folder: Path) -> Tensor:
    merge(None, folder / "a", folder / "m", dtype="fp32")
    return logits(AutoModelForCausalLM.from_pretrained(folder / "m", dtype=torch.float32), IDS)


def situation(folder: Path, **settings: Any) -> tuple[Tensor, Tensor]:
    """An adapter on a base whose projections have biases; logits with and without it."""
    zoo.save("llama", folder / "base")
    tuned(folder / "a", folder / "base", **{**SETTINGS, **settings})
    model, _ = load_base(folder / "base", dtype="float32", device="cpu")
    bare = logits(model, IDS)
    attach(model, read(folder / "a"))
    return logits(model, IDS), bare


@pytest.mark.parametrize("name", OPTIONS)
def test_merged_files_hold_the_adapter(tmp_path: Path, name: str) -> None:
    """To 1e-5 of its effect in float32. Fails when an option is scaled otherwise in merging."""
    wanted, bare = situation(tmp_path, **OPTIONS[name])
    assert off(merged(tmp_path), wanted, bare) < 1e-5


@pytest.mark.parametrize("name", OPTIONS)
def test_merging_in_memory_holds_it_too(tmp_path: Path, name: str) -> None:
    wanted, bare = situation(tmp_path, **OPTIONS[name])
    model, _ = load_base(tmp_path / "base", dtype="float32", device="cpu")
    attach(model, read(tmp_path / "a"))
    merge_in_place(model)
    assert off(logits(model, IDS), wanted, bare) < 1e-5


@pytest.mark.parametrize("name", ["rslora", "ranks, alphas and rslora"])
def test_a_scaling_of_its_own_would_be_off(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a merge gives that computes alpha / r by itself."""
    wanted, bare = situation(tmp_path, **OPTIONS[name])
    monkeypatch.setattr(LoraConfig, "scaling_of", lambda self, _: self.lora_alpha / self.r)
    assert off(merged(tmp_path), wanted, bare) > 0.1


def test_an_unscaled_bias_would_be_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a merge gives that adds B's bias as it is."""
    wanted, bare = situation(tmp_path, lora_bias=True)
    whole = plan_merge._whole

    def unscaled(plan: plan_merge.Merging) -> dict[str, Tensor]:
        found = whole(plan)
        for module, parts in plan.adapter.tensors.items():
            assert parts.bias is not None
            key = plan.key(f"{module}.bias")
            found[key] = plan.files.read(key).float() + parts.bias
        return found

    monkeypatch.setattr(plan_merge, "_whole", unscaled)
    assert off(merged(tmp_path), wanted, bare) > 0.05


def test_mixed_adapters_are_the_sum_of_their_deltas(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of rsLoRA, with B's bias. Without the square root, or scaled twice, the sum is another."""
    model = zoo.build("llama")
    settings = LoraConfig(**SETTINGS, use_rslora=True, lora_bias=True, lora_dropout=0)
    weights = {"default": 0.6, "b": -0.3}
    for seed, name in enumerate(weights):
        attach(model, settings, name, seed=seed)
    draw(model)
    draw(model, "b", seed=7)
    summed = summed_by_hand(model, weights, 7 / math.sqrt(3))
    use(model, weights)
    assert float((logits(model, IDS) - summed).abs().max()) < 1e-4
    for wrong in (7 / 3, 7.0):
        other = summed_by_hand(model, weights, wrong)
        assert float((logits(model, IDS) - other).abs().max()) > 0.1


def summed_by_hand(model: Any, weights: dict[str, float], scale: float) -> Tensor:
    """Logits of a plain model whose weights and biases gained scale * weight * (B A, b)."""
    plain = zoo.build("llama")
    with torch.no_grad():
        for name, weight in weights.items():
            for module, layer in lora_layers(model, name):
                target = plain.get_submodule(module)
                target.weight += scale * weight * layer.B @ layer.A
                assert layer.B_bias is not None
                target.bias += scale * weight * layer.B_bias
    return logits(plain, IDS)


def lora_layers(model: Any, name: str) -> list[tuple[str, lora.Lora]]:
    from decal.model.state import adapted_layers, lora_of

    return [(module, lora_of(layer, name)) for module, layer in adapted_layers(model).items()]


def test_a_resized_vocabulary_is_refused(tmp_path: Path) -> None:
    """An adapter that brings the embedding of a resized base does not go onto the plain one."""
    situation(tmp_path)
    file = tmp_path / "a" / FILE
    rows = zoo.build("llama").get_input_embeddings().weight.detach()
    larger = torch.cat([rows, rows[:7]])
    tensors = load_file(file)
    for module in ("model.embed_tokens", "lm_head"):
        tensors[f"base_model.model.{module}.weight"] = larger.clone()
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(AdapterError, match="270, 54") as error:
        merge(None, tmp_path / "a", tmp_path / "m")
    assert "the vocabulary was resized" in str(error.value)
    with pytest.raises(AdapterError, match="the vocabulary was resized"):
        attach(zoo.build("llama"), read(tmp_path / "a"))
    assert json.loads((tmp_path / "base" / "config.json").read_text())["vocab_size"] == 263
