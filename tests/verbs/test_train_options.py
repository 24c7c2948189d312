"""Settings of `train:` through a whole run: rates, trackers, early stopping, float16."""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from decal import demo
from decal.errors import ConfigError, Interrupted
from decal.train.events import Event, Note, StepDone
from decal.verbs.train import RunResult, train
from tests.verbs.conftest import settings


def stopping_in(step: int) -> Any:
    def observe(event: Event) -> None:
        if isinstance(event, StepDone) and event.step == step:
            os.kill(os.getpid(), signal.SIGINT)

    return observe


def straight_and_resumed(folder: Path, **changes: Any) -> tuple[RunResult, RunResult]:
    """A run, and one with the same settings that was stopped after step 3 and resumed."""
    (folder / "a").mkdir()
    (folder / "b").mkdir()
    whole = train(settings(folder / "a", **changes))
    config = settings(folder / "b", **changes)
    with pytest.raises(Interrupted):
        train(config, observe=stopping_in(3))
    resumed = train(config, resume=True)
    assert whole is not None
    assert resumed is not None
    return whole, resumed


def assert_same(one: RunResult, other: RunResult) -> None:
    ours, theirs = (load_file(r.weights / "adapter_model.safetensors") for r in (one, other))
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    assert one.result.curve == other.result.curve
    assert one.result.eval_curve == other.result.eval_curve


def test_rates_of_their_own_reach_the_tensors_and_survive_a_resume(tmp_path: Path) -> None:
    """LoRA+, a pattern and TensorBoard, stopped and resumed: adapter, losses and curves.

    In step 1 Adam moves every entry of B by its rate. Fails when a rate does not arrive.
    """
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    sections = {"max_steps": 5, "batch_size": 8, "lr": 1e-3, "eval_every": 3, "warmup": 0.0,
                "schedule": "inverse-sqrt", "loraplus_lr_ratio": 4.0, "lr_pattern": {"q_proj": 0.5},
                "report_to": ["tensorboard"], "keep": "last"}  # fmt: skip
    whole, resumed = straight_and_resumed(tmp_path, train=sections)
    assert_same(whole, resumed)
    for done in (whole, resumed):
        points = {}
        # One file at a time, oldest first: those of one second and one process are numbered, and
        # TensorBoard reads 10 before 9.
        for file in sorted((done.run / "tensorboard").iterdir(), key=lambda f: f.stat().st_mtime):
            found = reader.EventAccumulator(str(file)).Reload()
            points |= {e.step: e.value for e in found.Scalars("train/loss")}
        assert points == pytest.approx(dict(whole.result.curve), rel=1e-6)  # float32 in the file
    (tmp_path / "one").mkdir()
    one = train(settings(tmp_path / "one", train={**sections, "max_steps": 1}))
    assert one is not None
    for name, tensor in load_file(one.weights / "adapter_model.safetensors").items():
        if "lora_B" in name:
            rate = 4e-3 * (0.5 if "q_proj" in name else 1.0)
            moved = tensor.abs()[tensor != 0]
            assert float(moved.median()) == pytest.approx(rate, rel=0.01), name


def test_a_pattern_that_fits_nothing_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    """Also by a dry run. Fails when patterns are looked at in the loop."""
    config = settings(tmp_path, train={"lr_pattern": {"q_prj": 0.5}})
    for dry in (True, False):
        with pytest.raises(ConfigError, match="fit no trained module"):
            train(config, dry_run=dry)
    assert not (tmp_path / "run").exists()


def test_early_stopping_leaves_an_adapter_and_says_why(tmp_path: Path) -> None:
    """At a rate that ruins the model the second evaluation is no better than the first.

    Fails when the summary or info.json does not say that and why it stopped.
    """
    notes: list[Event] = []
    sections = {"max_steps": 8, "batch_size": 8, "lr": 0.5, "eval_every": 1, "early_stopping": 2}
    done = train(settings(tmp_path, train=sections), observe=notes.append)
    assert done is not None
    assert done.result.steps < 8
    stopped = str(done.result.stopped)
    assert stopped.startswith(f"stopped early after step {done.result.steps} of 8")
    assert json.loads((done.run / "info.json").read_text())["result"]["stopped"] == stopped
    assert stopped in [note.text for note in notes if isinstance(note, Note)]
    assert done.result.kept_step == done.result.best_step
    summary = done.summary()
    assert summary["stopped"] == stopped
    assert "skipped" not in summary


@pytest.mark.parametrize("name", ["early_stopping", "eval_every"])
def test_evaluation_settings_without_evaluation_data_are_refused(tmp_path: Path, name: str) -> None:
    """Fails when the setting does nothing."""
    data = {"path": str(tmp_path / "train.jsonl"), "eval": None}
    with pytest.raises(ConfigError, match=f"`train.{name}` is set, but `data.eval` is null"):
        train(settings(tmp_path, data=data, train={name: 2}))


def test_packages_that_are_not_there_are_named_before_the_base_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fails when the import waits for step 1."""
    for name in ("wandb", "bitsandbytes.optim"):
        monkeypatch.setitem(sys.modules, name, None)
    base = {"path": str(tmp_path / "no base here"), "device": "cpu"}
    for section in ({"report_to": ["wandb"]}, {"optimizer": "adamw8bit"}):
        with pytest.raises(ConfigError, match="cannot be imported"):
            train(settings(tmp_path, base=base, train=section))
    with pytest.raises(ConfigError, match="needs a GPU"):
        train(settings(tmp_path, base=base, train={"optimizer": "paged_adamw8bit"}))


def test_float16_trains_like_float32_and_resumes_exactly(tmp_path: Path) -> None:
    """Losses within float16's resolution (2^-10) of float32's, times 8 for the layers.

    Fails when the loss is not scaled back before the update, or the scale starts over on resume.
    """
    sections = {"max_steps": 4, "batch_size": 3, "lr": 2e-3, "eval_every": 4}
    path = str(demo.base_path())
    changes: dict[str, Any] = {"train": sections, "quant": "none"}
    half = {"path": path, "dtype": "float16"}
    whole, resumed = straight_and_resumed(tmp_path, base=half, **changes)
    assert_same(whole, resumed)
    rows = [json.loads(line) for line in (whole.run / "metrics.jsonl").read_text().splitlines()]
    assert [row["skipped"] for row in rows if "loss" in row] == [0] * 4
    (tmp_path / "c").mkdir()
    single = train(settings(tmp_path / "c", base={"path": path, "dtype": "float32"}, **changes))
    assert single is not None
    exact = [loss for _, loss in single.result.curve]
    assert [loss for _, loss in whole.result.curve] == pytest.approx(exact, rel=8 * 2.0**-10)
