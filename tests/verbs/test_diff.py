"""`diff`: what differs is named, how far it is, and what is the same is called the same."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from decal import demo
from decal.config import LoraConfig
from decal.errors import BaseModelError, DecalError
from decal.store.peft import LoraTensors, PeftAdapter, write_adapter
from decal.verbs.diff import diff
from decal.verbs.train import RunResult


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def adapter(path: Path, change: float = 0.0, **settings: Any) -> Path:
    """Two modules and a head; `change` is added to one B."""
    config = LoraConfig(
        **{"r": 3, "lora_alpha": 7, "target_modules": ("q", "v"), "lora_bias": True, **settings}
    )
    generator = torch.Generator().manual_seed(5)
    tensors = {
        f"l.{name}": LoraTensors(
            torch.randn(config.r, 9, generator=generator),
            torch.randn(13, config.r, generator=generator),
            torch.ones(13),
        )
        for name in config.target_modules
    }
    tensors["l.q"].B.add_(change)
    write_adapter(path, PeftAdapter(config=config, tensors=tensors))
    return path


def test_a_copy_is_identical(tmp_path: Path) -> None:
    """Fails when the folder's name or peft's version counts."""
    a = adapter(tmp_path / "a")
    b = shutil.copytree(a, tmp_path / "b")
    raw = json.loads((b / "adapter_config.json").read_text())
    (b / "adapter_config.json").write_text(json.dumps({**raw, "peft_version": "0.1.0"}))
    found = diff(a, b)
    assert found["identical"] is True
    assert (found["different"], found["config"], found["compared"]) == ([], [], 4)


def test_only_the_changed_module_differs(tmp_path: Path) -> None:
    """Fails when the distance is of the factors and not of the deltas, or an equal one is named."""
    found = diff(adapter(tmp_path / "a"), adapter(tmp_path / "b", 0.5))
    assert found["identical"] is False
    (row,) = found["different"]
    weights = [load_file(tmp_path / x / "adapter_model.safetensors") for x in "ab"]
    prefix = "base_model.model.l.q.lora_"
    deltas = [w[f"{prefix}B.weight"].double() @ w[f"{prefix}A.weight"].double() for w in weights]
    wanted = (deltas[0] - deltas[1]).norm() / max(delta.norm() for delta in deltas)
    assert row == {"name": "l.q", "relative": pytest.approx(float(wanted), rel=1e-9)}
    assert found["relative"] == row["relative"]


def test_settings_and_modules_of_one_side(tmp_path: Path) -> None:
    """Fails when another alpha is not felt in the deltas and biases, or a lost module passes."""
    a = adapter(tmp_path / "a")
    b = adapter(tmp_path / "b", lora_alpha=14, target_modules=("q",))
    found = diff(a, b)
    assert [row["key"] for row in found["config"]] == ["lora_alpha", "target_modules"]
    assert found["only_in_a"] == ["l.v", "l.v.lora_B.bias"]
    assert found["only_in_b"] == []
    assert {row["name"]: row["relative"] for row in found["different"]} == {
        "l.q": pytest.approx(0.5),
        "l.q.lora_B.bias": pytest.approx(0.5),
    }


def test_an_adapter_is_no_model(finished: RunResult) -> None:
    """Fails when the two are compared, or the wrong one is called a model."""
    with pytest.raises(DecalError, match=r"is an adapter, `.*base` is a model"):
        diff(finished.run, demo.base_path())


def model(path: Path, tensors: dict[str, torch.Tensor], **config: Any) -> Path:
    path.mkdir()
    (path / "config.json").write_text(json.dumps({"hidden": 6, **config}))
    own = {name: tensor.clone() for name, tensor in tensors.items()}
    save_file(own, path / "model.safetensors", {"format": "pt"})
    return path


def test_models(tmp_path: Path) -> None:
    """Fails when a tensor of one side, a shape, a dtype or a nested setting is passed over."""
    generator = torch.Generator().manual_seed(1)
    same = torch.randn(5, 7, generator=generator)
    a = model(
        tmp_path / "a",
        {"same": same, "near": same, "gone": same, "wide": same, "half": same, "codes": same > 0},
        rope={"theta": 1, "kind": "x"},
        transformers_version="5.0",
    )
    b = model(
        tmp_path / "b",
        {
            "same": same,
            "near": same * 1.25,
            "new": same,
            "wide": torch.ones(7, 5),
            "half": same.bfloat16(),
            "codes": same < 0,
        },
        rope={"theta": 2, "kind": "x"},
        transformers_version="5.1",
    )
    (a / "tokenizer.json").write_text("{}")
    (a / "LICENSE").write_text("ours")
    seen: list[tuple[int, int]] = []
    found = diff(a, b, observe=lambda done, total: seen.append((done, total)))
    assert found["config"] == [{"key": "rope.theta", "a": 1, "b": 2}]
    assert [row["key"] for row in found["files"]] == ["tokenizer.json"]
    assert (found["only_in_a"], found["only_in_b"]) == (["gone"], ["new"])
    assert found["shapes"] == [{"name": "wide", "a": [5, 7], "b": [7, 5]}]
    assert found["dtypes"] == [{"name": "half", "a": "F32", "b": "BF16"}]
    assert (found["identical"], found["compared"]) == (False, 4)
    assert [row["name"] for row in found["different"]] == ["near", "half", "codes"]
    assert found["different"][0]["relative"] == pytest.approx(0.2, rel=1e-6)
    assert found["different"][2]["relative"] is None
    assert seen[-1][0] == seen[-1][1]
    assert json.loads(json.dumps(found)) == found


def test_equal_models_are_identical_however_they_are_sharded(tmp_path: Path) -> None:
    """Fails when files are compared instead of tensors."""
    tensors = {"x": torch.ones(3), "y": torch.ones(4)}
    a = model(tmp_path / "a", tensors)
    b = model(tmp_path / "b", {"x": tensors["x"]})
    (b / "model.safetensors").rename(b / "one.safetensors")
    save_file({"y": tensors["y"]}, b / "two.safetensors")
    index = {"weight_map": {"x": "one.safetensors", "y": "two.safetensors"}}
    (b / "model.safetensors.index.json").write_text(json.dumps(index))
    assert diff(a, b)["identical"] is True
    (b / "two.safetensors").unlink()
    with pytest.raises(BaseModelError, match="lacks 1 of 2 weight files"):
        diff(a, b)
