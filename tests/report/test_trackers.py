"""Curves in TensorBoard's files, read back, and what a stand-in for wandb was told."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, get_args

import pytest

from decal.config import TrainConfig
from decal.errors import ConfigError
from decal.report.trackers import TRACKERS, require, tracking

SETTINGS = {"base": "tiny", "train": {"lr": 0.5}}


@dataclass
class Done:
    """A step, as the loop tells it."""

    step: int
    loss: float
    lr: float = 0.5
    grad_norm: float | None = 2.0
    tokens_per_second: float = 9.0
    total: int = 12


@dataclass
class Evaluated:
    step: int
    eval_loss: float
    best: bool = True


@dataclass
class Other:
    """An event without numbers that make a curve."""

    step: int
    batch: int = 1


class Told:
    """Takes warnings."""

    def __init__(self) -> None:
        self.texts: list[str] = []

    def __call__(self, text: str) -> None:
        self.texts.append(text)


def report(names: tuple[str, ...], run: Path, events: list[Any]) -> list[str]:
    told = Told()
    with tracking(names, run, SETTINGS, told) as trackers:
        for event in events:
            trackers.observe(event)
    return told.texts


def curves(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """All curves in the event files of a folder, as TensorBoard shows them."""
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    found = reader.EventAccumulator(str(folder))
    found.Reload()
    return {tag: [(e.step, e.value) for e in found.Scalars(tag)] for tag in found.Tags()["scalars"]}


def test_tensorboard_gets_every_curve(tmp_path: Path) -> None:
    """A skipped update has no norm; float32 in TensorBoard's files: values are binary fractions.

    Fails when a curve is left out, when the step is counted instead of told, or None is written.
    """
    pytest.importorskip("tensorboard")
    events = [Done(1, 3.5), Other(1), Done(2, 2.25, grad_norm=None), Evaluated(2, 2.5), Done(3, 2)]
    assert report(("tensorboard",), tmp_path, events) == []
    found = curves(tmp_path / "tensorboard")
    assert found == {
        "train/loss": [(1, 3.5), (2, 2.25), (3, 2.0)],
        "train/lr": [(1, 0.5), (2, 0.5), (3, 0.5)],
        "train/grad_norm": [(1, 2.0), (3, 2.0)],
        "train/tokens_per_second": [(1, 9.0), (2, 9.0), (3, 9.0)],
        "eval/loss": [(2, 2.5)],
    }


def test_a_resumed_run_goes_on_with_the_same_curves(tmp_path: Path) -> None:
    """Killed after step 5, resumed at step 3: the old points 3 to 5 are gone.

    Fails when purge_step is left out (two points for a step), or is the step of the checkpoint.
    """
    pytest.importorskip("tensorboard")
    report(("tensorboard",), tmp_path, [Done(k, float(k)) for k in range(1, 6)])
    report(("tensorboard",), tmp_path, [Done(k, 10.0 + k) for k in range(3, 8)])
    found = curves(tmp_path / "tensorboard")["train/loss"]
    assert found == [(1, 1.0), (2, 2.0), *[(k, 10.0 + k) for k in range(3, 8)]]


def test_a_run_that_ends_before_step_1_leaves_no_event_file(tmp_path: Path) -> None:
    """Fails when the writer opens with the run."""
    report(("tensorboard",), tmp_path, [Other(0)])
    assert not (tmp_path / "tensorboard").exists()


class StandIn(ModuleType):
    """The part of wandb that is used."""

    def __init__(self) -> None:
        super().__init__("wandb")
        self.began: list[dict[str, Any]] = []
        self.rows: list[dict[str, Any]] = []
        self.axes: list[tuple[str, str]] = []
        self.ended: list[int] = []
        self.fails: str | None = None

    def init(self, **settings: Any) -> StandIn:
        self._maybe("init")
        self.began.append(settings)
        return self

    def define_metric(self, name: str, step_metric: str) -> None:
        self.axes.append((name, step_metric))

    def log(self, row: dict[str, Any]) -> None:
        self._maybe("log")
        self.rows.append(row)

    def finish(self, exit_code: int) -> None:
        self._maybe("finish")
        self.ended.append(exit_code)

    def _maybe(self, what: str) -> None:
        if self.fails == what:
            raise RuntimeError(f"{what}: no network\nand a long story")


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch) -> StandIn:
    module = StandIn()
    monkeypatch.setitem(sys.modules, "wandb", module)
    return module


def test_wandb_gets_rows_with_their_step(wandb: StandIn, tmp_path: Path) -> None:
    """Fails when wandb's own counter is used: it drops what a resumed run tells again."""
    run = tmp_path / "tickets"
    run.mkdir()
    assert report(("wandb",), run, [Done(1, 3.5), Other(1), Evaluated(1, 2.5)]) == []
    assert wandb.rows == [
        {"step": 1, "train/loss": 3.5, "train/lr": 0.5, "train/grad_norm": 2.0,
         "train/tokens_per_second": 9.0},
        {"step": 1, "eval/loss": 2.5},
    ]  # fmt: skip
    (began,) = wandb.began
    assert (began["name"], began["dir"], began["config"]) == ("tickets", str(run), SETTINGS)
    assert wandb.axes == [("*", "step")]
    assert wandb.ended == [0]


def test_a_resumed_run_is_the_same_run_of_wandb(wandb: StandIn, tmp_path: Path) -> None:
    """And another folder is another. Fails when the id is made anew, or follows from the name."""
    for folder in ("a/run", "a/run", "b/run"):
        (tmp_path / folder).mkdir(parents=True, exist_ok=True)
        report(("wandb",), tmp_path / folder, [Done(1, 1.0)])
    first, second, other = (began["id"] for began in wandb.began)
    assert first == second != other
    assert {began["resume"] for began in wandb.began} == {"allow"}


def test_a_training_that_fails_is_failed_in_wandb(wandb: StandIn, tmp_path: Path) -> None:
    """The training's own error gets out. Fails when the run is closed as finished."""
    with pytest.raises(KeyError), tracking(("wandb",), tmp_path, SETTINGS, Told()):
        raise KeyError("nan")
    assert wandb.ended == [1]


@pytest.mark.parametrize("what", ["init", "log", "finish"])
def test_a_tracker_that_fails_is_said_once_and_let_go(
    wandb: StandIn, tmp_path: Path, what: str
) -> None:
    """The other tracker goes on. Fails when the error gets out or is said for every step."""
    pytest.importorskip("tensorboard")
    wandb.fails = what
    events = [Done(k, 1.0) for k in range(1, 5)]
    assert report(("wandb", "tensorboard"), tmp_path, events) == [
        f"wandb gets no more metrics ({what}: no network); metrics.jsonl has all of them"
    ]
    assert len(curves(tmp_path / "tensorboard")["train/loss"]) == 4


def test_a_missing_package_is_found_before_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails when one is missed, or when packages are imported that nobody asked for."""
    for name in ("torch.utils.tensorboard", "wandb"):
        monkeypatch.setitem(sys.modules, name, None)
    require(())
    with pytest.raises(ConfigError, match="2 of 2 trackers") as caught:
        require(("tensorboard", "wandb"))
    assert caught.value.hint == "pip install tensorboard wandb, or leave them out"
    assert caught.value.details[1].startswith("wandb: ")


def test_every_tracker_of_the_settings_is_there() -> None:
    """Fails when a name is added to the settings alone."""
    (literal, _) = get_args(TrainConfig.model_fields["report_to"].annotation)
    assert set(get_args(literal)) == set(TRACKERS)
