"""What a run must remember to go on as if it had never stopped, and nothing else.

A checkpoint is three files: the trainable tensors, the optimizer's tensors, and state.json with
everything that is not a tensor of the model: the step (which is also the position in the data),
the best evaluation so far and how many came after it, the loss scale, which tensors had a gradient,
torch's random generators, counters, and the circumstances (versions, threads, settings) under which
"to the bit" holds. Knows no file formats; the run folder writes and reads.

The curves are not in it: metrics.jsonl has them. Where that file was lost the run goes on without
the old part of its curves, and says so.

The random generators are kept although decal's dropout and data order are hashes of the seed: a
base model or a loss of somebody else's may draw from them.
"""

from __future__ import annotations

import base64
import math
import platform
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from torch import Tensor

from decal.errors import StorageError
from decal.train import eightbit
from decal.train.events import Checkpoint, Job, Note, Saved
from decal.train.optim import Optimizer, misfit

PACKAGES = ("decal", "torch", "transformers")
PLAIN = (
    "stale",
    "loss",
    "eval_loss",
    "skipped",
    "tokens",
    "trained_tokens",
    "step_seconds",
    "micro_batch_tokens",
)
"""Fields of Progress that are entries of state.json as they are."""


@dataclass
class Progress:
    """How far the run has come."""

    step: int = 0
    """Optimizer steps done."""
    best_loss: float | None = None
    best_step: int | None = None
    stale: int = 0
    """Evaluations since the best one; early stopping goes by it."""
    loss: float = math.nan
    """Of the last step."""
    eval_loss: float | None = None
    """Of the last evaluation."""
    skipped: int = 0
    """Steps whose update was skipped because float16 gradients overflowed."""
    tokens: int = 0
    trained_tokens: int = 0
    step_seconds: float = 0.0
    """In steps alone."""
    micro_batch_tokens: int | None = None
    """Most tokens in a forward pass since memory ran out; None if it never did."""
    seconds: float = 0.0
    """Wall time of the sittings before this one."""
    halted: str | None = None
    """Why whoever compares trainings ended this one; not part of a checkpoint."""
    curve: list[tuple[int, float]] = field(default_factory=list)
    eval_curve: list[tuple[int, float]] = field(default_factory=list)


def circumstances(job: Job, device: torch.device) -> dict[str, Any]:
    """What must be equal for two runs to agree to the bit."""
    versions = {}
    eight = job.settings.optimizer in eightbit.CLASSES
    for name in (*PACKAGES, "bitsandbytes") if eight else PACKAGES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = "none"
    cuda = device.type == "cuda"
    return {
        **versions,
        "threads": torch.get_num_threads(),
        "machine": platform.machine(),
        "isa": torch.backends.cpu.get_cpu_capability(),
        "device": torch.cuda.get_device_name(device) if cuda else device.type,
    }


def save(job: Job, optimizer: Optimizer, progress: Progress, seconds: float) -> None:
    """Writes the checkpoint of the current step.

    Raises:
        StorageError: the disk refused; the previous checkpoint is as it was.
    """
    files = {"trainable": job.parameters, "optimizer": optimizer.tensors()}
    tensors = {
        stem: {name: t.detach().cpu() for name, t in named.items()} for stem, named in files.items()
    }
    state = _state(job, optimizer, progress, seconds)
    job.run.write_checkpoint(progress.step, tensors, state, best=progress.best_step)
    job.observe(Saved(step=progress.step))


def _state(job: Job, optimizer: Optimizer, progress: Progress, seconds: float) -> dict[str, Any]:
    """What state.json says of this moment."""
    best = {"step": progress.best_step, "loss": progress.best_loss}
    return {
        "step": progress.step,
        "best": best if progress.best_step is not None else None,
        "scaler": optimizer.scaler_state(),
        "rng": _generators(optimizer.device),
        "heard": optimizer.heard.state(),
        **{name: getattr(progress, name) for name in PLAIN},
        "seconds": seconds,
        "circumstances": circumstances(job, optimizer.device),
        "settings": job.settings.model_dump(mode="json"),
    }


def _checked(found: Checkpoint, meant: Mapping[str, Any]) -> Mapping[str, Any]:
    """The state of a checkpoint, if it has the entries of `meant`, each of its kind.

    Raises:
        StorageError: another version of decal wrote it, or somebody else.
    """
    state = found.state
    # What may differ from run to run is asked for its kind only: a device, a new setting.
    loose: dict[str, Any] = {"rng": {"cpu": ""}, "circumstances": {}, "settings": {}}
    if state.get("best") is not None:
        loose["best"] = {"step": 0, "loss": 0.0}
    wrong = [k for k, value in {**meant, **loose}.items() if not _alike(value, state.get(k))]
    if not wrong and not _is_generators(state["rng"], meant["rng"]):
        wrong = ["rng"]
    if wrong:
        raise StorageError(
            f"the checkpoint of step {found.step} is not of this version of decal: {len(wrong)}"
            " entries of its state are missing or of another kind",
            details=[f"first: {wrong[0]}"],
            hint="go on with the decal that began the run, or start over with --force",
        )
    return state


def _is_generators(given: Mapping[str, Any], now: Mapping[str, str]) -> bool:
    """Whether texts hold bytes, and as many as a generator of this torch takes."""
    try:
        sizes = {key: len(base64.b64decode(text, validate=True)) for key, text in given.items()}
    except (TypeError, ValueError):
        return False
    wanted = {key: len(base64.b64decode(text)) for key, text in now.items()}
    return all(sizes.get(key, size) == size for key, size in wanted.items())


