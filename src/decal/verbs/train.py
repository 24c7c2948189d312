"""`decal train`: settings in, a run folder with a trained adapter out."""

from __future__ import annotations

import hashlib
import os
import platform
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers

from decal.config import FullConfig, RunConfig
from decal.data.pack import split
from decal.errors import ConfigError
from decal.model import hf
from decal.model.heap import give_back_freed
from decal.model.inject import trainable_parameters
from decal.report import trackers
from decal.report.plots import loss_png
from decal.runfile import dump_run, parse_run
from decal.store.files import atomic_folder, write_bytes
from decal.store.run import RunFolder
from decal.train.events import Event, Job, Note, Result, StepDone
from decal.train.exact import set_workspace
from decal.train.loop import train as run_loop
from decal.train.room import fitting
from decal.verbs.findings import before
from decal.verbs.inputs import look, refuse_own_output
from decal.verbs.load import save_adapter
from decal.verbs.provenance import run_facts
from decal.verbs.same_base import fingerprint_of
from decal.verbs.session import Say, Session, begin
from decal.version import __version__

MAY_CHANGE = ("output", "train.micro_batch_tokens", "train.gradient_checkpointing")
"""Settings that a resumed run may have otherwise: they cost memory or time, not the result."""
TIDY_EVERY = 32
"""Steps between two looks at the heap; one takes a few milliseconds."""


@dataclass(frozen=True, kw_only=True)
class RunResult:
    """A finished run."""

    run: Path
    weights: Path
    """The adapter folder, or the model folder of a full fine-tuning."""
    result: Result
    scores: dict[str, float]
    """`eval_accuracy` and `eval_macro_f1` of a classifier; empty for others."""
    trainable_params: int
    total_params: int
    session: Session
    """The model with its adapter, still loaded."""

    def summary(self) -> dict[str, Any]:
        """The run in a few facts, for printing; what did not happen is left out."""
        result = _result_info(self.result)
        rare = {key for key in ("stopped", "skipped", "micro_batch_tokens") if not result[key]}
        return {
            "run": str(self.run),
            "weights": str(self.weights),
            "trainable_params": self.trainable_params,
            "total_params": self.total_params,
            **{key: value for key, value in result.items() if key not in rare},
            **self.scores,
        }


def train(
    config: RunConfig,
    *,
    resume: bool = False,
    force: bool = False,
    dry_run: bool = False,
    check: bool = True,
    allow_other_base: bool = False,
    observe: Callable[[Event], None] | None = None,
    say: Say | None = None,
) -> RunResult | None:
    """Trains what `config` says into the run folder `config.output`.

    Args:
        resume: go on from the newest checkpoint of that folder; the settings must be the same,
            apart from `MAY_CHANGE`.
        force: remove an earlier run there.
        dry_run: stop before step 1; nothing is written and None is returned.
        check: look at data, targets and model as `decal check` does, beyond what cannot be trained
            at all: problems are errors, warnings are told to `observe`.
        allow_other_base: warn where an adapter to go on with (adapter.from) was trained on another
            base, instead of refusing.
        observe: called with every event of the loop.
        say: called with lines about what was found and done.

    Raises:
        ConfigError: settings that contradict each other or the run that is resumed.
        OutputError: the folder is in use.
        TrainingError, StorageError, Interrupted: see `decal.train.loop`.
        Whatever `prepare` raises.
    """
    set_workspace()
    say = say or (lambda line: None)
    observe = tidy(observe or (lambda event: None))
    refuse_own_output(config)
    ready = partial(_prepare, config, check, allow_other_base, observe, say)
    if dry_run:
        steps, size = ready().total_steps, config.train.batch_size
        say(f"{steps:,} steps of {size} samples; dry run, nothing written")
        return None
    if not resume:  # before the wait for model and data, and again when the folder is made
        RunFolder.check_new(config.output, force=force)
        session = ready()
    with open_run(config, resume=resume, force=force) as run:
        if resume:
            session = ready()
        write_info(session, run, config.output)
        with session.training(), reporting(config, run, observe) as report:
            result = run_loop(job_of(session, run, report, resume))
        weights, scores = finish(session, run, result)
    trainable, total = trainable_parameters(session.model)
    return RunResult(
        run=run.path,
        weights=weights,
        result=result,
        scores=scores,
        trainable_params=trainable,
        total_params=total,
        session=session,
    )


def finish(session: Session, run: RunFolder, result: Result) -> tuple[Path, dict[str, float]]:
    """Leaves weights, curve and result in the run folder; where the weights are, and scores."""
    session.model.eval()
    weights = _save(session, run, result)
    write_bytes(run.path / "loss.png", loss_png(run.metrics(), run.path.name))
    session.eval_batches = fitting(session.eval_batches, result.micro_batch_tokens)
    scores = session.scores()
    run.write_info({**run.info(), "result": {**_result_info(result), **scores}})
    return weights, scores


def _prepare(
    config: RunConfig,
    check: bool,
    allow_other_base: bool,
    observe: Callable[[Event], None],
    say: Say,
) -> Session:
    """The run, ready to begin; with `check` after a look at what is merely doubtful."""
    found = look(config)
    found.allow_other_base = allow_other_base
    for finding in before(found) if check and not found.problems else ():
        if finding.level == "problem":
            found.problems.append(finding.as_problem("--no-check trains anyway"))
        elif finding.level == "warning":
            observe(Note(text=finding.line()))
    return begin(found, say)


