"""Several trainings over one base, step by step side by side: their passes go through it at once.

Each is a whole training of its own (loop.py): its data, optimizer, schedule, checkpoints and run
folder. Here the passes that they ask for are collected, and micro-batches of different trainings
are computed together. A training cannot tell; its losses are sums over its own rows, and one
backward pass from the sum of all of them leaves each its own gradients, because no parameter of one
is in the graph of another.

They need not be at the same step: a training that was resumed from an older checkpoint, ends early
or fails leaves the others as they are. One that fails is over, and its error is its outcome. To the
bit, a pass depends on which rows are in it, where a product of other rows is cut otherwise. So all
stop after the same step when they are asked to, and go on from there as if they had not; what was
killed when some had written their checkpoint and others not is the same to rounding.

Evaluations are answered before steps of learning, so that those who learn meet again afterwards.
At one time at most `tokens` tokens go through the model, or one micro-batch where that is longer;
where memory runs out all that was asked for is computed again in smaller parts.

Knows nothing of adapters: how rows find theirs is the business of `losses`.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from decal.data.batch import Batch
from decal.errors import DecalError, Interrupted
from decal.train.checkpoint import Progress
from decal.train.events import Event, Job, Note, Over, Result
from decal.train.exact import deterministic
from decal.train.loop import training
from decal.train.memory import PeakMemory
from decal.train.passes import Answer, Judged, Pass, Request, Training
from decal.train.room import fitting, hopeless, is_out_of_memory
from decal.train.stop import StopSignal
from decal.train.trouble import all_interrupted, refuse_untrainable

Outcome = Result | DecalError


class Share(NamedTuple):
    """One training's part of a joint pass."""

    name: str
    batch: Batch
    epoch: int | None
    """None in an evaluation; all shares of a pass learn, or none does."""


Losses = Callable[[Sequence[Share]], list[Tensor]]
"""Shares -> the sum of each one's losses, differentiable where they learn."""


class Judge(Protocol):
    """Who compares trainings and may end some."""

    def verdicts(self, waiting: Mapping[str, Progress]) -> Mapping[str, str | None]:
        """For trainings whose evaluation is over: None to go on, or a sentence that ends it.

        Those that are left out wait for others, which must not wait for them.
        """

    def over(self, name: str, curve: Sequence[tuple[int, float]] | None) -> None:
        """This training has ended, with these evaluations; None if it failed."""


class NoJudge:
    """Lets all of them go on."""

    def verdicts(self, waiting: Mapping[str, Progress]) -> Mapping[str, str | None]:
        """None for all."""
        return dict.fromkeys(waiting)

    def over(self, name: str, curve: Sequence[tuple[int, float]] | None) -> None:
        """Does not matter."""


def train_together(
    jobs: Mapping[str, Job],
    losses: Losses,
    *,
    tokens: int,
    judge: Judge | None = None,
    observe: Callable[[Event], None],
) -> dict[str, Outcome]:
    """Trains all `jobs`, each as `loop.train` would.

    Args:
        jobs: by name; parameters of one are nobody else's.
        losses: computes the joint passes; `Job.loss` is not used.
        tokens: most tokens in a pass.
        judge: may end trainings after an evaluation.
        observe: hears what concerns all of them; each job's own `observe` hears the rest.

    Returns:
        By name the result, or the error that ended that training.

    Raises:
        Interrupted: Ctrl-C or SIGTERM; every training that was not over has its checkpoint.
    """
    for job in jobs.values():
        refuse_untrainable(job)
    device = next(iter(next(iter(jobs.values())).parameters.values())).device
    with (
        PeakMemory(device) as memory,
        deterministic(observe),
        StopSignal(observe) as stop,
        ExitStack() as stack,
    ):
        crowd = _Crowd(losses, tokens, judge or NoJudge(), observe)
        heard = _Heard(stop)
        for name, job in jobs.items():
            crowd.jobs[name] = job
            crowd.trainings[name] = training(job, heard, memory)
            stack.callback(crowd.trainings[name].close)
        for name in jobs:
            crowd.advance(name)
        while crowd.requests:
            crowd.judge_some(everybody=heard.received is not None)
            crowd.compute_some(before_steps=heard.listen)
        stopped = [e for e in crowd.outcomes.values() if isinstance(e, Interrupted)]
        if stopped:
            raise all_interrupted(stopped)
        return {name: crowd.outcomes[name] for name in jobs}


class _Heard:
    """A stop signal as trainings see it: it comes between the steps of all, not amid them."""

    def __init__(self, signal: StopSignal):
        self.received: int | None = None
        self._signal = signal

    def listen(self) -> None:
        """Takes the signal over."""
        self.received = self._signal.received

    def poll(self) -> None:
        self._signal.poll()