def _alike(meant: object, given: object) -> bool:
    """Whether a JSON value is of the kind of another; what is null now may be a number."""
    if isinstance(meant, dict):
        if not isinstance(given, dict):
            return False
        return all(_alike(value, given.get(key)) for key, value in meant.items())
    if meant is None:
        return given is None or isinstance(given, int | float)
    if isinstance(meant, int | float):
        return isinstance(given, int | float)
    if isinstance(meant, list):
        return isinstance(given, list) and all(isinstance(item, str) for item in given)
    return isinstance(given, str) and isinstance(meant, str)


def require_space(job: Job, optimizer: Optimizer, saves: int) -> None:
    """Raises StorageError unless the disk has room for the run's checkpoints and its result."""
    weights = sum(p.nbytes for p in job.parameters.values())
    job.run.require_space(weights + optimizer.state_bytes(), saves, weights)


def start(job: Job, optimizer: Optimizer) -> Progress:
    """The beginning, or with `job.resume` the newest checkpoint, if there is one.

    Sets torch's generators (to the run's seed at the beginning: a run that was killed before its
    first checkpoint starts over as it was), and on resume parameters and optimizer. Metrics of
    later steps are dropped. Differences in settings or circumstances are warned of.

    Raises:
        TrainingError: the checkpoint belongs to other parameters.
    """
    found = job.run.latest_checkpoint() if job.resume else None
    if found is None:
        torch.manual_seed(job.settings.seed)
        job.run.truncate_metrics(0)
        return Progress()
    state = _checked(found, _state(job, optimizer, Progress(), 0.0))
    if found.warning:  # the damaged one goes when there is a better one in its place
        job.observe(Note(text=found.warning))
    else:
        job.run.rotate(found.step)
    _warn_of_changes(job, optimizer, state)
    load_trainable(job, found)
    optimizer.load(found.tensors("optimizer"), state["scaler"])
    optimizer.heard.load(state["heard"])
    _set_generators(state["rng"], optimizer.device)
    job.run.truncate_metrics(found.step)
    lines = job.run.metrics()
    progress = Progress(
        step=found.step,
        **{name: state[name] for name in PLAIN},
        seconds=state["seconds"],
        curve=[(line["step"], line["loss"]) for line in lines if "loss" in line],
        eval_curve=[(line["step"], line["eval_loss"]) for line in lines if "eval_loss" in line],
    )
    missing = found.step - len(progress.curve)
    if missing:
        text = f"metrics.jsonl lacks {missing} of the {found.step} steps: the curves have a gap"
        job.observe(Note(text=text))
    if state["best"] is not None:
        _take_best(job, progress, state["best"])
    return progress


def load_trainable(job: Job, found: Checkpoint) -> None:
    """Copies a checkpoint's weights into the parameters: a strict bijection of names and shapes."""
    saved = found.tensors("trainable")
    wrong = [f"{n}: not among the trainable tensors" for n in saved if n not in job.parameters]
    for name, parameter in job.parameters.items():
        if name not in saved:
            wrong.append(f"{name}: not in the checkpoint")
        elif _kind(saved[name]) != _kind(parameter):
            has, wants = _kind(saved[name]), _kind(parameter)
            wrong.append(f"{name}: the checkpoint has {has}, the model has {wants}")
    if wrong:
        raise misfit("weights", wrong)
    with torch.no_grad():
        for name, parameter in job.parameters.items():
            parameter.copy_(saved[name])


def _kind(tensor: Tensor) -> str:
    return f"{list(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"


def _take_best(job: Job, progress: Progress, best: Mapping[str, Any]) -> None:
    """Goes on comparing with the best so far, provided that its weights can still be read."""
    if best["step"] != progress.step:
        try:
            job.run.checkpoint(best["step"])
        except StorageError as error:
            text = f"the best weights so far (step {best['step']}) are lost: {error.message}"
            job.observe(Note(text=text))
            progress.stale = 0
            return
    progress.best_loss, progress.best_step = best["loss"], best["step"]


def _warn_of_changes(job: Job, optimizer: Optimizer, state: Mapping[str, Any]) -> None:
    now = circumstances(job, optimizer.device)
    changed = _differences(state["circumstances"], now)
    if changed:
        text = "the run goes on, but not to the bit as it would have: " + ", ".join(changed)
        job.observe(Note(text=text))
    changed = _differences(state["settings"], job.settings.model_dump(mode="json"))
    if changed:
        text = "the run goes on with other settings: " + ", ".join(changed)
        job.observe(Note(text=text))


def _differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    return [
        f"{key} was {before.get(key)}, is {now.get(key)}"
        for key in sorted({*before, *now})
        if before.get(key) != now.get(key)
    ]


def _generators(device: torch.device) -> dict[str, str]:
    states = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return {k: base64.b64encode(bytes(s.tolist())).decode() for k, s in states.items()}


def _set_generators(states: Mapping[str, str], device: torch.device) -> None:
    raw = {k: torch.tensor(list(base64.b64decode(s)), dtype=torch.uint8) for k, s in states.items()}
    torch.set_rng_state(raw["cpu"])
    if device.type == "cuda" and "cuda" in raw:
        torch.cuda.set_rng_state(raw["cuda"], device)
