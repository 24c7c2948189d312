"""`spectrum`: norms beside those of the base's own weights, or a reason why there are none."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from decal import demo
from decal.config import LoraConfig, QuantConfig
from decal.errors import AdapterError
from decal.model.adapter import Adapter
from decal.model.hub import folder_at_hand
from decal.model.inject import attach
from decal.verbs.load import load_base, save_adapter
from decal.verbs.quantize import quantize
from decal.verbs.spectrum import BaseNorms, spectrum
from decal.verbs.train import RunResult
from tests import zoo


def trained(base: Path, folder: Path, settings: LoraConfig, **load: Any) -> Path:
    """An adapter with random factors, as if it had been trained."""
    model, _ = load_base(base, **load)
    attach(model, settings, "default", seed=1)
    torch.manual_seed(3)
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.1)
    save_adapter(model, folder)
    return folder


def delta(adapter: Adapter, module: str) -> torch.Tensor:
    A, B, _ = adapter.tensors[module]
    return adapter.config.scaling_of(module) * (B.double() @ A.double())


def test_a_run_beside_its_base(finished: RunResult) -> None:
    """Against the full matrices. Mutation: drop the scaling, or the wrong weight's norm."""
    found = spectrum(finished.run)
    adapter = Adapter.from_pretrained(finished.weights)
    weights = load_file(demo.base_path() / "model.safetensors")
    assert found["base"] is None
    assert len(found["modules"]) == len(adapter.tensors)
    for module in found["modules"]:
        whole = delta(adapter, module["module"])
        weight = weights[f"{module['module']}.weight"].double()
        assert module["norm"] == pytest.approx(float(whole.norm()), rel=1e-10)
        assert module["relative"] == pytest.approx(float(whole.norm() / weight.norm()), rel=1e-10)
        assert len(module["values"]) == module["r"] == 4
    assert {m["layer"] for m in found["modules"]} == {0, 1, 2, 3}
    assert {m["kind"] for m in found["modules"]} >= {"q_proj", "down_proj"}
    assert found["kept"][-1] == 1.0
    assert 1 <= found["rank"] <= found["rank_everywhere"] <= 4
    assert json.loads(json.dumps(found)) == found


def test_a_quantized_base_is_dequantized(tmp_path: Path) -> None:
    """Stored as bitsandbytes stores it. Mutation: the norm of the codes."""
    packed = tmp_path / "packed"
    quantize(demo.base_path(), packed, QuantConfig(format="nf4", double=True))
    settings = LoraConfig(r=3, lora_alpha=7, target_modules=("q_proj",))
    found = spectrum(trained(packed, tmp_path / "a", settings))
    plain = load_file(demo.base_path() / "model.safetensors")
    assert found["base"] is None
    for module in found["modules"]:
        weight = float(plain[f"{module['module']}.weight"].double().norm())
        assert module["norm"] / module["relative"] == pytest.approx(weight, rel=0.02)


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_other_names_orientations_and_embeddings(name: str, tmp_path: Path) -> None:
    """GPT-2's files lack `transformer.` and hold [in, out]; a tied head is the embedding.

    Mutation: look for the module's own name in the file.
    """
    targets = ("c_attn", "wte") if name == "gpt2" else ("q_proj", "embed_tokens")
    base = zoo.save(name, tmp_path / "base")
    settings = LoraConfig(r=2, lora_alpha=5, target_modules=targets)
    folder = trained(base, tmp_path / "a", settings, dtype="float32")
    found = spectrum(folder)
    model, _ = load_base(base, dtype="float32")
    weights = model.state_dict()
    outside = [m for m in found["modules"] if m["layer"] is None]
    assert [m["kind"] for m in outside] == [targets[1]]
    for module in found["modules"]:
        weight = float(weights[f"{module['module']}.weight"].double().norm())
        assert module["norm"] / module["relative"] == pytest.approx(weight, rel=1e-6)


def test_what_is_trained_beside_is_named(tmp_path: Path) -> None:
    """Mutation: count B's bias or a module trained whole into the factors."""
    settings = LoraConfig(
        r=2, lora_alpha=5, target_modules=("q_proj",), lora_bias=True, modules_to_save=("norm",)
    )
    found = spectrum(trained(demo.base_path(), tmp_path / "a", settings, dtype="float32"))
    names = [row["name"] for row in found["beside"]]
    assert names == ["lora_bias of 4 modules", "model.norm.weight"]
    adapter = Adapter.from_pretrained(tmp_path / "a")
    biases = [2.5 * parts.bias.double() for parts in adapter.tensors.values() if parts.bias is not
              None]  # fmt: skip
    assert found["beside"][0]["norm"] == pytest.approx(float(torch.cat(biases).norm()), rel=1e-6)


def test_a_base_that_is_not_here(finished: RunResult, tmp_path: Path) -> None:
    """Mutation: an error, a download, or norms of nothing."""
    found = spectrum(finished.run, base="owner/nothing")
    assert found["base"] == "base `owner/nothing` is not on this disk"
    assert all(module["relative"] is None for module in found["modules"])
    assert folder_at_hand("owner/nothing") is None
    assert folder_at_hand(str(tmp_path / "x")) is None
    assert folder_at_hand(str(tmp_path)) == tmp_path


def test_another_base_has_other_norms(finished: RunResult, tmp_path: Path) -> None:
    """Mutation: divide by the norms of a base that it was not trained on."""
    base = shutil.copytree(demo.base_path(), tmp_path / "base")
    found = spectrum(finished.run, base=str(base))
    assert found["base"] is None
    with (base / "model.safetensors").open("r+b") as file:
        file.seek(-2, 2)
        file.write(b"\x00\x01")
    found = spectrum(finished.run, base=str(base))
    assert "is not the one that adapter" in found["base"]
    assert found["modules"][0]["relative"] is None


def test_norms_are_read_once_for_many_adapters(
    finished: RunResult, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Mutation: forget them after each adapter."""
    norms = BaseNorms()
    first = spectrum(finished.run, norms=norms)
    monkeypatch.setattr("decal.verbs.spectrum.frobenius", lambda tensor: 1 / 0)
    again = spectrum(finished.run, norms=norms)
    assert again == first


def test_a_model_has_no_spectrum() -> None:
    with pytest.raises(AdapterError, match="is a model, not an adapter"):
        spectrum(demo.base_path())
