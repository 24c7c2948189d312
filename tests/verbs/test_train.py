"""A run from settings to adapter: what it leaves, and that stopping changes nothing."""

from __future__ import annotations

import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from decal import demo
from decal.errors import (
    BaseModelError,
    ConfigError,
    DataError,
    Interrupted,
    OutputError,
    TargetError,
)
from decal.model.adapter import Adapter
from decal.train.events import StepDone
from decal.verbs.train import RunResult, train
from tests.verbs.conftest import STEPS, settings

VARYING = {"seconds"}


def metrics(run: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k not in VARYING} for row in rows]


def test_a_run_leaves_what_it_says(finished: RunResult) -> None:
    run = finished.run
    names = {"run.yaml", "info.json", "metrics.jsonl", "loss.png", "checkpoints", "adapter"}
    assert names <= {p.name for p in run.iterdir()}
    steps = [row for row in metrics(run) if "loss" in row]
    assert [row["step"] for row in steps] == list(range(1, STEPS + 1))
    first, last = (loss for _, loss in finished.result.eval_curve)
    assert last < first
    info = json.loads((run / "info.json").read_text())
    assert info["quantizer_identity"]
    assert info["base_fingerprint"]
    assert info["result"]["steps"] == STEPS
    assert (run / "loss.png").read_bytes()[:4] == b"\x89PNG"


def test_every_adapter_tensor_was_trained(finished: RunResult) -> None:
    """Mutation: leave one target frozen, or save the starting values."""
    tensors = load_file(finished.weights / "adapter_model.safetensors")
    assert len(tensors) == 2 * 28
    assert all(bool(t.any()) for t in tensors.values())
    assert finished.trainable_params == sum(t.numel() for t in tensors.values())


def test_an_interrupted_and_resumed_run_is_the_run_that_never_stopped(
    finished: RunResult, tmp_path: Path
) -> None:
    """Adapter, metrics and losses to the bit, with dropout, quantized base and evaluation.

    Mutation: do not restore the optimizer, or seed dropout by the step of this sitting.
    """

    def stop_in_step_three(event: Any) -> None:
        if isinstance(event, StepDone) and event.step == 3:
            os.kill(os.getpid(), signal.SIGINT)

    config = settings(tmp_path)
    with pytest.raises(Interrupted):
        train(config, observe=stop_in_step_three)
    assert not (tmp_path / "run" / "adapter").exists()
    resumed = train(config, resume=True)
    assert resumed is not None
    ours = load_file(resumed.weights / "adapter_model.safetensors")
    theirs = load_file(finished.weights / "adapter_model.safetensors")
    ends = [Adapter.from_pretrained(done.weights).metadata for done in (resumed, finished)]
    assert ends[0] == ends[1]
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    assert metrics(resumed.run) == metrics(finished.run)


def test_micro_batches_change_nothing_but_rounding(tmp_path: Path) -> None:
    """One forward of all samples against many small ones, in float32: losses to 1e-4 relative.

    Mutation: divide each micro-batch by its own count of trained tokens.
    """
    curves = []
    for budget in (4096, 100):
        folder = tmp_path / str(budget)
        folder.mkdir()
        done = train(
            settings(
                folder,
                base={"path": str(demo.base_path()), "dtype": "float32"},
                train={"max_steps": 3, "batch_size": 8, "micro_batch_tokens": budget, "lr": 2e-3},
            )
        )
        assert done is not None
        curves.append([loss for _, loss in done.result.curve])
    assert curves[0] == pytest.approx(curves[1], rel=1e-4)


def test_gradient_checkpointing_changes_nothing(finished: RunResult, tmp_path: Path) -> None:
    """The recomputed forward draws the same dropout, so the losses are the same.

    Mutation: recompute without the routing of the forward pass.
    """
    sections = {"max_steps": STEPS, "batch_size": 8, "lr": 2e-3, "eval_every": 4}
    done = train(settings(tmp_path, train={**sections, "gradient_checkpointing": True}))
    assert done is not None
    assert done.result.curve == finished.result.curve


