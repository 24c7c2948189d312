"""Where an adapter comes from: recorded by its run, kept by every save, never claimed falsely."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from decal import demo
from decal.config import LoraConfig
from decal.errors import AdapterError, VerificationError
from decal.model.adapter import Adapter
from decal.model.inject import adapted_layers, attach, detach
from decal.model.state import lora_of
from decal.verbs.facts import adapter_facts
from decal.verbs.inspect import inspect
from decal.verbs.load import load, load_base, save_adapter
from decal.verbs.provenance import runs_of
from decal.verbs.target import RUN, resolve
from decal.verbs.train import RunResult, train
from tests.verbs.conftest import STEPS, settings


def runs(path: Path) -> list[dict[str, Any]]:
    return runs_of(Adapter.from_pretrained(path).metadata)


def test_a_run_is_recorded_in_its_adapter(finished: RunResult) -> None:
    """Fails when an entry is lost or taken from another place than the run itself."""
    (entry,) = runs(finished.weights)
    result, info = finished.result, json.loads((finished.run / "info.json").read_text())
    assert entry["data"] == "train.jsonl"
    assert entry["data_sha256"] == info["data"]
    assert (entry["rows"], entry["seed"], entry["steps"]) == (info["rows"], 0, STEPS)
    assert entry["trained_tokens"] == result.trained_tokens
    assert (entry["loss"], entry["eval_loss"]) == (result.loss, result.eval_loss)
    assert entry["kept_step"] == result.kept_step
    assert entry["epochs"] == round(STEPS / -(-info["rows"] // 8), 3)
    assert entry["weights_sha256"] == Adapter.from_pretrained(finished.weights).digest()
    assert {"decal", "torch", "transformers"} <= entry.keys()
    assert str(finished.run.parent) not in json.dumps(entry)
    assert inspect(finished.weights)["runs"] == [entry]


def test_going_on_adds_an_entry(finished: RunResult, tmp_path: Path) -> None:
    """Fails when the earlier run is forgotten, or its entry changed."""
    again = settings(
        tmp_path,
        adapter={"from": str(finished.run)},
        train={"max_steps": 2, "batch_size": 4, "lr": 1e-3, "seed": 3},
    )
    done = train(again)
    assert done is not None
    first, second = runs(done.weights)
    assert [first] == runs(finished.weights)
    assert (second["seed"], second["steps"]) == (3, 2)
    assert second["weights_sha256"] != first["weights_sha256"]


def test_copies_keep_it_and_other_training_is_told_apart(
    finished: RunResult, tmp_path: Path
) -> None:
    """Fails when a save loses the past, or when changed weights go on under its losses."""
    Adapter.from_pretrained(finished.weights).save_pretrained(tmp_path / "copy")
    assert runs(tmp_path / "copy") == runs(finished.weights)
    model, _ = load(finished.weights)
    save_adapter(model, tmp_path / "same")
    assert runs(tmp_path / "same") == runs(finished.weights)
    layer = next(iter(adapted_layers(model).values()))
    with torch.no_grad():
        lora_of(layer, "default").B.add_(0.1)
    save_adapter(model, tmp_path / "changed")
    first, second = runs(tmp_path / "changed")
    assert [first] == runs(finished.weights)
    assert second["changed"] == "by other code than decal train"
    assert second["weights_sha256"] == Adapter.from_pretrained(tmp_path / "changed").digest()


def test_an_adapter_apart_from_its_run_fills_a_card(finished: RunResult, tmp_path: Path) -> None:
    """Fails when the card knows only run folders."""
    adapter = Adapter.from_pretrained(finished.weights)
    adapter.save_pretrained(tmp_path / "a")
    facts = adapter_facts(resolve(tmp_path / "a"), adapter)
    assert facts.data == {"data": "train.jsonl", "rows": runs(tmp_path / "a")[0]["rows"]}
    assert facts.results["trained tokens"] == finished.result.trained_tokens
    assert facts.settings["seed"] == 0


@pytest.mark.parametrize("text", ["{", "3", "[3]", "[" * 5000, "null"])
def test_a_damaged_past_is_none(text: str) -> None:
    """Fails when metadata that others wrote stops inspect."""
    assert runs_of({RUN: text}) == []


def test_new_adapters_have_no_past(tmp_path: Path) -> None:
    model, _ = load_base(demo.base_path())
    attach(model, LoraConfig(r=2, lora_alpha=3, init_lora_weights=False))
    save_adapter(model, tmp_path / "a")
    assert runs(tmp_path / "a") == []


def test_the_past_leaves_with_the_adapter(finished: RunResult) -> None:
    """Fails when a new adapter of the same name inherits the losses of another."""
    model, _ = load(finished.weights)
    detach(model)
    attach(model, LoraConfig(r=2, lora_alpha=3, init_lora_weights=False))
    assert RUN not in model.decal_describe(model, "default").metadata


def test_what_is_trained_by_hand_must_be_in_the_file(tmp_path: Path) -> None:
    """Fails when a layer norm that somebody unfroze is lost in silence."""
    model, _ = load_base(demo.base_path())
    attach(model, LoraConfig(r=2, lora_alpha=3, init_lora_weights=False))
    model.model.norm.weight.requires_grad_(True)
    for save in (save_adapter, _save_pretrained):
        with pytest.raises(AdapterError, match="belong to no adapter") as error:
            save(model, tmp_path / "a")
        assert error.value.details == ("model.norm.weight",)
        assert "modules_to_save" in str(error.value.hint)
    assert not (tmp_path / "a").exists()
    model.model.norm.weight.requires_grad_(False)
    save_adapter(model, tmp_path / "a")


def _save_pretrained(model: Any, path: Path) -> None:
    model.save_pretrained(path)


def test_a_parameter_without_a_place_in_the_file_is_refused(tmp_path: Path) -> None:
    """Fails when a method learns to train something that nobody taught the file."""
    model, _ = load_base(demo.base_path())
    attach(model, LoraConfig(r=2, lora_alpha=3, init_lora_weights=False))
    layer = next(iter(adapted_layers(model).values()))
    lora_of(layer, "default").register_parameter("gate", torch.nn.Parameter(torch.ones(1)))
    with pytest.raises(VerificationError, match="have no place in its file"):
        save_adapter(model, tmp_path / "a")


def test_a_loaded_adapter_can_be_trained_on(finished: RunResult, tmp_path: Path) -> None:
    """peft loads for inference unless told otherwise, and then trains nothing (its is_trainable).

    Fails when loading freezes what it attaches, or when the gradient does not get there.
    """
    settings_of = finished.weights / "adapter_config.json"
    copy = tmp_path / "a"
    copy.mkdir()
    for file in finished.weights.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    raw = json.loads(settings_of.read_text()) | {"inference_mode": True}
    (copy / "adapter_config.json").write_text(json.dumps(raw))
    model, _ = load(copy)
    own = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert sum(p.numel() for p in own.values()) == Adapter.from_pretrained(copy).parameters
    ids = torch.arange(3, 20)[None]
    model.train()
    model(input_ids=ids, labels=ids).loss.backward()
    assert all(p.grad is not None and bool(p.grad.any()) for p in own.values())
