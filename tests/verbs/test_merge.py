"""Merging: onto the weights that training computed with, and what is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from decal import demo
from decal.config import LoraConfig
from decal.errors import AdapterError, ConfigError, OutputError, VerificationError
from decal.model.adapter import Adapter
from decal.model.inject import adapted_layers, attach
from decal.quant.linear import QuantLinear
from decal.verbs import effect as effect_module
from decal.verbs.in_place import merge_in_place
from decal.verbs.load import load, load_base, save_adapter
from decal.verbs.merge import merge
from decal.verbs.plan_merge import changes_of, merging
from decal.verbs.train import RunResult
from tests import zoo

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


# --- proofs -------------------------------------------------------------------------------------


def test_what_is_said_of_a_merge(finished: RunResult, tmp_path: Path) -> None:
    """Fails if the report loses a number, or the record beside the weights does."""
    done = merge(None, finished.run, tmp_path / "m")
    facts = done.summary()["verification"]
    assert (facts["pairs"], facts["modules"], facts["same_bytes"]) == (28, 28, 10)
    ratios = done.summary()["quantization_error_over_delta"]
    assert set(ratios) == {
        "all",
        *(name.rpartition(".")[2] for name in adapted_layers(finished.session.model)),
    }
    shown = done.readable()["verified"]
    assert shown["A/B pairs"] == "28 of 28 used once, none left over"
    assert facts["worst_module"] in shown["worst layer"]
    assert "times the update" in shown["quantization"]
    record = json.loads((tmp_path / "m" / "decal_record.json").read_text())
    assert record["verification"] == facts
    assert record["made_by"] == "merge"
    assert record["base"]["fingerprint"]
    assert record["fingerprint"] == done.report.fingerprint


def test_the_distance_of_quantization_is_the_same_onto_either(
    finished: RunResult, tmp_path: Path
) -> None:
    """It is a property of base and adapter. Fails if the original is held against itself."""
    found = [
        merge(None, finished.run, tmp_path / onto, onto=onto).report.verification.quantization
        for onto in ("trained", "original")
    ]
    assert found[0] is not None
    assert found[1] == pytest.approx(found[0], rel=1e-6)
    assert found[0]["all"] > 0.5


@pytest.mark.parametrize("onto", ["trained", "original"])
def test_logits_and_losses_of_both_ways(finished: RunResult, tmp_path: Path, onto: Any) -> None:
    """Fails if the models are mixed up: the merged one is the adapter's, not the base's."""
    rows = finished.session.config.data.path
    done = merge(None, finished.run, tmp_path / "m", onto=onto, dtype="fp32", verify=rows)
    e = done.effect
    assert e is not None
    assert e["distance"] < 0.25  # training computed in bfloat16, and this adapter is a light one
    assert e["distance"] < e["limit"] < 1
    assert e["kl"] < 0.1 * e["kl_of_base"]
    losses = e["losses"]
    other = "original" if onto == "trained" else "trained"
    both = {name: losses.pop(f"merged --onto {name}") for name in (onto, other)}
    assert set(losses) == {"base", "adapter, not merged"}
    assert both["trained"] == pytest.approx(losses["adapter, not merged"], abs=0.02)
    assert losses["base"] > max(both.values()) + 0.05
    assert "loss on 64 rows" in done.readable()["compared"]
    record = json.loads((tmp_path / "m" / "decal_record.json").read_text())
    assert record["verification"]["effect"]["distance"] == e["distance"]


def test_a_merged_model_that_computes_the_base_is_not_put_in_place(
    finished: RunResult, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The weights pass as what they should be, the model does not. Fails if logits are compared
    by their own size: the adapter moves them little."""
    real = AutoModelForCausalLM.from_pretrained
    monkeypatch.setattr(
        effect_module.AutoModelForCausalLM,
        "from_pretrained",
        lambda folder, **kwargs: real(demo.base_path(), **kwargs),
    )
    with pytest.raises(VerificationError, match="of the adapter's effect away") as caught:
        merge(None, finished.run, tmp_path / "m", verify="logits")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m.failed-verification"]
    assert "m.failed-verification" in caught.value.details[-1]
    with pytest.raises(VerificationError, match="of the adapter's effect away") as caught:
        merge(None, finished.run, tmp_path / "q", verify="logits", quantize="int8")
    left = sorted(p.name for p in tmp_path.iterdir())
    assert left == ["m.failed-verification", "q.failed-verification"]
    (detail,) = (text for text in caught.value.details if "kept in" in text)
    assert f"`{tmp_path / 'q.failed-verification'}`; `{tmp_path / 'q'}` was not made" in detail