def test_full_fine_tuning_leaves_a_model(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    config = settings(
        tmp_path,
        quant="none",
        adapter={"method": "full"},
        train={"max_steps": 3, "batch_size": 8, "lr": 5e-4},
    )
    done = train(config)
    assert done is not None
    assert done.weights.name == "model"
    assert done.trainable_params == done.total_params
    again = AutoModelForCausalLM.from_pretrained(done.weights, dtype="auto")
    for name, tensor in done.session.model.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name


def test_a_dry_run_writes_nothing(tmp_path: Path) -> None:
    lines: list[str] = []
    assert train(settings(tmp_path), dry_run=True, say=lines.append) is None
    assert not (tmp_path / "run").exists()
    assert any("trainable params:" in line for line in lines)


def test_a_second_run_into_the_folder_is_refused_before_anything_is_loaded(
    finished: RunResult,
) -> None:
    config = finished.session.config
    before = {p: p.stat().st_mtime_ns for p in finished.run.rglob("*")}
    with pytest.raises(OutputError, match="not empty"):
        train(config)
    assert {p: p.stat().st_mtime_ns for p in finished.run.rglob("*")} == before


def test_resuming_with_other_settings_is_refused(finished: RunResult) -> None:
    config = finished.session.config
    other = config.model_copy(update={"train": config.train.model_copy(update={"lr": 1e-4})})
    with pytest.raises(ConfigError, match="1 settings differ") as caught:
        train(other, resume=True)
    assert "train.lr" in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "error", "says"),
    [
        ({"base": "nowhere/at/all"}, BaseModelError, "no model at"),
        ({"data": {"path": "nowhere.jsonl"}}, DataError, "nowhere.jsonl"),
        ({"adapter": {"r": 4, "target_modules": ["q_porj"]}}, TargetError, "q_porj"),
        ({"adapter": {"r": 4, "target_modules": ["q_proj", "norm"]}}, TargetError, "norm"),
    ],
)
def test_what_is_not_there_is_named_and_nothing_is_written(
    tmp_path: Path, changes: dict[str, Any], error: type[Exception], says: str
) -> None:
    with pytest.raises(error, match=says):
        train(settings(tmp_path, **changes))
    assert not (tmp_path / "run").exists()


def test_an_output_that_holds_the_base_is_refused(tmp_path: Path) -> None:
    """--force would remove the base it is about to load."""
    shutil.copytree(demo.base_path(), tmp_path / "run" / "model")
    config = settings(tmp_path, base=str(tmp_path / "run" / "model"))
    with pytest.raises(OutputError, match="holds the base"):
        train(config, force=True)
    assert (tmp_path / "run" / "model" / "model.safetensors").exists()


def test_a_device_that_is_not_there_is_named(tmp_path: Path) -> None:
    base = {"path": str(demo.base_path()), "device": "cuda:77"}
    with pytest.raises(BaseModelError, match="cuda:77"):
        train(settings(tmp_path, base=base))


def test_training_goes_on_from_an_adapter(finished: RunResult, tmp_path: Path) -> None:
    """Fails when a new adapter is started instead, or the old one's rank and alpha are not kept."""
    lines: list[str] = []
    again = settings(
        tmp_path,
        adapter={"from": str(finished.run)},
        train={"max_steps": 1, "batch_size": 8, "lr": 1e-9, "warmup": 0.0},
    )
    done = train(again, say=lines.append)
    assert done is not None
    before, after = (Adapter.from_pretrained(run.weights) for run in (finished, done))
    assert after.config == before.config
    for module, (A, B, *_) in before.tensors.items():
        torch.testing.assert_close(after.tensors[module][0], A, rtol=0, atol=1e-7)
        torch.testing.assert_close(after.tensors[module][1], B, rtol=0, atol=1e-7)
    assert any("going on with adapter" in line for line in lines)


def test_going_on_into_the_same_folder_is_refused(finished: RunResult, tmp_path: Path) -> None:
    """Fails when --force removes the run whose adapter is needed."""
    config = settings(tmp_path, adapter={"from": str(finished.weights)}, output=str(finished.run))
    with pytest.raises(OutputError, match="holds the adapter"):
        train(config, force=True)


def test_rows_beyond_the_context_are_refused(tmp_path: Path) -> None:
    """Fails when positions without an embedding reach the model."""
    data = tmp_path / "long.jsonl"
    long = "word " * 700
    data.write_text(json.dumps({"prompt": long, "completion": " end"}) + "\n")
    config = settings(tmp_path, data={"path": str(data), "eval": None}, train={"max_steps": 1})
    with pytest.raises(DataError, match="longer than the model's context of 512") as error:
        train(config)
    assert error.value.hint == "set `data.max_length: 512`"
