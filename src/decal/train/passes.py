"""What a training asks for, and who answers: the loop decides, the model is run here.

A training (loop.py) is a generator. It yields a `Pass`, losses of micro-batches and while it learns
their gradients, and gets an `Answer`; or it yields `Judged` after an evaluation, and gets None to
go on or a sentence that ends it. `alone` answers for a single training. `together.py` answers for
several that share a base, so that their micro-batches go through it at once; the loop does not know
the difference.

Rejected: a thread for every training that waits where the others compute. The order in which they
wake would have to be fixed to stay exact, and errors and signals to be carried between them.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from decal.data.batch import Batch
from decal.train.checkpoint import Progress
from decal.train.events import Job, Result
from decal.train.room import fitted


@dataclass(frozen=True, kw_only=True)
class Pass:
    """Losses of some micro-batches, and in a step of learning their gradients."""

    job: Job
    progress: Progress
    batches: Sequence[Batch]
    epoch: int | None
    """None is evaluation: no dropout and no gradients."""
    scaled: Callable[[Tensor], Tensor] = lambda loss: loss
    """The loss of a micro-batch -> what backward begins with."""
    check: Callable[[Batch, Tensor, int], None] = lambda batch, loss, counted: None
    """Raises where a micro-batch's loss cannot be learned from."""
    undo: Callable[[], None] = lambda: None
    """Forgets the gradients so far."""
    tell: Callable[[int, int], None] = lambda done, of: None
    """Hears how many micro-batches are done, of how many."""
    where: str
    """`in step 7`, for messages."""

    @property
    def learns(self) -> bool:
        """Whether gradients are wanted."""
        return self.epoch is not None


class Answer(NamedTuple):
    """What came of a pass."""

    micro: list[Batch]
    """The micro-batches as they were cut in the end."""
    losses: list[Tensor]
    """Of each, summed, without gradients."""
    counts: list[int]
    """Trained tokens of each."""
    seconds: float


@dataclass(frozen=True)
class Judged:
    """An evaluation is over; whoever compares trainings may end this one."""

    job: Job
    progress: Progress


Request = Pass | Judged
Training = Generator[Request, Answer | str | None, Result]


def alone(training: Training) -> Result:
    """Runs a training whose micro-batches share the model with nobody's."""
    reply: Answer | str | None = None
    while True:
        try:
            request = training.send(reply)
        except StopIteration as done:
            result: Result = done.value
            return result
        try:
            reply = _computed(request) if isinstance(request, Pass) else None
        except BaseException:
            training.close()
            raise


def _computed(wanted: Pass) -> Answer:
    started = time.perf_counter()

    def work(batch: Batch) -> tuple[Tensor, int]:
        loss, counted = wanted.job.loss(batch, wanted.epoch)
        if wanted.learns:
            wanted.check(batch, loss, counted)
            wanted.scaled(loss).backward()  # type: ignore[no-untyped-call]
        return loss.detach(), counted

    with torch.set_grad_enabled(wanted.learns):
        micro, found = fitted(
            wanted.job,
            wanted.progress,
            wanted.batches,
            work,
            undo=wanted.undo,
            tell=wanted.tell,
            where=wanted.where,
        )
    losses, counts = [loss for loss, _ in found], [count for _, count in found]
    return Answer(micro, losses, counts, time.perf_counter() - started)