def test_logits_that_are_no_numbers_fail(
    finished: RunResult, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """NaN is larger than no limit. Fails if the distance is only asked to be above it."""
    real = effect_module._distances
    monkeypatch.setattr(
        effect_module, "_distances", lambda *given: real(*given) | {"distance": float("nan")}
    )
    with pytest.raises(VerificationError, match="nan of the adapter's effect away"):
        merge(None, finished.run, tmp_path / "m", verify="logits")


def _tuned(folder: Path, ratio: float) -> Path:
    """An adapter of an NF4 base, its update so large relative to the weights."""
    model, _ = load_base(demo.base_path(), quant="nf4")
    attach(model, LoraConfig(r=3, lora_alpha=5, init_lora_weights=False))
    with torch.no_grad():
        for layer in adapted_layers(model).values():
            lora = layer.adapters["default"]
            parts = lora.low_rank()
            size = (parts.scale * parts.B @ parts.A).norm()
            lora.B.mul_(ratio * layer.base.weight().float().norm() / size)
    save_adapter(model, folder)
    return folder


def test_packing_a_light_fine_tune_again_is_refused(tmp_path: Path) -> None:
    """Fails if the codes are not dequantized, or are held against the 16-bit weights they came
    from. Nothing is left behind."""
    adapter = _tuned(tmp_path / "a", 0.0125)
    with pytest.raises(VerificationError, match="fine-tune would be lost") as caught:
        merge(None, adapter, tmp_path / "m", quantize="nf4")
    assert "--onto original" in (caught.value.hint or "")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a"]


@pytest.mark.parametrize(("fmt", "ratio"), [("int8", 0.05), ("nf4", 0.6)])
def test_packed_again_where_the_update_outlives_it(tmp_path: Path, fmt: Any, ratio: float) -> None:
    """Fails if the survival is not that of the written codes."""
    adapter = _tuned(tmp_path / "a", ratio)
    done = merge(None, adapter, tmp_path / "m", quantize=fmt)
    assert done.packed is not None
    assert done.packed["survival"] == pytest.approx(1, abs=0.1)
    plain = merge(None, adapter, tmp_path / "plain", dtype="fp32")
    assert done.report.nbytes < 0.8 * plain.report.nbytes
    packed, _ = load_base(tmp_path / "m")
    meant = load_file(tmp_path / "plain" / "model.safetensors")
    base = load_adapter_base(tmp_path)
    key = "model.layers.1.mlp.up_proj"
    update = meant[f"{key}.weight"] - base[key]
    kept = packed.get_submodule(key).weight().float() - base[key]
    share = float((kept * update).sum() / (update * update).sum())
    assert share == pytest.approx(done.packed["survival"], abs=0.15)
    record = json.loads((tmp_path / "m" / "decal_record.json").read_text())
    assert record["quantized"]["format"] == fmt
    assert record["fingerprint"] == done.report.fingerprint


def load_adapter_base(folder: Path) -> dict[str, torch.Tensor]:
    """The weights that the adapter of `_tuned` was trained on."""
    model, _ = load_base(demo.base_path(), quant="nf4")
    return {
        name: module.weight().float()
        for name, module in model.named_modules()
        if isinstance(module, QuantLinear)
    }


def test_two_pairs_for_one_tensor_are_refused(tmp_path: Path) -> None:
    """A name map that sends two modules to one key would lose a pair. Fails if a table of keys
    swallows it."""
    adapter = Adapter.from_pretrained(_tuned(tmp_path / "a", 0.1))
    plan = merging(adapter, str(demo.base_path()), None)
    one, two = sorted(adapter.tensors)[:2]
    keys = {**plan.keys, f"{one}.weight": plan.keys[f"{two}.weight"]}
    with pytest.raises(AdapterError, match="28 A/B pairs for 27 tensors"):
        changes_of(replace(plan, keys=keys))


@pytest.mark.parametrize("name", ["gpt2", "phi3", "gemma", "qwen3_moe", "bert", "gpt_neox"])
def test_architectures_are_proved(name: str, tmp_path: Path) -> None:
    """Conv1D, fused, tied, experts, embeddings, heads: weights and logits. Fails if an orientation
    is forgotten: then the check itself refuses a right merge."""
    base = zoo.save(name, tmp_path / "base")
    labels = zoo.LABELS if not zoo.ZOO[name].causal else None
    model, _ = load_base(base, dtype="float32", labels=labels)
    more = {"gpt2": ("c_attn", "wte"), "gemma": ("q_proj", "lm_head", "embed_tokens")}
    targets = more.get(name, "all-linear")
    attach(model, LoraConfig(r=3, lora_alpha=7, target_modules=targets, init_lora_weights=False))
    save_adapter(model, tmp_path / "a")
    done = merge(None, tmp_path / "a", tmp_path / "m", verify="logits")
    worst = done.report.verification.worst
    assert worst is not None
    assert worst.relative < 1e-3
    assert done.effect is not None
    assert done.effect["distance"] < 1e-3
