"""`inspect`: what it reads of runs, adapters and models, and that it changes nothing."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from decal import demo
from decal.errors import AdapterError, BaseModelError, DecalError
from decal.store.run import RunFolder
from decal.verbs.inspect import inspect
from decal.verbs.train import RunResult
from tests.verbs.conftest import STEPS


def test_a_finished_run(finished: RunResult) -> None:
    found = inspect(finished.run)
    assert (found["kind"], found["finished"]) == ("run", True)
    assert found["result"]["steps"] == STEPS
    assert found["checkpoints"][-1] == STEPS
    assert found["adapter"]["parameters"] == finished.trainable_params
    assert json.loads(json.dumps(found)) == found


def test_an_adapter(finished: RunResult) -> None:
    """Mutation: count A alone, or show alpha as the scaling."""
    found = inspect(finished.weights)
    assert (found["kind"], found["r"], found["lora_alpha"]) == ("adapter", 4, 10)
    assert found["scaling"] == 2.5
    assert (found["layers"], found["modules"]["q_proj"]) == (28, 4)
    assert found["parameters"] == finished.trainable_params
    assert found["trained_on"]["format"] == "nf4"


def test_a_model() -> None:
    found = inspect(demo.base_path())
    assert (found["kind"], found["architecture"]) == ("model", "LlamaForCausalLM")
    assert sum(found["bytes_by_dtype"].values()) == found["bytes"]


@pytest.mark.parametrize("text", ["", "{", "[]"])
def test_a_broken_adapter_config_is_named(finished: RunResult, tmp_path: Path, text: str) -> None:
    adapter = shutil.copytree(finished.weights, tmp_path / "a")
    (adapter / "adapter_config.json").write_text(text)
    with pytest.raises(AdapterError, match=r"adapter_config\.json"):
        inspect(adapter)


def test_cut_weights_are_named(finished: RunResult, tmp_path: Path) -> None:
    adapter = shutil.copytree(finished.weights, tmp_path / "a")
    weights = adapter / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:3000])
    with pytest.raises(DecalError, match=r"adapter_model\.safetensors"):
        inspect(adapter)
    base = shutil.copytree(demo.base_path(), tmp_path / "b")
    weights = base / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100_000])
    with pytest.raises(BaseModelError, match="is damaged"):
        inspect(base)


def test_a_run_in_progress_can_be_looked_at(tmp_path: Path) -> None:
    """Mutation: hold the folder's lock to read it."""
    with RunFolder.create(tmp_path / "r", "base: x\n") as run:
        run.append_metrics({"step": 3, "loss": 1.0})
        found = inspect(tmp_path / "r")
    assert (found["finished"], found["last_step"]) == (False, 3)


def test_a_corrupt_info_is_named(tmp_path: Path) -> None:
    with RunFolder.create(tmp_path / "r", "base: x\n"):
        (tmp_path / "r" / "info.json").write_text("{")
    with pytest.raises(DecalError, match=r"info\.json"):
        inspect(tmp_path / "r")
