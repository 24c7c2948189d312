"""What can go wrong in a training step, in words: which step, which rows, and what to do.

Only messages; the loop decides when. Steps are counted from 1, as in the metrics.
"""

from __future__ import annotations

import math
import signal
from collections.abc import Collection, Iterable, Sequence

from torch import Tensor

from decal.config import TrainConfig
from decal.data.batch import Batch
from decal.errors import Interrupted, TrainingError
from decal.train.checkpoint import Progress
from decal.train.events import Job, Note, Step
from decal.train.heard import Heard

ROWS_SHOWN = 16
NAMES_SHOWN = 3


def _listed(names: Iterable[str], shown: int = NAMES_SHOWN) -> list[str]:
    names = sorted(names)
    more = [f"(and {len(names) - shown} more)"] if len(names) > shown else []
    return [*names[:shown], *more]


def _rows(batches: Sequence[Batch]) -> str:
    rows = sorted({row for batch in batches for row in batch.rows})
    shown = ", ".join(str(row) for row in rows[:ROWS_SHOWN])
    more = f", and {len(rows) - ROWS_SHOWN} more" if len(rows) > ROWS_SHOWN else ""
    return f"rows {shown}{more}"


def rows_of(step: Step) -> str:
    """`rows 3, 17, 20` of all micro-batches."""
    return _rows(step.micro)


def calmer(settings: TrainConfig) -> str:
    """The hint for a training that diverges."""
    return (
        f"lower train.lr (now {settings.lr:g}) or train.max_grad_norm "
        f"(now {settings.max_grad_norm:g}), use base.dtype float32, or look at these rows; "
        "checkpoints written before are intact"
    )


def refuse_untrainable(job: Job) -> None:
    """There must be parameters, all of them must require a gradient, and early stopping must have
    something to go by.
    """
    frozen = [name for name, p in job.parameters.items() if not p.requires_grad]
    if not job.parameters:
        raise TrainingError(
            "nothing to train: 0 parameters require a gradient",
            hint="attach an adapter first, or load an existing one as trainable",
        )
    if job.settings.early_stopping and not job.eval_batches:
        raise TrainingError(
            "`train.early_stopping` is set, but there is nothing to evaluate on",
            hint="give the run evaluation data, or leave `train.early_stopping` out",
        )
    if frozen:
        raise TrainingError(
            f"{len(frozen)} of {len(job.parameters)} tensors to be trained are frozen",
            details=_listed(frozen),
            hint="they have requires_grad=False: load the adapter as trainable",
        )


def refuse_unusable(step: Step, batch: Batch, loss: Tensor, counted: int) -> None:
    """The loss must depend on what is trained, and count the tokens that the batch announced."""
    if counted != batch.trained:
        raise TrainingError(
            f"step {step.index + 1}: the objective counted {counted} trained tokens, "
            f"the batch has {batch.trained}",
            details=[_rows([batch])],
        )
    if not loss.requires_grad:
        raise TrainingError(
            f"step {step.index + 1}: the loss does not depend on any trainable tensor",
            hint="the adapter is disabled, or something runs the model without gradients",
        )


def refuse_not_finite(
    settings: TrainConfig, step: Step, micro: Sequence[Batch], values: Sequence[float]
) -> None:
    """Every micro-batch's loss must be a number; names the rows of the first that is not."""
    bad = [number for number, value in enumerate(values) if not math.isfinite(value)]
    if not bad:
        return
    first = bad[0]
    place = f"micro-batch {first + 1} of {len(values)}"
    more = f"  (and {len(bad) - 1} more micro-batches)" if len(bad) > 1 else ""
    raise TrainingError(
        f"the loss of step {step.index + 1} is {values[first]}",
        details=[f"{_rows([micro[first]])} (epoch {step.epoch}, {place}){more}"],
        hint=calmer(settings),
    )


def broken_gradients(settings: TrainConfig, step: Step, names: Collection[str]) -> TrainingError:
    """The losses are numbers but the gradient norm is not."""
    count = f"{len(names)} tensors hold NaN or infinity" if names else "it is beyond float32"
    return TrainingError(
        f"the gradient norm of step {step.index + 1} is not finite: {count}",
        details=[*_listed(names), f"{rows_of(step)} (epoch {step.epoch})"],
        hint=calmer(settings),
    )


def refuse_disconnected(job: Job, heard: Heard) -> None:
    """The loss must depend on every kind of trainable tensor; heard.py says when that is known."""
    silent = heard.disconnected(whole_model=job.whole_model)
    if silent:
        raise TrainingError(
            f"{len(silent)} of {len(heard.names)} trainable tensors had no gradient in the first "
            f"{heard.updates} updates",
            details=_listed(silent),
            hint="the forward pass does not use them: leave them out (adapter.exclude_modules)",
        )


def still_silent(heard: Heard, when: str) -> Note:
    """The warning for silent tensors that are no error."""
    return Note(
        text=f"{len(heard.silent)} of {len(heard.names)} trainable tensors had no gradient {when} "
        f"and learned nothing: {', '.join(_listed(heard.silent))}"
    )


def out_of_patience(progress: Progress, total: int) -> str:
    """Why early stopping ended the run."""
    return (
        f"stopped early after step {progress.step} of {total}: in {progress.stale} evaluations the "
        f"loss has not fallen below {progress.best_loss:.4f} (step {progress.best_step})"
    )


def all_interrupted(stopped: Sequence[Interrupted]) -> Interrupted:
    """The same for several trainings at once."""
    error = Interrupted(
        f"stopped with {len(stopped)} trainings under way; each has written a checkpoint",
        hint="resume the sweep to go on from there",
    )
    error.exit_code = stopped[0].exit_code
    return error


def interrupted(step: int, total: int, received: int | None) -> Interrupted:
    """Ctrl-C or SIGTERM, after the checkpoint was written; the exit code says which."""
    error = Interrupted(
        f"stopped after step {step} of {total}; a checkpoint was written",
        hint="resume the run to go on from there",
    )
    error.exit_code = 128 + (received or signal.SIGINT)
    return error
