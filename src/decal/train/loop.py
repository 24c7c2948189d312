"""The training loop. Read this file first.

A training is a job (events.py): a callable that turns a micro-batch into a loss, the parameters it
depends on, the data as optimizer steps, and a run folder. The loop does not know what the model
is, whether its base is quantized, what an adapter is, how text became tokens, or what a file looks
like. `training` is one screen: for every step, learn from it, write it down, evaluate and save when
due. It is a generator: the passes through the model, forward and backward, are asked for, so that
several trainings can make theirs together (passes.py).

The loss of a step. With micro-batches m of the step, tokens t that are trained, and N the number
of trained tokens of the whole step,

    loss = sum_m sum_t loss_t / N        so each micro-batch is divided by N, not by its own count

and one gradient comes out however the step is cut. The usual mean of means weights a token by how
few others happened to share its micro-batch.

The order within a step is what makes it safe to stop anywhere:

    forward and backward of all micro-batches -> losses and gradient norm are looked at
    -> update -> a line in metrics.jsonl -> evaluation -> checkpoint

Losses and norm reach the CPU together, once a step, before the update: a GPU is not held up for
each micro-batch, and no NaN ever gets into weights, optimizer or checkpoints. A resumed run drops
the metrics after its checkpoint and does those steps again, the same to the bit: the data are a
function of the step's index, dropout is a function of seed, epoch and position, and everything
else is in the checkpoint (exact.py: torch's deterministic algorithms). A step that finds no memory
begins anew in smaller micro-batches (room.py).

Trainable tensors that the loss does not reach are found in the first steps (heard.py): they are not
part of the forward pass, and would be saved as if they had been trained.

Evaluations keep sums only. Whenever one is the best so far a checkpoint is written, and at the end
the parameters are set to the best (`keep: best`) or left as they are (`keep: last`). After
`early_stopping` evaluations without a lower loss the run is over; the count is in the checkpoint,
so that a resumed run stops where the other would have.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Generator
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any

import torch

from decal.config import TrainConfig
from decal.errors import TrainingError
from decal.train import checkpoint
from decal.train.checkpoint import Progress
from decal.train.events import EvalDone, Evaluating, Job, Note, Result, Step, StepDone
from decal.train.exact import deterministic
from decal.train.heard import LATE
from decal.train.memory import PeakMemory
from decal.train.optim import Optimizer, lr_at
from decal.train.passes import Answer, Judged, Pass, Request, Training, alone
from decal.train.stop import Stop, StopSignal
from decal.train.trouble import (
    broken_gradients,
    calmer,
    interrupted,
    out_of_patience,
    refuse_disconnected,
    refuse_not_finite,
    refuse_untrainable,
    refuse_unusable,
    rows_of,
    still_silent,
)

EVALS_PER_RUN = 10
RECENT = 20
"""Steps over which the speed is averaged."""


def total_steps(steps_per_epoch: int, settings: TrainConfig) -> int:
    """Optimizer steps of the whole run: `max_steps`, or epochs times steps rounded up.

    Parts of an epoch are parts of its steps: 1.5 epochs of 7 steps are 11 steps. The product is
    rounded first, so that 0.07 epochs of 100 steps are 7 although 0.07 * 100 is a little more.
    """
    if settings.max_steps is not None:
        return settings.max_steps
    return max(1, math.ceil(round(settings.epochs * steps_per_epoch, 6)))


def train(job: Job) -> Result:
    """Trains `job.parameters` in place.

    Raises:
        TrainingError: nothing to train, NaN or infinity, tensors without a gradient, a checkpoint
            of other parameters, early stopping without evaluation data, no memory for one sample.
        ConfigError: the optimizer does not work here.
        StorageError: the disk has no room for the run, or metrics or a checkpoint could not be
            written; earlier checkpoints are intact.
        Interrupted: Ctrl-C or SIGTERM; a checkpoint of the last whole step was written.
    """
    refuse_untrainable(job)
    device = next(iter(job.parameters.values())).device
    with (
        PeakMemory(device) as memory,
        deterministic(job.observe),
        StopSignal(job.observe) as stop,
    ):
        return alone(training(job, stop, memory))


def training(job: Job, stop: Stop, memory: PeakMemory) -> Training:
    """`train` as a generator that leaves the passes through the model to others (passes.py).

    `stop` and `memory` are watched by whoever runs it.
    """
    refuse_untrainable(job)
    plan = _plan(job)
    total = plan.total
    optimizer = Optimizer(job.parameters, job.settings, rates=job.rates, scale_loss=job.scale_loss)
    with closing(optimizer):
        checkpoint.require_space(job, optimizer, plan.saves)
        progress = checkpoint.start(job, optimizer)
        clock = _Clock(progress, total)
        over = _is_over(job, progress, total)
        if over:
            text = f"the run is finished after {progress.step} of {total} steps: nothing is trained"
            job.observe(Note(text=text, warning=False))
        elif progress.eval_curve:
            progress.halted = yield from _judged(job, progress)
            over = progress.halted is not None
            if stop.received and not over:
                raise interrupted(progress.step, total, stop.received)

        for step in islice(job.steps.steps(progress.step), 0 if over else total - progress.step):
            lr = lr_at(step.index, total, job.settings)
            done = yield from _learn(job, optimizer, progress, step, lr, stop.poll)
            progress.step = step.index + 1
            _record(job, progress, clock, step, lr, done)

            best = False
            if progress.step % plan.eval_every == 0 or progress.step == total:
                best = yield from _evaluate(job, progress, stop.poll)
            over = _is_over(job, progress, total)
            asked = stop.received  # once: a signal may come between the next lines
            if progress.step % plan.save_every == 0 or best or over or asked:
                checkpoint.save(job, optimizer, progress, clock.seconds())
            if asked:
                raise interrupted(progress.step, total, asked)
            if over:
                break

        if not over:
            raise TrainingError(f"the data ended after step {progress.step} of {total}")
        if optimizer.heard.silent:
            job.observe(still_silent(optimizer.heard, "in the whole run"))
        stopped = _why_stopped(progress, total)
        if stopped:
            job.observe(Note(text=stopped, warning=False))
        kept = _keep(job, progress)
        return _result(progress, kept, stopped, clock.seconds(), memory)


def _judged(job: Job, progress: Progress) -> Generator[Request, Any, str | None]:
    """Why whoever compares trainings ends this one, or None."""
    verdict: str | None = yield Judged(job, progress)
    return verdict


def _why_stopped(progress: Progress, total: int) -> str | None:
    """Why the run ended before its last step; None if it did not."""
    if progress.step >= total:
        return None
    return progress.halted or out_of_patience(progress, total)


@dataclass(frozen=True)
class _Plan:
    """How long the run is and when it evaluates and saves."""

    total: int
    eval_every: int
    save_every: int

    @property
    def saves(self) -> int:
        """Most checkpoints that it will write: those that are due, and one for every best."""
        return math.ceil(self.total / self.save_every) + math.ceil(self.total / self.eval_every)


def _plan(job: Job) -> _Plan:
    total = total_steps(job.steps.steps_per_epoch, job.settings)
    eval_every = job.settings.eval_every or math.ceil(total / EVALS_PER_RUN)
    return _Plan(total, eval_every, job.settings.save_every or eval_every)


def _is_over(job: Job, progress: Progress, total: int) -> bool:
    """All steps are done, the evaluations have not improved for too long, or it was ended."""
    patience = job.settings.early_stopping
    if progress.step >= total or progress.halted is not None:
        return True
    return patience is not None and progress.stale >= patience


class _Clock:
    """Speed over the last steps, and the time that is left at the pace of this sitting."""

    def __init__(self, progress: Progress, total: int):
        self.total = total
        self._first = progress.step
        self._earlier = progress.seconds
        self._started = time.perf_counter()
        self._recent: deque[tuple[int, float]] = deque(maxlen=RECENT)

    def add(self, done: _Done) -> None:
        self._recent.append((done.tokens, done.seconds))

    def seconds(self) -> float:
        """Wall time of all sittings."""
        return self._earlier + time.perf_counter() - self._started

    def tokens_per_second(self) -> float:
        return sum(t for t, _ in self._recent) / max(sum(s for _, s in self._recent), 1e-9)

    def eta(self, step: int) -> float:
        pace = (time.perf_counter() - self._started) / (step - self._first)
        return pace * (self.total - step)


@dataclass(frozen=True)
class _Done:
    """What one step left behind, as plain numbers."""

    loss: float
    norm: float | None
    trained: int
    tokens: int
    seconds: float


def _learn(
    job: Job,
    optimizer: Optimizer,
    progress: Progress,
    step: Step,
    lr: float,
    poll: Callable[[], None],
) -> Generator[Request, Any, _Done]:
    """One optimizer step; nothing is updated if its losses or gradients are not finite."""
    trained = sum(batch.trained for batch in step.micro)
    if trained == 0:
        raise TrainingError(f"step {step.index + 1} has no trained token", details=[rows_of(step)])

    answer: Answer = yield Pass(
        job=job,
        progress=progress,
        batches=step.micro,
        epoch=step.epoch,
        scaled=lambda loss: optimizer.scaled(loss / trained),
        check=partial(refuse_unusable, step),
        undo=optimizer.forget,
        tell=lambda done, of: poll(),
        where=f"in step {step.index + 1}",
    )
    started = time.perf_counter()
    norm = optimizer.gradient_norm()
    *values, size = torch.stack([*answer.losses, norm.to(answer.losses[0])]).tolist()
    refuse_not_finite(job.settings, step, answer.micro, values)
    skipped = False
    if math.isfinite(size):
        optimizer.update(lr, norm)
    else:
        skipped = optimizer.skip()
        if not skipped:
            raise broken_gradients(job.settings, step, optimizer.not_finite())
    if not skipped:
        refuse_disconnected(job, optimizer.heard)
        if optimizer.heard.silent and optimizer.heard.updates == LATE:
            job.observe(still_silent(optimizer.heard, f"in the first {LATE} updates"))
    return _Done(
        loss=sum(values) / trained,
        norm=None if skipped else size,
        trained=trained,
        tokens=sum(batch.tokens for batch in step.micro),
        seconds=answer.seconds + time.perf_counter() - started,
    )


def _record(
    job: Job, progress: Progress, clock: _Clock, step: Step, lr: float, done: _Done
) -> None:
    """A line in metrics.jsonl, the counters, and the observer, in this order."""
    line = {
        "step": progress.step,
        "epoch": step.epoch,
        "loss": done.loss,
        "lr": lr,
        "grad_norm": done.norm,
        "tokens": done.tokens,
        "trained_tokens": done.trained,
        "seconds": round(done.seconds, 4),
    }
    if job.scale_loss:
        progress.skipped += done.norm is None
        line["skipped"] = progress.skipped
    if progress.micro_batch_tokens is not None:
        line["micro_batch_tokens"] = progress.micro_batch_tokens
    job.run.append_metrics(line)
    progress.loss = done.loss
    progress.tokens += done.tokens
    progress.trained_tokens += done.trained
    progress.step_seconds += done.seconds
    progress.curve.append((progress.step, done.loss))
    clock.add(done)
    job.observe(
        StepDone(
            step=progress.step,
            total=clock.total,
            epoch=step.epoch,
            loss=done.loss,
            lr=lr,
            grad_norm=done.norm,
            skipped=progress.skipped,
            tokens=done.tokens,
            tokens_per_second=clock.tokens_per_second(),
            eta=clock.eta(progress.step),
        )
    )


def _evaluate(
    job: Job, progress: Progress, poll: Callable[[], None]
) -> Generator[Request, Any, bool]:
    """Loss per trained token over the evaluation batches; True if it is the lowest so far."""
    if not job.eval_batches:
        return False

    def tell(done: int, of: int) -> None:
        job.observe(Evaluating(step=progress.step, batch=done, batches=of))
        poll()

    answer: Answer = yield Pass(
        job=job,
        progress=progress,
        batches=job.eval_batches,
        epoch=None,
        tell=tell,
        where=f"in the evaluation after step {progress.step}",
    )
    count = sum(answer.counts)
    total = torch.stack([loss.double() for loss in answer.losses]).sum()
    value = float(total) / count if count else math.nan
    if not math.isfinite(value):
        raise TrainingError(
            f"the evaluation loss after step {progress.step} is {value}",
            details=[f"{count} trained tokens in {len(job.eval_batches)} evaluation batches"],
            hint=calmer(job.settings),
        )
    best = progress.best_loss is None or value < progress.best_loss
    progress.eval_loss = value
    progress.stale += 1
    if best:
        progress.best_loss, progress.best_step, progress.stale = value, progress.step, 0
    progress.eval_curve.append((progress.step, value))
    job.run.append_metrics({"step": progress.step, "eval_loss": value})
    job.observe(EvalDone(step=progress.step, eval_loss=value, best=best))
    progress.halted = yield from _judged(job, progress)
    return best


def _keep(job: Job, progress: Progress) -> int:
    """Sets the parameters to the weights that the settings ask for; returns their step."""
    best = progress.best_step
    if job.settings.keep == "last" or best is None or best == progress.step:
        return progress.step
    checkpoint.load_trainable(job, job.run.checkpoint(best))
    return best


def _result(
    progress: Progress, kept: int, stopped: str | None, seconds: float, memory: PeakMemory
) -> Result:
    return Result(
        steps=progress.step,
        stopped=stopped,
        halted=progress.halted is not None,
        micro_batch_tokens=progress.micro_batch_tokens,
        skipped=progress.skipped,
        loss=progress.loss,
        eval_loss=progress.eval_loss,
        best_eval_loss=progress.best_loss,
        best_step=progress.best_step,
        kept_step=kept,
        seconds=seconds,
        tokens=progress.tokens,
        trained_tokens=progress.trained_tokens,
        tokens_per_second=progress.tokens / progress.step_seconds,
        memory=memory.peak(),
        curve=tuple(progress.curve),
        eval_curve=tuple(progress.eval_curve),
    )
