"""save_pretrained of a model with adapters writes what peft writes, and nothing of the base."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from decal.config import LoraConfig
from decal.errors import AdapterError
from decal.model.adapter import Adapter
from decal.model.inject import attach
from tests.zoo import build

CONFIG = LoraConfig(
    r=3,
    lora_alpha=5,
    target_modules=("q_proj", "embed_tokens"),
    modules_to_save=("lm_head",),
    init_lora_weights=False,
)
FILES = ["adapter_config.json", "adapter_model.safetensors"]


def model() -> Any:
    found = build("llama")
    attach(found, CONFIG, seed=1)
    return found


def test_default_in_the_root_and_others_below(tmp_path: Path) -> None:
    """F25. What stands there stays. Mutations: write the last adapter only; write base weights."""
    found = model()
    attach(found, LoraConfig(r=2, init_lora_weights=False), "tickets", seed=2)
    (tmp_path / "trainer_state.json").write_text("{}")
    found.save_pretrained(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == [*FILES, "tickets", "trainer_state.json"]
    assert sorted(p.name for p in (tmp_path / "tickets").iterdir()) == FILES
    keys = load_file(tmp_path / FILES[1])
    assert not any("base_layer" in key for key in keys)
    assert sum(t.numel() for t in keys.values()) < sum(
        p.numel() for p in found.get_submodule("model").parameters()
    )
    other = build("llama")
    attach(other, Adapter.from_pretrained(tmp_path), "default")
    attach(other, Adapter.from_pretrained(tmp_path / "tickets"), "tickets")
    ours, theirs = found.state_dict(), other.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_saving_again_replaces_the_files(tmp_path: Path) -> None:
    """As a trainer does. Mutation: refuse a folder in use."""
    found = model()
    found.save_pretrained(tmp_path)
    with torch.no_grad():
        found.lm_head.adapters["default"].weight.add_(1)
    found.save_pretrained(tmp_path, state_dict=found.state_dict(), max_shard_size="5GB")
    read = Adapter.from_pretrained(tmp_path).full["lm_head.weight"]
    assert torch.equal(read, found.lm_head.adapters["default"].weight)


def test_a_copy_saves_itself(tmp_path: Path) -> None:
    """Mutation: bind the first model's function."""
    found = model()
    other = copy.deepcopy(found)
    with torch.no_grad():
        other.lm_head.adapters["default"].weight.add_(1)
    other.save_pretrained(tmp_path)
    read = Adapter.from_pretrained(tmp_path).full["lm_head.weight"]
    assert torch.equal(read, other.lm_head.adapters["default"].weight)


def test_only_what_is_selected_and_only_the_main_process(tmp_path: Path) -> None:
    found = model()
    attach(found, LoraConfig(r=2), "tickets")
    found.save_pretrained(tmp_path / "other", is_main_process=False)
    assert not (tmp_path / "other").exists()
    found.save_pretrained(tmp_path, selected_adapters=["tickets"])
    assert [p.name for p in tmp_path.iterdir()] == ["tickets"]
    with pytest.raises(AdapterError, match="no adapter `ticket`"):
        found.save_pretrained(tmp_path, selected_adapters=["ticket"])


def test_who_loaded_the_base_adds_what_it_knows(tmp_path: Path) -> None:
    """Mutation: write the bare adapter whatever is left on the model."""
    found = model()
    found.decal_describe = lambda m, name: Adapter.from_model(m, name, metadata={"decal.x": name})
    found.save_pretrained(tmp_path)
    assert Adapter.from_pretrained(tmp_path).metadata == {"decal.x": "default"}
    assert json.loads((tmp_path / FILES[0]).read_text())["peft_type"] == "LORA"


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"push_to_hub": True}, "writes to a folder only"),
        ({"safe_serialization": False}, "pickle can run code"),
    ],
)
def test_what_cannot_be_done_is_refused(options: dict[str, Any], text: str, tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match=text):
        model().save_pretrained(tmp_path, **options)
    assert not list(tmp_path.iterdir())


def test_a_state_dict_of_other_adapters_is_refused(tmp_path: Path) -> None:
    """Mutation: ignore what the trainer gathered."""
    found = model()
    state = {key: t.clone() for key, t in found.state_dict().items()}
    key = next(key for key in state if key.endswith("default.A"))
    state[key] += 1
    with pytest.raises(AdapterError, match="lacks 0 and differs in 1 of"):
        found.save_pretrained(tmp_path, state_dict=state)
    del state[key]
    with pytest.raises(AdapterError, match="lacks 1 and differs in 0 of"):
        found.save_pretrained(tmp_path, state_dict=state)
    assert not list(tmp_path.iterdir())
