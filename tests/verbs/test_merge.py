"""Merging: onto the weights that training computed with, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from decal import demo
from decal.errors import AdapterError, ConfigError, OutputError
from decal.model.adapter import Adapter
from decal.model.inject import adapted_layers, attach
from decal.verbs.in_place import merge_in_place
from decal.verbs.load import load, load_base
from decal.verbs.merge import merge
from decal.verbs.train import RunResult

IDS = torch.arange(3, 40)[None]


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    result: torch.Tensor = model(IDS).logits.float()
    return result


def test_merged_in_float32_is_the_adapter_on_its_base(finished: RunResult, tmp_path: Path) -> None:
    """The merged model equals the adapter on the weights of training, to 1e-4 of its effect.

    Mutation: drop the scaling; merge onto the original weights; skip one module.
    """
    report = merge(None, finished.run, tmp_path / "m", dtype="fp32").report
    assert (report.targeted, report.dequantized) == (28, 0)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "m", dtype=torch.float32)
    reference, _ = load_base(demo.base_path(), dtype="float32")
    for name, layer in adapted_layers(finished.session.model).items():
        reference.get_submodule(name).weight.data = layer.base.weight().float()
    alone = logits(reference)
    attach(reference, Adapter.from_pretrained(finished.weights))
    want = logits(reference)
    effect = float((want - alone).abs().max())
    assert effect > 0.1
    assert float((logits(merged) - want).abs().max()) < 1e-4 * max(effect, 1.0)


def test_the_merged_folder_is_a_plain_model(finished: RunResult, tmp_path: Path) -> None:
    merge(None, finished.run, tmp_path / "m")
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    assert "quantization_config" not in config
    assert config["dtype"] == "bfloat16"
    text = AutoTokenizer.from_pretrained(tmp_path / "m").apply_chat_template(
        [{"role": "user", "content": "Hi"}], tokenize=False
    )
    assert "<|im_start|>user" in text


def test_untargeted_quantized_layers_are_dequantized_too(
    finished: RunResult, tmp_path: Path
) -> None:
    """Training computed with them dequantized, so the merged model must as well."""
    adapter = Adapter.from_pretrained(finished.weights)
    few = {m: t for m, t in adapter.tensors.items() if m.endswith("q_proj")}
    partial = Adapter(
        config=adapter.config.model_copy(update={"target_modules": ("q_proj",)}),
        tensors=few,
        metadata=adapter.metadata,
        base=adapter.base,
    )
    partial.save_pretrained(tmp_path / "a")
    report = merge(None, tmp_path / "a", tmp_path / "m").report
    assert (report.targeted, report.dequantized) == (4, 24)
    merged = load_file(tmp_path / "m" / "model.safetensors")
    stored = load_file(demo.base_path() / "model.safetensors")
    key = "model.layers.0.mlp.up_proj.weight"
    layer = finished.session.model.get_submodule("model.layers.0.mlp.up_proj").base_layer
    assert torch.equal(merged[key], layer.weight())
    assert not torch.equal(merged[key], stored[key])
    norm = "model.norm.weight"
    assert torch.equal(merged[norm], stored[norm])


def test_onto_original_keeps_the_bases_own_weights(finished: RunResult, tmp_path: Path) -> None:
    report = merge(None, finished.run, tmp_path / "m", onto="original").report
    assert (report.targeted, report.dequantized) == (28, 0)
    trained = merge(None, finished.run, tmp_path / "t").report
    assert report.fingerprint != trained.fingerprint


def test_onto_trained_needs_a_quantized_base(finished_plain: RunResult, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="does not record a quantized base"):
        merge(None, finished_plain.run, tmp_path / "m", onto="trained")


@pytest.mark.parametrize("kind", ["finished", "finished_plain"])
def test_another_base_of_the_same_shape_is_refused(
    kind: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    """Mutation: skip the identity or the fingerprint."""
    run: RunResult = request.getfixturevalue(kind)
    other = tmp_path / "other"
    other.mkdir()
    for file in demo.base_path().iterdir():
        if file.name != "model.safetensors":
            (other / file.name).write_bytes(file.read_bytes())
    tensors = load_file(demo.base_path() / "model.safetensors")
    key = "model.layers.2.mlp.down_proj.weight"
    tensors[key] = tensors[key] * 1.5
    save_file(tensors, other / "model.safetensors", {"format": "pt"})
    with pytest.raises(AdapterError, match="is not the one"):
        merge(str(other), run.run, tmp_path / "m")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["other"]


def test_an_output_in_use_is_refused(finished: RunResult, tmp_path: Path) -> None:
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "mine.txt").write_text("keep")
    for force in (False, True):
        with pytest.raises(OutputError):
            merge(None, finished.run, tmp_path / "m", force=force)
    assert (tmp_path / "m" / "mine.txt").read_text() == "keep"


@pytest.mark.parametrize("kind", ["finished", "finished_plain"])
def test_merging_in_place_equals_merging_files(
    kind: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    """Mutation: add the delta twice, or leave the wrapper on."""
    run: RunResult = request.getfixturevalue(kind)
    merge(None, run.run, tmp_path / "m")
    stored = load_file(tmp_path / "m" / "model.safetensors")
    model, _ = load(run.run)
    merge_in_place(model)
    state = model.state_dict()
    for key, tensor in stored.items():
        assert torch.equal(state[key], tensor), key
    model.save_pretrained(tmp_path / "again")
