"""What a run leaves in its folder: settings, facts, weights, curve and report.

The same for a run of its own and for a candidate of a sweep. Knows no loop: what happens between
`write_info` and `finish` is somebody else's.
"""

from __future__ import annotations

import hashlib
import os
import platform
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers

from decal.config import FullConfig, RunConfig
from decal.data.pack import split
from decal.errors import ConfigError
from decal.model import hf
from decal.model.heap import give_back_freed
from decal.report.plots import loss_png
from decal.runfile import dump_run, parse_run
from decal.store.files import atomic_folder, write_bytes
from decal.store.run import RunFolder
from decal.train.events import Event, Job, Note, Result, StepDone
from decal.train.room import fitting
from decal.verbs.load import save_adapter
from decal.verbs.provenance import run_facts
from decal.verbs.report import NAME, report
from decal.verbs.same_base import fingerprint_of
from decal.verbs.session import Session
from decal.version import __version__

MAY_CHANGE = ("output", "train.micro_batch_tokens", "train.gradient_checkpointing")
"""Settings that a resumed run may have otherwise: they cost memory or time, not the result."""
TIDY_EVERY = 32
"""Steps between two looks at the heap; one takes a few milliseconds."""


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


def write_info(session: Session, run: RunFolder, expected: Mapping[str, Any]) -> None:
    """info.json of a run that is about to begin; `expected` is the memory it is planned to take.

    Raises ConfigError where a resumed run finds another base or other data than it began with.
    """
    before, now = run.info(), {**_info(session), "planned": dict(expected)}
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
            f"the run `{session.config.output}` began with another {changed[0].partition(':')[0]}:"
            " going on would train something else than it says",
            details=changed,
            hint="put back what it began with, or start over with --force",
        )
    run.write_info({**before, "planned": now["planned"]})


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


def finish(
    session: Session, run: RunFolder, result: Result, observe: Callable[[Event], None]
) -> tuple[Path, dict[str, float]]:
    """Leaves weights, curve, result and report in the run folder; gives the weights' place, and
    scores."""
    session.model.eval()
    weights = _save(session, run, result)
    write_bytes(run.path / "loss.png", loss_png(run.metrics(), run.path.name))
    session.eval_batches = fitting(session.eval_batches, result.micro_batch_tokens)
    scores = session.scores()
    found = {**result_info(result), **_sizes(session, weights), **scores}
    run.write_info({**run.info(), "result": found})
    _write_report(run, observe)
    return weights, scores


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


def _sizes(session: Session, weights: Path) -> dict[str, int]:
    trainable, total = session.sizes()
    nbytes = sum(file.stat().st_size for file in weights.rglob("*") if file.is_file())
    return {"trainable_params": trainable, "total_params": total, "adapter_bytes": nbytes}


def _write_report(run: RunFolder, observe: Callable[[Event], None]) -> None:
    """The run's page. The run is whole without it, so nothing that goes wrong here ends it."""
    try:
        report(run.path)
    except Exception as error:
        reason = str(error).partition("\n")[0] or type(error).__name__
        observe(Note(text=f"the run is whole, but {NAME} could not be written: {reason}"))


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


def result_info(result: Result) -> dict[str, Any]:
    """A result in plain values, for info.json and for printing."""
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


def tidy(observe: Callable[[Event], None]) -> Callable[[Event], None]:
    """Gives freed memory back now and then: steps of different lengths leave holes in the heap."""

    def watch(event: Event) -> None:
        if isinstance(event, StepDone) and event.step % TIDY_EVERY == 0:
            give_back_freed()
        observe(event)

    return watch
