"""Runs on quantized bases from training to merging: formats, GPT-2's Conv1D, skipped modules."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from decal import demo
from decal.config import FullConfig, QuantConfig
from decal.errors import AdapterError, QuantError
from decal.model import attention, hf
from decal.model.adapter import Adapter
from decal.model.inject import attach
from decal.model.state import adapted_layers
from decal.quant.linear import QuantLinear
from decal.verbs.in_place import merge_in_place
from decal.verbs.load import load, load_base
from decal.verbs.merge import merge
from decal.verbs.quantize import quantize
from decal.verbs.target import QUANTIZER
from decal.verbs.train import train
from tests.verbs.conftest import settings
from tests.zoo import save

IDS = torch.arange(3, 40)[None]


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    result: torch.Tensor = model.eval()(IDS).logits.float()
    return result


def tiny(folder: Path, base: str, **quant: Any) -> Any:
    """A run of three steps."""
    return settings(
        folder,
        base={"path": base, "dtype": "float32"},
        quant=quant,
        train={"max_steps": 3, "batch_size": 4, "lr": 5e-2, "eval_every": 3},
        data={"path": str(demo_rows(folder)), "max_length": 400, "eval": 0.1},
    )


def demo_rows(folder: Path) -> Path:
    path = folder / "rows.jsonl"
    demo.write_jsonl(path, "train", limit=24)
    return path


BASES: dict[str, Callable[[Path], str]] = {
    "llama": lambda folder: str(demo.base_path()),
    "gpt2": lambda folder: str(save("gpt2", folder / "gpt2")),
}
RUNS = [
    ("gpt2", {"format": "nf4"}),
    ("gpt2", {"format": "int8", "skip_modules": ["mlp"]}),
    ("llama", {"format": "fp4", "block_size": 128, "double": False}),
    ("llama", {"format": "int8"}),
    ("llama", {"format": "nf4", "skip_modules": ["down_proj", "layers.0"]}),
]


@pytest.mark.parametrize(("family", "quant"), RUNS)
def test_trained_saved_loaded_and_merged(
    family: str, quant: dict[str, Any], tmp_path: Path
) -> None:
    """Training, evaluating and generating change no packed byte (F14). The reloaded run has the
    trained one's logits to the bit; merged into the files it is the adapter on the dequantized
    base, and so it is merged in place. Fails if skipped modules or the format are not recorded with
    the adapter, or Conv1D is merged in the other orientation."""
    done = train(tiny(tmp_path, BASES[family](tmp_path), **quant))
    assert done is not None
    trained = done.session.model
    recorded = json.loads(Adapter.from_pretrained(done.weights).metadata[QUANTIZER])
    assert recorded["format"] == quant["format"]
    assert recorded["skip_modules"] == quant.get("skip_modules", [])
    packed = {n for n, m in trained.named_modules() if isinstance(m, QuantLinear)}
    assert packed
    assert not any(
        f".{entry}." in f".{name}." for entry in recorded["skip_modules"] for name in packed
    )

    trained.generate(IDS, max_new_tokens=3, do_sample=False)
    assert hf.quantizer_identity(trained) == recorded["identity"]

    loaded, _ = load(done.run)
    assert torch.equal(logits(loaded), logits(trained))

    plain = AutoModelForCausalLM.from_pretrained(str(BASES[family](tmp_path)), dtype=torch.float32)
    for name, layer in adapted_layers(loaded).items():
        weight = layer.base.weight().detach()
        target = plain.get_submodule(name).weight
        target.data = (weight.T if family == "gpt2" else weight).contiguous()
    alone = logits(plain)
    attach(plain, Adapter.from_pretrained(done.weights))
    want = logits(plain)
    effect = float((want - alone).abs().max())
    assert effect > 0.01

    merge(None, done.run, tmp_path / "m", dtype="fp32")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "m", dtype=torch.float32)
    assert float((logits(merged) - want).abs().max()) < 1e-3 * effect

    merge_in_place(loaded)
    assert not any(isinstance(m, QuantLinear) for m in loaded.modules()) or recorded["skip_modules"]
    loaded.save_pretrained(tmp_path / "s")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "s", dtype=torch.float32)
    assert float((logits(again) - want).abs().max()) < 1e-3 * effect


def test_training_on_a_folder_that_is_stored_quantized(tmp_path: Path) -> None:
    """The adapter finds its way back to the stored codes, and to no others. Fails if a stored base
    is quantized anew on loading, or another one passes for it."""
    quantize(demo.base_path(), tmp_path / "q", QuantConfig(format="nf4"))
    done = train(tiny(tmp_path, str(tmp_path / "q"), format="none"))
    assert done is not None
    assert done.session.model.decal_base.recipe.format == "nf4"
    loaded, _ = load(done.run)
    assert torch.equal(logits(loaded), logits(done.session.model))
    config = tiny(tmp_path, str(tmp_path / "q"), format="none")
    whole = config.model_copy(update={"adapter": FullConfig(), "output": str(tmp_path / "full")})
    with pytest.raises(QuantError, match=r"stored as nf4 .* cannot be trained"):
        train(whole)
    quantize(demo.base_path(), tmp_path / "q", QuantConfig(format="nf4"), dtype="fp16", force=True)
    with pytest.raises(AdapterError, match="is not the one that adapter"):
        load(done.run)


@pytest.mark.parametrize("format", ["nf4", "fp4", "int8"])
def test_flattened_batches_are_used_on_quantized_bases(format: str) -> None:
    """The probe compares logits of flattened and separate samples; int8's activations are rounded
    anew in each batch. Fails if that rounding is taken for leaking attention."""
    model, _ = load_base(demo.base_path(), quant=format)  # type: ignore[arg-type]
    assert attention.flattens(model)
