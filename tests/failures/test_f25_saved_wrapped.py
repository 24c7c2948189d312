"""F25: a model with wrapped layers is saved whole; reloaded, the wrapped layers are random.

Wrappers put `base_layer` into the names of the weights. A model saved like that loads with a report
of missing keys, and fresh numbers where the adapted layers were.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from decal.config import LoraConfig
from decal.model.inject import attach
from tests import zoo
from tests.failures.situations import draw, logits, read

IDS = torch.arange(5, 30)[None]
FILES = ["adapter_config.json", "adapter_model.safetensors"]


def adapted() -> Any:
    model = zoo.build("llama")
    attach(model, LoraConfig(r=3, lora_alpha=7, target_modules=("q_proj",), lora_dropout=0))
    draw(model)
    return model


def test_save_pretrained_writes_the_adapter(tmp_path: Path) -> None:
    """Fails when the wrapped whole is written, or an adapter that loads as another."""
    model = adapted()
    model.save_pretrained(tmp_path)
    assert sorted(file.name for file in tmp_path.iterdir()) == FILES
    again = zoo.build("llama")
    attach(again, read(tmp_path))
    assert torch.equal(logits(again, IDS), logits(model, IDS))


def test_a_trainers_checkpoint_is_the_adapter(tmp_path: Path) -> None:
    """Fails when the Trainer finds a way around save_pretrained."""
    model = adapted()
    rows = [{"input_ids": IDS[0], "labels": IDS[0]}] * 2
    settings = TrainingArguments(
        output_dir=str(tmp_path), max_steps=1, save_steps=1, report_to=[], use_cpu=True
    )
    Trainer(model, settings, train_dataset=rows).train()
    found = load_file(tmp_path / "checkpoint-1" / "adapter_model.safetensors")
    assert len(found) == 4
    names = [key for f in tmp_path.rglob("*.safetensors") for key in load_file(f)]
    assert not any("base_layer" in name for name in names)


def test_without_the_guard_the_reloaded_base_is_random(tmp_path: Path) -> None:
    """The class's own save_pretrained, which attaching takes out of reach: the loss of the text
    that the base knows goes up after reloading."""
    model = adapted()
    type(model).save_pretrained(model, tmp_path)
    names = load_file(tmp_path / "model.safetensors")
    assert "model.layers.0.self_attn.q_proj.base_layer.weight" in names
    first, second = (
        AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32) for _ in range(2)
    )
    weights = [m.get_submodule("model.layers.0.self_attn.q_proj").weight for m in (first, second)]
    assert not torch.equal(*weights)  # not even the same random numbers twice
    bare = logits(zoo.build("llama"), IDS)
    assert float((logits(first, IDS) - bare).abs().max()) > 0.1
