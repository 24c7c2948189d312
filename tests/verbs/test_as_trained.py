"""Merging onto the weights of training: packed while loading, or packed in the files already."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from decal.config import LoraConfig, QuantConfig
from decal.errors import AdapterError, BaseModelError
from decal.model.adapter import Adapter
from decal.model.inject import attach
from decal.quant.linear import QuantLinear
from decal.verbs.in_place import merge_in_place
from decal.verbs.load import load_base, save_adapter
from decal.verbs.merge import merge
from decal.verbs.quantize import quantize
from tests import zoo

FORMATS = {
    "nf4": QuantConfig(format="nf4", block_size=128, double=True),
    "fp4": QuantConfig(format="fp4", double=False),
    "int8": QuantConfig(format="int8"),
}
OPTIONS: dict[str, dict[str, Any]] = {
    "llama": {"bias": "lora_only", "modules_to_save": ("lm_head",)},
    "gpt2": {"bias": "lora_only", "target_modules": ("c_attn", "c_fc", "wte")},
}


def _adapted(base: Path, quant: QuantConfig | str, out: Path, name: str) -> Any:
    """The base with an adapter of random values, which is saved."""
    model, _ = load_base(base, quant=quant)  # type: ignore[arg-type]
    settings = {"r": 3, "lora_alpha": 5, "init_lora_weights": False, **OPTIONS[name]}
    attach(model, LoraConfig(**settings))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    save_adapter(model, out)
    return model


def _weights(model: Any, conv1d: bool = False) -> dict[str, torch.Tensor]:
    """All weights of a model, those of packed layers dequantized, as files hold them."""
    state = {k: v for k, v in model.state_dict().items() if v.is_floating_point()}
    for name, layer in model.named_modules():
        if isinstance(layer, QuantLinear):
            state[f"{name}.weight"] = layer.weight().T if conv1d else layer.weight()
    return state


@pytest.mark.parametrize("stored", [False, True], ids=["while loading", "in the files"])
@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("name", OPTIONS)
def test_merged_files_are_the_model_merged_in_place(
    name: str, fmt: str, stored: bool, tmp_path: Path
) -> None:
    """To the bit, for packed layers with and without an adapter. Fails if a layer keeps its 16-bit
    weight, if Conv1D's orientation is lost, or if a part of a packed weight is written."""
    base = zoo.save(name, tmp_path / "m", torch.bfloat16)
    quant: QuantConfig | str = FORMATS[fmt]
    if stored:
        quantize(base, tmp_path / "q", FORMATS[fmt])
        base, quant = tmp_path / "q", "none"
    model = _adapted(base, quant, tmp_path / "a", name)
    report = merge(None, tmp_path / "a", tmp_path / "out").report
    merge_in_place(model)
    state = _weights(model, conv1d=name == "gpt2")
    files = load_file(tmp_path / "out" / "model.safetensors")
    assert {key: t.dtype for key, t in files.items()} == dict.fromkeys(files, torch.bfloat16)
    for key, tensor in files.items():
        assert torch.equal(tensor, state[key]), key
    assert report.dequantized > 0 or name == "llama"
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert "quantization_config" not in config


def test_another_stored_base_is_refused(tmp_path: Path) -> None:
    """The adapter records the packed bytes. Fails if those of the files go unhashed."""
    for seed, folder in enumerate(("one", "two")):
        zoo.save("llama", tmp_path / folder, torch.bfloat16, seed)
        quantize(tmp_path / folder, tmp_path / f"q-{folder}", FORMATS["nf4"])
    _adapted(tmp_path / "q-one", "none", tmp_path / "a", "llama")
    adapter = Adapter.from_pretrained(tmp_path / "a")
    record = json.loads(adapter.metadata["decal.base"])
    del record["fingerprint"]
    facts = {**adapter.metadata, "decal.base": json.dumps(record)}
    changed = Adapter(**{**vars(adapter), "metadata": facts})
    changed.save_pretrained(tmp_path / "b")
    with pytest.raises(AdapterError, match="its quantized weights differ"):
        merge(str(tmp_path / "q-two"), tmp_path / "b", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_adapter_of_another_tool_goes_onto_the_stored_weights(tmp_path: Path) -> None:
    """It records no quantizer; the base's files say enough."""
    base = zoo.save("llama", tmp_path / "m", torch.bfloat16)
    quantize(base, tmp_path / "q", FORMATS["nf4"])
    model = _adapted(tmp_path / "q", "none", tmp_path / "a", "llama")
    adapter = Adapter.from_pretrained(tmp_path / "a")
    Adapter(**{**vars(adapter), "metadata": {}}).save_pretrained(tmp_path / "b")
    merged = merge(None, tmp_path / "b", tmp_path / "out")
    assert merged.onto == "trained"
    merge_in_place(model)
    state = _weights(model)
    for key, tensor in load_file(tmp_path / "out" / "model.safetensors").items():
        assert torch.equal(tensor, state[key]), key


def test_codes_are_no_original(tmp_path: Path) -> None:
    base = zoo.save("llama", tmp_path / "m", torch.bfloat16)
    quantize(base, tmp_path / "q", FORMATS["nf4"])
    _adapted(tmp_path / "q", "none", tmp_path / "a", "llama")
    with pytest.raises(BaseModelError, match="stored quantized") as caught:
        merge(None, tmp_path / "a", tmp_path / "out", onto="original")
    assert "decal dequantize" in str(caught.value.hint)
