"""Loading a run, an adapter or a model in one call, and what an adapter remembers of its base."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from decal import demo
from decal.config import LoraConfig, QuantConfig
from decal.errors import AdapterError, BaseModelError, OutputError, QuantError
from decal.model.adapter import Adapter
from decal.model.inject import adapters_of, attach, detach
from decal.quant.linear import QuantLinear
from decal.verbs.load import as_recipe, load, load_base, save_adapter
from decal.verbs.target import BASE, QUANTIZER
from decal.verbs.text import complete
from decal.verbs.train import RunResult

IDS = torch.arange(3, 40)[None]


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    result: torch.Tensor = model.eval()(IDS).logits
    return result


@pytest.mark.parametrize("kind", ["finished", "finished_plain"])
def test_a_reloaded_run_computes_the_same_bits(kind: str, request: pytest.FixtureRequest) -> None:
    """Mutation: forget to quantize the base on loading, or to apply the scaling."""
    run: RunResult = request.getfixturevalue(kind)
    model, tokenizer = load(run.run)
    assert torch.equal(logits(model), logits(run.session.model))
    prompts = [row.messages[:-1] for row in demo.rows("test")[:5]]
    before = complete(run.session.model, run.session.tokenizer, prompts, max_new_tokens=4)
    assert complete(model, tokenizer, prompts, max_new_tokens=4) == before
    assert any(isinstance(m, QuantLinear) for m in model.modules()) == (kind == "finished")


def test_the_adapter_folder_and_the_base_with_it_are_the_same(finished: RunResult) -> None:
    want = logits(load(finished.run)[0])
    assert torch.equal(logits(load(finished.weights)[0]), want)
    assert torch.equal(logits(load(demo.base_path(), adapter=finished.run)[0]), want)


def test_an_adapter_remembers_base_and_quantizer(finished: RunResult) -> None:
    adapter = Adapter.from_pretrained(finished.weights)
    base, quantizer = (json.loads(adapter.metadata[k]) for k in (BASE, QUANTIZER))
    assert base["path"] == str(demo.base_path())
    assert len(base["fingerprint"]) == 64
    assert quantizer["format"] == "nf4"
    assert (quantizer["block_size"], quantizer["double"]) == (64, True)
    assert quantizer["dtype"] == "bfloat16"
    assert len(quantizer["identity"]) == 64


def test_another_base_with_the_same_shapes_is_refused(finished: RunResult, tmp_path: Path) -> None:
    """Mutation: compare shapes only, as every peer does."""
    other = tmp_path / "other"
    shutil.copytree(demo.base_path(), other)
    tensors = load_file(other / "model.safetensors")
    key = "model.layers.1.self_attn.k_proj.weight"
    tensors[key] = tensors[key] + 0.1
    save_file(tensors, other / "model.safetensors", {"format": "pt"})
    with pytest.raises(AdapterError, match="is not the one"):
        load(other, adapter=finished.run)


def test_an_adapter_on_an_adapter_is_refused(finished: RunResult) -> None:
    with pytest.raises(AdapterError, match="second one"):
        load(finished.run, adapter=finished.run)


def test_detach_gives_back_the_loaded_base_to_the_bit() -> None:
    model, _ = load_base(demo.base_path(), quant="nf4")
    modules = {name: id(module) for name, module in model.named_modules()}
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    want = logits(model)
    attach(model, LoraConfig(r=3, lora_alpha=7, init_lora_weights=False))
    assert not torch.equal(logits(model), want)
    detach(model)
    assert {name: id(module) for name, module in model.named_modules()} == modules
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert torch.equal(logits(model), want)


def test_saving_into_a_folder_in_use_is_refused(tmp_path: Path) -> None:
    model, _ = load_base(demo.base_path())
    attach(model, LoraConfig(r=2, lora_alpha=3, init_lora_weights=False))
    save_adapter(model, tmp_path / "a")
    with pytest.raises(OutputError):
        save_adapter(model, tmp_path / "a")
    save_adapter(model, tmp_path / "a", force=True)
    assert list(adapters_of(model)) == ["default"]


def test_settings_become_recipes() -> None:
    assert as_recipe("none") is None
    assert as_recipe(QuantConfig(format="none")) is None
    recipe = as_recipe(QuantConfig(format="nf4", block_size=128, double=False))
    assert recipe is not None
    assert (recipe.block_size, recipe.double) == (128, False)
    with pytest.raises(QuantError, match="nf5"):
        as_recipe("nf5")  # type: ignore[arg-type]


def test_an_unknown_dtype_is_named() -> None:
    with pytest.raises(BaseModelError, match="bf17"):
        load_base(demo.base_path(), dtype="bf17")