def tidy(observe: Callable[[Event], None]) -> Callable[[Event], None]:
    """Gives freed memory back now and then: steps of different lengths leave holes in the heap."""

    def watch(event: Event) -> None:
        if isinstance(event, StepDone) and event.step % TIDY_EVERY == 0:
            give_back_freed()
        observe(event)

    return watch


@contextmanager
def reporting(
    config: RunConfig, run: RunFolder, observe: Callable[[Event], None]
) -> Iterator[Callable[[Event], None]]:
    """The observer, after the trackers of `train.report_to`."""
    settings = config.model_dump(mode="json")

    def warn(text: str) -> None:
        observe(Note(text=text))

    with trackers.tracking(config.train.report_to, run.path, settings, warn) as tracking:

        def report(event: Event) -> None:
            tracking.observe(event)
            observe(event)

        yield report


def open_run(config: RunConfig, *, resume: bool, force: bool = False) -> RunFolder:
    """The run's folder, held: a new one, or that of the run that is resumed.

    Raises:
        ConfigError: it began with other settings.
        OutputError: it is in use.
    """
    if not resume:
        return RunFolder.create(config.output, dump_run(config), force=force)
    run = RunFolder.open(config.output)
    before = parse_run(run.settings, name=str(run.path / "run.yaml"))
    changed = _changed(before.model_dump(), config.model_dump())
    if changed:
        run.close()
        raise ConfigError(
            f"{len(changed)} settings differ from those the run `{config.output}` began with",
            details=changed[:1],
            hint=f"resume with the settings unchanged ({', '.join(MAY_CHANGE[1:])} may change), or "
            "start over with --force",
        )
    return run


def _changed(before: dict[str, Any], now: dict[str, Any], prefix: str = "") -> list[str]:
    lines = []
    for key in sorted(before.keys() | now.keys()):
        old, new = before.get(key), now.get(key)
        if isinstance(old, dict) and isinstance(new, dict):
            lines += _changed(old, new, f"{prefix}{key}.")
        elif old != new and prefix + key not in MAY_CHANGE:
            lines.append(f"{prefix}{key} was {old}, is {new}")
    return lines


def write_info(session: Session, run: RunFolder, output: str) -> None:
    """info.json of a new run; a resumed one must find the base and the data it began with."""
    before, now = run.info(), _info(session)
    if not before:  # a new run, or one that was killed before it got here
        run.write_info(now)
        return
    inputs = {"base_fingerprint": "base", "quantizer_identity": "quantized base", "data": "data"}
    changed = [
        f"{what}: {key} was {before[key]}, is {now[key]}"
        for key, what in inputs.items()
        if key in before and before[key] != now[key]
    ]
    if changed:
        raise ConfigError(
            f"the run `{output}` began with another {changed[0].partition(':')[0]}:"
            " going on would train something else than it says",
            details=changed,
            hint="put back what it began with, or start over with --force",
        )


def job_of(session: Session, run: RunFolder, observe: Callable[[Event], None], resume: bool) -> Job:
    """The session as a training."""
    return Job(
        loss=session.loss,
        parameters=session.parameters,
        steps=session.batches,
        eval_batches=session.eval_batches,
        settings=session.config.train,
        run=run,
        observe=observe,
        rates=session.rates,
        whole_model=isinstance(session.config.adapter, FullConfig),
        scale_loss=session.config.base.dtype == "float16",
        resume=resume,
    )


def _save(session: Session, run: RunFolder, result: Result) -> Path:
    if isinstance(session.config.adapter, FullConfig):
        out = run.path / "model"
        with atomic_folder(out, force=True) as place:
            session.model.save_pretrained(place)
            session.tokenizer.save_pretrained(place)
        return out
    out = run.path / "adapter"
    facts = run_facts(session.config, run.info(), result)
    save_adapter(session.model, out, session.adapter, force=True, run=facts)
    return out


def _info(session: Session) -> dict[str, Any]:
    return {
        "decal": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "machine": platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": str(session.model.device),
        "base_fingerprint": fingerprint_of(session.model),
        "quantizer_identity": hf.quantizer_identity(session.model),
        "layout": "flat" if session.flat else "padded",
        "data": _data_digest(session),
        "rows": len(session.samples),
        "steps": session.total_steps,
    }


def _data_digest(session: Session) -> str:
    """sha256 of all tokens and of which of them are trained: rows, tokenizer and chat template."""
    hashed = hashlib.sha256()
    for sample in session.samples:
        hashed.update(f"{sample.row} {len(sample)}\n".encode())
        hashed.update(sample.input_ids.tobytes() + sample.trained.tobytes())
    # One by one and in order of their rows: how they are cut into batches is not part of the data.
    alone = [part for batch in session.eval_batches for part in split(batch, 1)]
    for batch in sorted(alone, key=lambda part: part.rows):
        hashed.update(batch.input_ids.numpy().tobytes() + batch.targets.numpy().tobytes())
    return hashed.hexdigest()


def _result_info(result: Result) -> dict[str, Any]:
    return {
        "steps": result.steps,
        "stopped": result.stopped,
        "skipped": result.skipped,
        "micro_batch_tokens": result.micro_batch_tokens,
        "loss": result.loss,
        "eval_loss": result.eval_loss,
        "best_eval_loss": result.best_eval_loss,
        "best_step": result.best_step,
        "kept_step": result.kept_step,
        "seconds": result.seconds,
        "tokens": result.tokens,
        "trained_tokens": result.trained_tokens,
        "tokens_per_second": result.tokens_per_second,
        "peak_memory_bytes": result.memory.bytes,
    }
