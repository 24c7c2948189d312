"""What `decal merge --quantize` writes is a folder that bitsandbytes runs."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from decal.config import LoraConfig
from decal.model.adapter import Adapter
from decal.model.inject import attach
from decal.verbs.load import load_base, save_adapter
from decal.verbs.merge import merge
from tests import zoo

dequantize_4bit = pytest.importorskip("bitsandbytes.functional").dequantize_4bit
pytestmark = pytest.mark.interop


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_bitsandbytes_loads_the_packed_merge(name: str, tmp_path: Path) -> None:
    """As bitsandbytes reads them, the codes hold the update. Fails if packing loses an orientation,
    or writes the base's codes instead of the merged ones."""
    base = zoo.save(name, tmp_path / "base", torch.bfloat16)
    model, _ = load_base(base, quant="nf4")
    attach(model, LoraConfig(r=3, lora_alpha=7, init_lora_weights=False))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.mul_(3)
    save_adapter(model, tmp_path / "a")
    done = merge(None, tmp_path / "a", tmp_path / "m", quantize="nf4")
    assert done.packed is not None
    assert done.packed["survival"] > 0.9
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "m", device_map="cpu")
    before = load_file(base / "model.safetensors")
    seen = 0
    for module, parts in Adapter.from_pretrained(tmp_path / "a").tensors.items():
        layer = theirs.get_submodule(module)
        found = dequantize_4bit(layer.weight.data, layer.weight.quant_state).float()
        update = parts.B @ parts.A * 7 / 3
        weight = before[f"{module}.weight"].float()
        moved = found - (weight.T if name == "gpt2" else weight)
        assert float((moved * update).sum() / (update * update).sum()) > 0.9
        seen += 1
    assert seen == done.report.targeted