class _Crowd:
    """The trainings, what each waits for, and what became of those that are over."""

    def __init__(self, losses: Losses, tokens: int, judge: Judge, observe: Callable[[Event], None]):
        self.jobs: dict[str, Job] = {}
        self.trainings: dict[str, Training] = {}
        self.requests: dict[str, Request] = {}
        self.outcomes: dict[str, Outcome] = {}
        self._losses = losses
        self._tokens = tokens
        self._judge = judge
        self._observe = observe

    def advance(self, name: str, reply: Answer | str | DecalError | None = None) -> None:
        """Runs one training until it asks for something or is over; an error ends it."""
        self.requests.pop(name, None)
        training = self.trainings[name]
        try:
            if isinstance(reply, DecalError):
                self.requests[name] = training.throw(reply)
            else:
                self.requests[name] = training.send(reply)
        except StopIteration as done:
            self._end(name, done.value)
        except DecalError as error:
            self._end(name, error)

    def _end(self, name: str, outcome: Outcome) -> None:
        self.outcomes[name] = outcome
        error = outcome if isinstance(outcome, DecalError) else None
        self._judge.over(name, None if isinstance(outcome, DecalError) else outcome.eval_curve)
        if not isinstance(error, Interrupted):
            self.jobs[name].observe(Over(error=error))

    def judge_some(self, *, everybody: bool) -> None:
        """Answers those whose evaluation is over, as far as the judge has decided."""
        waiting = {n: r.progress for n, r in self.requests.items() if isinstance(r, Judged)}
        if not waiting:
            return
        verdicts = dict.fromkeys(waiting) if everybody else self._judge.verdicts(waiting)
        if not verdicts and len(waiting) == len(self.requests):
            raise RuntimeError("all trainings wait for each other")
        for name, verdict in verdicts.items():
            self.advance(name, verdict)

    def compute_some(self, *, before_steps: Callable[[], None]) -> None:
        """Answers all evaluations that are asked for, or where there are none all steps."""
        # In the order of the jobs: a pass is the same whoever asked for its part first.
        asked = [(name, self.requests.get(name)) for name in self.trainings]
        passes = {name: wanted for name, wanted in asked if isinstance(wanted, Pass)}
        evaluations = {n: wanted for n, wanted in passes.items() if not wanted.learns}
        chosen = evaluations or passes
        if not evaluations:
            before_steps()
        if chosen:
            for name, answer in self._computed(chosen).items():
                self.advance(name, answer)

    def _computed(self, passes: dict[str, Pass]) -> Mapping[str, Answer | DecalError]:
        """Where memory runs out, all of it again in smaller parts; see room.py.

        A training one of whose samples does not fit alone gets that error, the others go on.
        """
        errors: dict[str, DecalError] = {}
        while True:
            known = [p.progress.micro_batch_tokens for p in passes.values()]
            limit = min([self._tokens, *(n for n in known if n is not None)])
            cut = {name: fitting(wanted.batches, limit) for name, wanted in passes.items()}
            answers = {name: Answer(cut[name], [], [], 0.0) for name in passes}
            group: list[Share] = []
            try:
                for group in _groups(passes, cut, limit):
                    self._one_pass(passes, group, answers)
                return {**answers, **errors}
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                if len(group) == 1 and len(group[0].batch.rows) == 1:
                    name = group[0].name
                    wanted = passes[name]
                    errors[name] = hopeless(wanted.job, group[0].batch, wanted.where, error)
            # The error is gone here, and with it the frames that held activations.
            for wanted in passes.values():
                wanted.undo()
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            if errors.keys() & passes.keys():
                passes = {name: wanted for name, wanted in passes.items() if name not in errors}
            else:
                self._shrink(passes, _size(group))

    def _shrink(self, passes: Mapping[str, Pass], size: int) -> None:
        for wanted in passes.values():
            wanted.progress.micro_batch_tokens = size // 2
        self._tokens = size // 2
        text = (
            f"memory ran out with {size:,} tokens at once: from here on at most"
            f" {self._tokens:,}; the results are the same"
        )
        self._observe(Note(text=text))

    def _one_pass(
        self, passes: Mapping[str, Pass], group: Sequence[Share], answers: dict[str, Answer]
    ) -> None:
        started = time.perf_counter()
        learns = group[0].epoch is not None
        with torch.set_grad_enabled(learns):
            found = self._losses(group)
            if learns:
                total = torch.zeros((), device=found[0].device, dtype=found[0].dtype)
                for share, loss in zip(group, found, strict=True):
                    wanted = passes[share.name]
                    wanted.check(share.batch, loss, share.batch.trained)
                    total = total + wanted.scaled(loss)
                total.backward()  # type: ignore[no-untyped-call]
        seconds = time.perf_counter() - started
        tokens = sum(share.batch.tokens for share in group)
        for share, loss in zip(group, found, strict=True):
            answer, wanted = answers[share.name], passes[share.name]
            answer.losses.append(loss.detach())
            answer.counts.append(share.batch.trained)
            # What a training takes of the time is its part of the tokens.
            took = answer.seconds + seconds * share.batch.tokens / tokens
            answers[share.name] = answer._replace(seconds=took)
            wanted.tell(len(answer.losses), len(answer.micro))


def _groups(
    passes: Mapping[str, Pass], cut: Mapping[str, Sequence[Batch]], limit: int
) -> list[list[Share]]:
    """The micro-batches in joint passes: the first of each training, then the second ones, …

    In a group those of one training lie side by side.
    """
    order = {name: i for i, name in enumerate(passes)}
    shares = [
        (turn, Share(name, batch, passes[name].epoch))
        for name, batches in cut.items()
        for turn, batch in enumerate(batches)
    ]
    groups: list[list[Share]] = []
    for _, share in sorted(shares, key=lambda pair: (pair[0], order[pair[1].name])):
        if not groups or _size([*groups[-1], share]) > limit:
            groups.append([])
        groups[-1].append(share)
    return [sorted(group, key=lambda share: order[share.name]) for group in groups]


def _size(group: Sequence[Share]) -> int:
    """Tokens of the joint pass; padded batches become as wide as the widest."""
    shapes = [share.batch.input_ids.shape for share in group]
    if group[0].batch.layout == "flat":
        return sum(shape[1] for shape in shapes)
    return sum(shape[0] for shape in shapes) * max(shape[1] for shape in shapes)
