"""`inspect`: what it reads of runs, adapters and models, and that it changes nothing."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from decal import demo
from decal.config import LoraConfig
from decal.errors import AdapterError, BaseModelError, DecalError
from decal.quant import quant_format
from decal.quant.base import Recipe
from decal.quant.bnb import to_bnb
from decal.store.peft import LoraTensors, PeftAdapter, write_adapter
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
    assert found["settings"]["adapter"] == "lora"
    assert found["losses"]["best_eval"] == found["result"]["best_eval_loss"]
    assert "resumes_from" not in found
    assert json.loads(json.dumps(found)) == found


def test_other_ranks_have_rows_of_their_own(tmp_path: Path) -> None:
    """Mutation: show the config's r for every module, or forget B's bias in the count."""
    config = LoraConfig(
        r=3,
        lora_alpha=7,
        target_modules=("q", "v"),
        rank_pattern={"0.q": 5},
        alpha_pattern={"v": 11},
        lora_bias=True,
        use_rslora=True,
    )
    tensors = {
        f"l.{i}.{name}": LoraTensors(torch.ones(r, 9), torch.ones(13, r), torch.ones(13))
        for i in (0, 1)
        for name in "qv"
        if (r := config.rank_of(f"l.{i}.{name}"))
    }
    write_adapter(tmp_path / "a", PeftAdapter(config=config, tensors=tensors))
    found = inspect(tmp_path / "a")
    rows = [(row["module"], row["count"], row["r"], row["lora_alpha"]) for row in found["modules"]]
    assert rows == [("q", 1, 3, 7.0), ("q", 1, 5, 7.0), ("v", 2, 3, 11.0)]
    assert found["parameters"] == (3 * 3 + 5) * 22 + 4 * 13
    assert found["lora_bias"] is True


def test_other_files_are_no_part_of_an_adapter(finished: RunResult, tmp_path: Path) -> None:
    """Mutation: add up everything in the folder."""
    adapter = shutil.copytree(finished.weights, tmp_path / "a")
    before = inspect(adapter)["bytes"]
    (adapter / "optimizer.pt").write_bytes(bytes(100_000))
    assert inspect(adapter)["bytes"] == before < 400_000


def test_an_adapter(finished: RunResult) -> None:
    """Mutation: count A alone, or show alpha as the scaling."""
    found = inspect(finished.weights)
    assert (found["kind"], found["r"], found["lora_alpha"]) == ("adapter", 4, 10)
    assert found["scaling"] == 2.5
    rows = {row["module"]: row for row in found["modules"]}
    assert (found["layers"], len(rows), rows["q_proj"]["count"]) == (28, 7, 4)
    assert (rows["q_proj"]["r"], rows["q_proj"]["lora_alpha"]) == (4, 10)
    assert sum(row["parameters"] for row in rows.values()) == found["parameters"]
    assert found["parameters"] == finished.trainable_params
    assert found["trained_on"]["format"] == "nf4"


def test_a_model() -> None:
    found = inspect(demo.base_path())
    assert (found["kind"], found["architecture"]) == ("model", "LlamaForCausalLM")
    assert sum(found["bytes_by_dtype"].values()) == found["bytes"]


def _folder(path: Path, tensors: dict[str, torch.Tensor], **config: Any) -> Path:
    path.mkdir()
    (path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    return path


@pytest.mark.parametrize(("double", "bits"), [(True, 4.127), (False, 4.5)])
def test_a_quantized_model(tmp_path: Path, double: bool, bits: float) -> None:
    """Mutation: count packed bytes as weights, or leave the scales out of the bits."""
    recipe = Recipe(format="nf4", block_size=64, double=double)
    weight = torch.randn(512, 1024)
    parts = to_bnb("l.0.q", quant_format("nf4").quantize(weight, recipe))
    plain = {"embed.weight": torch.ones(11, 6).bfloat16(), "norm.weight": torch.ones(7)}
    settings = {"quant_method": "bitsandbytes", "bnb_4bit_compute_dtype": "bfloat16"}
    folder = _folder(tmp_path / "m", {**parts, **plain}, quantization_config=settings)
    found = inspect(folder)
    quantization = found["quantization"]
    assert quantization["parameters"] == 512 * 1024
    assert quantization["bits_per_weight"] == pytest.approx(bits, abs=0.03)
    assert (quantization["format"], quantization["block_size"]) == ("nf4", 64)
    assert (quantization["double"], quantization["compute_dtype"]) == (double, "bfloat16")
    assert found["parameters"] == 512 * 1024 + 66 + 7
    assert [(row["module"], row["dtype"]) for row in found["not_quantized"]] == [
        ("embed", "BF16"),
        ("norm", "F32"),
    ]


def test_an_int8_model(tmp_path: Path) -> None:
    """Mutation: take the scales of LLM.int8 for weights."""
    parts = {
        "l.0.q.weight": torch.ones(24, 40, dtype=torch.int8),
        "l.0.q.SCB": torch.ones(24),
        "l.0.q.weight_format": torch.zeros((), dtype=torch.uint8),
    }
    settings = {"quant_method": "bitsandbytes", "load_in_8bit": True}
    found = inspect(_folder(tmp_path / "m", parts, quantization_config=settings))
    assert found["quantization"]["format"] == "int8"
    assert found["parameters"] == 24 * 40
    assert found["not_quantized"] == []


def test_the_packing_of_another_tool_is_named(tmp_path: Path) -> None:
    """Mutation: call packed integers parameters."""
    tensors = {"l.0.q.qweight": torch.ones(4, 4, dtype=torch.int32)}
    folder = _folder(tmp_path / "m", tensors, quantization_config={"quant_method": "gptq"})
    found = inspect(folder)
    assert found["quantization"] == {"method": "gptq"}
    assert "parameters" not in found


def test_a_hundred_gigabytes_take_no_longer(tmp_path: Path) -> None:
    """The file is sparse: a header and a length. Mutation: map or read a tensor."""
    shape, count = [50_000, 10_000], 100
    step = 2 * shape[0] * shape[1]
    header = {
        f"model.layers.{i}.w.weight": {
            "dtype": "BF16",
            "shape": shape,
            "data_offsets": [i * step, (i + 1) * step],
        }
        for i in range(count)
    }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    (tmp_path / "config.json").write_text("{}")
    with (tmp_path / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + count * step)
    began = time.process_time()
    found = inspect(tmp_path)
    assert time.process_time() - began < 2
    assert found["bytes"] == count * step == 100_000_000_000
    assert found["parameters"] == count * shape[0] * shape[1]


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
    assert found["resumes_from"] is None
    assert found["settings"].startswith("cannot be read: ")


def test_a_stopped_run_says_where_it_goes_on(tmp_path: Path) -> None:
    """Mutation: name the last step of the metrics, which is lost."""
    with RunFolder.create(tmp_path / "r", "base: b\ndata: d.jsonl\noutput: r\n") as run:
        for step in (1, 2, 3):
            run.append_metrics({"step": step, "loss": 5.0 - step})
        run.append_metrics({"step": 3, "eval_loss": 2.5})
        run.write_checkpoint(2, {"trainable": {"w": torch.ones(1)}}, {"step": 2})
    found = inspect(tmp_path / "r")
    assert (found["last_step"], found["resumes_from"]) == (3, 2)
    assert found["losses"] == {"first": 4.0, "last": 2.0, "best_eval": 2.5, "best_eval_step": 3}
    assert (found["settings"]["base"], found["settings"]["epochs"]) == ("b", 3)


def test_a_corrupt_info_is_named(tmp_path: Path) -> None:
    with RunFolder.create(tmp_path / "r", "base: x\n"):
        (tmp_path / "r" / "info.json").write_text("{")
    with pytest.raises(DecalError, match=r"info\.json"):
        inspect(tmp_path / "r")
