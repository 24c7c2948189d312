"""F1: a QLoRA adapter that is merged and quantized again is lost: hardly a 4-bit code changes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from decal import demo
from decal.errors import DecalWarning, VerificationError
from decal.quant import Recipe, quant_format
from decal.quant.linear import QuantLinear
from decal.verbs import requantize
from decal.verbs.load import load, load_base
from decal.verbs.merge import merge
from tests.failures.situations import LIGHT, logits, off, read, tuned


def rounded_again(folder: Path) -> torch.Tensor:
    """Logits of the merged model after each of its layers went through NF4, by hand."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    recipe, nf4 = Recipe(format="nf4"), quant_format("nf4")
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and name != "lm_head":
            packed = nf4.quantize(module.weight.detach(), recipe)
            module.weight.data = nf4.dequantize(packed, torch.float32)
    return logits(model)


def test_the_merged_model_is_16_bit_unless_asked_otherwise(tmp_path: Path) -> None:
    """Fails when a merge of a QLoRA run is packed again by default."""
    wanted, bare = tuned(tmp_path / "a", ratio=LIGHT, quant="nf4")
    report = merge(None, tmp_path / "a", tmp_path / "m").report
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    assert report.dtype == config["dtype"] == "bfloat16"
    assert "quantization_config" not in config
    tensors = load_file(tmp_path / "m" / "model.safetensors").values()
    assert {tensor.dtype for tensor in tensors} == {torch.bfloat16}
    found = logits(AutoModelForCausalLM.from_pretrained(tmp_path / "m", dtype=torch.float32))
    assert off(found, wanted, bare) < 0.25


def test_quantized_again_the_fine_tune_is_gone(tmp_path: Path) -> None:
    """What the guard is there for: NF4 of the merged weights is as far off as no adapter."""
    wanted, bare = tuned(tmp_path / "a", ratio=LIGHT, quant="nf4")
    merge(None, tmp_path / "a", tmp_path / "m", dtype="fp32")
    assert off(rounded_again(tmp_path / "m"), wanted, bare) > 0.8


def test_packing_that_loses_the_fine_tune_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without the guard the folder is written, loads, and is as far off as no adapter."""
    wanted, bare = tuned(tmp_path / "a", ratio=LIGHT, quant="nf4")
    with pytest.raises(VerificationError, match="the fine-tune would be lost") as error:
        merge(None, tmp_path / "a", tmp_path / "m", quantize="nf4")
    assert "keeps 2." in error.value.message
    assert "keep 16 bits" in (error.value.hint or "")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a"]
    monkeypatch.setattr(requantize, "SURVIVES", -1.0)
    with pytest.warns(DecalWarning, match="of the update"):
        merge(None, tmp_path / "a", tmp_path / "m", quantize="nf4")
    packed, _ = load_base(tmp_path / "m", dtype="float32", device="cpu")
    assert off(logits(packed), wanted, bare) > 0.8


def test_what_survives_packing_is_measured_and_said(tmp_path: Path) -> None:
    """A delta that is larger than the codes' steps may be packed again, and the share is that of
    the folder. Fails when it is measured before packing."""
    tuned(tmp_path / "a", ratio=0.37, quant="nf4")
    done = merge(None, tmp_path / "a", tmp_path / "m", quantize="nf4")
    assert done.packed is not None
    model, _ = load_base(tmp_path / "m", dtype="float32", device="cpu")
    base, _ = load_base(demo.base_path(), quant="nf4", dtype="float32", device="cpu")
    adapter = read(tmp_path / "a")
    kept = size = 0.0
    for module, parts in adapter.tensors.items():
        delta = adapter.config.scaling_of(module) * parts.B @ parts.A
        after, before = (m.get_submodule(module).weight() for m in (model, base))
        kept += float(((after - before) * delta).double().sum())
        size += float((delta * delta).double().sum())
    assert done.packed["survival"] == pytest.approx(kept / size, rel=1e-3)
    assert f"{kept / size:.1%} of the update" in done.readable()["verified"]["in the codes"]


def test_forward_passes_leave_the_packed_weights_alone(tmp_path: Path) -> None:
    """A merge after a pass is the merge before it. Fails when a pass packs weights anew."""
    tuned(tmp_path / "a", ratio=LIGHT, quant="nf4", dtype="bfloat16")
    model, _ = load(tmp_path / "a", device="cpu")
    packed = [m for m in model.modules() if isinstance(m, QuantLinear)]
    before = [{k: t.clone() for k, t in m.state_dict().items()} for m in packed]
    assert len(before) == 28
    first = logits(model)
    assert torch.equal(logits(model), first)
    model.train()(torch.arange(9)[None]).logits.sum().backward()
    for module, state in zip(packed, before, strict=True):
        assert all(torch.equal(module.state_dict()[k], t) for k, t in state.items())
