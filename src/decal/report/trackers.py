"""Curves for TensorBoard and Weights & Biases, beside metrics.jsonl.

`Trackers` is one observer of a training. An event is anything that has a `step` and numbers under
the names of `CURVES`; the loop's classes are not known here. Nothing is imported unless it is asked
for, a missing package is found before anything is spent (`require`), and after that no tracker can
end a run: the first failure is said once and the tracker is let go. metrics.jsonl has everything.

A resumed run does the steps after its checkpoint again. TensorBoard is told so (`purge_step`: the
old points from the first new step on are dropped), which is why its writer opens at the first
number. Weights & Biases cannot take points back, but the new ones are the same to the bit; they go
to the same run, whose id is kept in the run folder, with the step as an ordinary column: its own
counter refuses to go back.
"""

from __future__ import annotations

import importlib
import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from decal.errors import ConfigError

CURVES = {
    "loss": "train/loss",
    "lr": "train/lr",
    "grad_norm": "train/grad_norm",
    "tokens_per_second": "train/tokens_per_second",
    "eval_loss": "eval/loss",
}
"""Field of an event -> name of its curve."""
FLUSH_SECONDS = 20
MODULES = {"tensorboard": "torch.utils.tensorboard", "wandb": "wandb"}
"""Name in `train.report_to`, which is also the package's -> what is imported."""


class Tracker(Protocol):
    """Somewhere that curves go; any exception ends its use, not the run."""

    def log(self, step: int, values: Mapping[str, float]) -> None: ...

    def close(self, finished: bool) -> None: ...


def require(names: Sequence[str]) -> None:
    """Raises ConfigError unless the packages of these trackers can be imported."""
    missing = []
    for name in names:
        try:
            importlib.import_module(MODULES[name])
        except ImportError as error:
            missing.append((name, error))
    if missing:
        raise ConfigError(
            f"{len(missing)} of {len(names)} trackers in `train.report_to` cannot be imported",
            details=[f"{name}: {error}" for name, error in missing],
            hint=f"pip install {' '.join(name for name, _ in missing)}, or leave them out",
        )


class TensorBoard:
    """Event files in `<run>/tensorboard`."""

    def __init__(self, run: Path, settings: Mapping[str, Any]):
        self._folder = run / "tensorboard"
        self._writer: Any = None

    def log(self, step: int, values: Mapping[str, float]) -> None:
        if self._writer is None:
            module = importlib.import_module(MODULES["tensorboard"])
            self._writer = module.SummaryWriter(
                str(self._folder), purge_step=step, flush_secs=FLUSH_SECONDS
            )
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self, finished: bool) -> None:
        if self._writer is not None:
            self._writer.close()


class Wandb:
    """A run of Weights & Biases, named like the run folder; WANDB_* variables say where it goes."""

    def __init__(self, run: Path, settings: Mapping[str, Any]):
        wandb = importlib.import_module(MODULES["wandb"])
        self._run = wandb.init(
            dir=str(run), name=run.name, id=_run_id(run), resume="allow", config=dict(settings)
        )
        self._run.define_metric("*", step_metric="step")

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log({"step": step, **values})

    def close(self, finished: bool) -> None:
        self._run.finish(exit_code=0 if finished else 1)


def _run_id(run: Path) -> str:
    """The id of the Weights & Biases run that belongs to a run folder, made up on first use."""
    path = run / "wandb" / "decal-run-id"
    if not path.exists():
        path.parent.mkdir(exist_ok=True)
        path.write_text(secrets.token_hex(4), encoding="utf-8")
    return path.read_text(encoding="utf-8").strip()


TRACKERS: dict[str, Callable[[Path, Mapping[str, Any]], Tracker]] = {
    "tensorboard": TensorBoard,
    "wandb": Wandb,
}


class Trackers:
    """All trackers of a run as one observer; see `tracking`."""

    def __init__(self, warn: Callable[[str], None]):
        self._warn = warn
        self._open: dict[str, Tracker] = {}

    def start(self, name: str, run: Path, settings: Mapping[str, Any]) -> None:
        """Takes one tracker into use."""
        with self._surviving(name):
            self._open[name] = TRACKERS[name](run, settings)

    def observe(self, event: object) -> None:
        """Takes one event of a training."""
        found = ((curve, getattr(event, field, None)) for field, curve in CURVES.items())
        values = {curve: value for curve, value in found if value is not None}
        if values:
            for name, tracker in list(self._open.items()):
                with self._surviving(name):
                    tracker.log(event.step, values)  # type: ignore[attr-defined]

    def close(self, *, finished: bool) -> None:
        """Writes what is left; `finished` is False where the training ended with an error."""
        for name, tracker in list(self._open.items()):
            with self._surviving(name):
                tracker.close(finished)

    @contextmanager
    def _surviving(self, name: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # a network, a disk, somebody else's code
            self._open.pop(name, None)
            reason = str(error).partition("\n")[0] or type(error).__name__
            self._warn(f"{name} gets no more metrics ({reason}); metrics.jsonl has all of them")


@contextmanager
def tracking(
    names: Sequence[str], run: Path, settings: Mapping[str, Any], warn: Callable[[str], None]
) -> Iterator[Trackers]:
    """Trackers in use for the length of a block.

    Args:
        names: of `train.report_to`.
        run: the run folder; TensorBoard's files go to `<run>/tensorboard`, those of Weights &
            Biases to `<run>/wandb`.
        settings: of the run, plain values, shown where a tracker shows settings.
        warn: called once for each tracker that fails.
    """
    trackers = Trackers(warn)
    for name in names:
        trackers.start(name, run, settings)
    finished = False
    try:
        yield trackers
        finished = True
    finally:
        trackers.close(finished=finished)
