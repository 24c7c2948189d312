"""A training on stderr: one live bar on a terminal, a plain line now and then elsewhere.

Knows the events of training and nothing of what trains. Rejected: rich's progress columns for the
numbers; their widths jump as values change, so the line is formatted here.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn
from rich.text import Text

from decal.train.events import EvalDone, Evaluating, Event, Note, Over, Saved, StepDone

PLAIN_SECONDS = 10.0
"""Between two lines where there is no terminal: shows life without filling a log."""
MANY = 6
"""Candidates whose losses have room in a line."""


class TrainingProgress:
    """Shows what `observe` is told; as a context manager it clears the bar at the end.

    Args:
        console: where to draw; its terminal decides between the bar and lines.
        clock: seconds that only ever rise.
    """

    def __init__(self, console: Console, clock: Callable[[], float] = time.monotonic):
        self._console = console
        self._clock = clock
        self._live = console.is_terminal
        self._bar: Progress | None = None
        self._task: TaskID | None = None
        self._last_line = -float("inf")
        self._eval_loss: float | None = None

    def __enter__(self) -> TrainingProgress:
        return self

    def __exit__(self, *_: object) -> None:
        self._stop()

    def say(self, what: Any) -> None:
        """One stage of the work, above the bar: text as it is, or anything that rich can draw."""
        self._console.print(what, markup=False)

    def observe(self, event: Event) -> None:
        """Takes one event of a training."""
        if isinstance(event, StepDone):
            self.step(event, numbers(event, self._eval_loss))
        elif isinstance(event, Evaluating):
            self._describe(f"evaluating {event.batch}/{event.batches}")
        elif isinstance(event, EvalDone):
            self._eval_loss = event.eval_loss
            best = " (best so far)" if event.best else ""
            self.say(f"step {event.step:,}: eval loss {event.eval_loss:.4f}{best}")
        elif isinstance(event, Saved):
            self._describe(f"saved step {event.step:,}")
        elif isinstance(event, Note):
            self.say(
                Text("warning: ", style="bold yellow") + event.text if event.warning else event.text
            )

    def step(self, event: StepDone, text: str) -> None:
        """Shows that a step is over, with these numbers."""
        done = event.step >= event.total
        line = f"step {event.step:,}/{event.total:,}  {text}"
        if self._live:
            self._describe(text, event)
            if done:
                self._stop()
                self._console.print(line, markup=False)
            return
        now = self._clock()
        if done or event.step == 1 or now - self._last_line >= PLAIN_SECONDS:
            self._last_line = now
            self._console.print(line, markup=False)

    def _describe(self, text: str, step: StepDone | None = None) -> None:
        """Redraws the bar; a bar begins with the first step."""
        if not self._live:
            return
        if self._bar is None or self._task is None:
            if step is None:
                return
            columns = (TextColumn("{task.completed:,}/{task.total:,}"), BarColumn(24))
            numbers_column = TextColumn("{task.description}", markup=False)
            self._bar = Progress(*columns, numbers_column, console=self._console, transient=True)
            self._bar.start()
            self._task = self._bar.add_task(text, total=step.total)
        if step is None:
            self._bar.update(self._task, description=text)
        else:
            self._bar.update(self._task, description=text, completed=step.step)

    def _stop(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = self._task = None


class SweepProgress:
    """As `TrainingProgress` for candidates that train side by side: one bar, each one's loss."""

    def __init__(self, console: Console, clock: Callable[[], float] = time.monotonic):
        self._shown = TrainingProgress(console, clock)
        self._running: dict[str, StepDone] = {}
        """The last step of each that is not over."""
        self._moved: set[str] = set()
        """Those that have made a step since the last one that was shown."""
        self._known = False
        """Whether all that train have made a step, so that it is known who they are."""
        self._evaluated: dict[str, EvalDone] = {}
        """Evaluations that are not shown yet."""

    def __enter__(self) -> SweepProgress:
        return self

    def __exit__(self, *_: object) -> None:
        self._shown.__exit__()

    def say(self, what: Any) -> None:
        """As `TrainingProgress.say`."""
        self._shown.say(what)

    def observe(self, name: str | None, event: Event) -> None:
        """Takes an event of one candidate, or with None of all of them."""
        if isinstance(event, Note):
            text = event.text if name is None else f"{name}: {event.text}"
            self._shown.observe(Note(text=text, warning=event.warning))
        elif name is None:
            return
        elif isinstance(event, StepDone):
            if name in self._moved and not self._known:
                self._show()
                self._known = True
            self._running[name] = event
            self._moved.add(name)
            if self._known:
                self._show()
        elif isinstance(event, EvalDone):
            if name in self._evaluated:
                self._show_evaluated()
            self._evaluated[name] = event
            if self._running.keys() <= self._evaluated.keys():
                self._show_evaluated()
        elif isinstance(event, Over):
            self._end(name, event)
        elif isinstance(event, Evaluating):
            self._shown.observe(event)

    def _end(self, name: str, event: Over) -> None:
        if event.error is not None:
            self._shown.observe(Note(text=f"{name} failed: {event.error.message}"))
        elif not self._known and self._moved:
            self._show()
        self._running.pop(name, None)
        self._moved.discard(name)
        self._known = self._known and bool(self._running)
        if self._evaluated and self._running.keys() <= self._evaluated.keys():
            self._show_evaluated()
        if self._running and self._known:
            self._show()

    def _show(self) -> None:
        """The bar is where the last of them is; it moves when all of them have."""
        if self._running and self._running.keys() <= self._moved:
            self._moved.clear()
            last = min(self._running.values(), key=lambda e: e.step / e.total)
            self._shown.step(last, self._numbers())

    def _show_evaluated(self) -> None:
        """One line; the step of each where they are not at the same."""
        found = self._evaluated
        steps = {event.step for event in found.values()}
        at = f"step {steps.pop():,}: " if len(steps) == 1 else ""
        losses = {n: e.eval_loss for n, e in found.items()}
        self.say(f"{at}eval loss  {_some(losses)}")
        self._evaluated = {}

    def _numbers(self) -> str:
        """`r4 1.2345  r8 1.1987  812 tokens/s  2:05 left`"""
        events = list(self._running.values())
        parts = [_some({name: event.loss for name, event in self._running.items()})]
        parts.append(f"{sum(e.tokens for e in events) / _seconds(events):,.0f} tokens/s")
        left = max(e.eta for e in events)
        if any(e.step < e.total for e in events):
            parts.append(f"{duration(left)} left")
        return "  ".join(parts)


def _seconds(steps: Sequence[StepDone]) -> float:
    """What a step of each took, one after the other."""
    return max(sum(e.tokens / max(e.tokens_per_second, 1e-9) for e in steps), 1e-9)


def _some(losses: Mapping[str, float]) -> str:
    """`r4 1.2345  r8 1.1987`; of many only the lowest."""
    lowest = sorted(losses, key=lambda name: losses[name])[:MANY]
    shown = [f"{name} {losses[name]:.4f}" for name in losses if name in lowest]
    more = len(losses) - len(shown)
    return "  ".join([*shown, f"({more} more, none lower)"] if more else shown)


def numbers(event: StepDone, eval_loss: float | None) -> str:
    """`loss 1.2345  eval 1.3000  lr 1.9e-04  812 tokens/s  2:05 left`"""
    parts = [f"loss {event.loss:.4f}"]
    if eval_loss is not None:
        parts.append(f"eval {eval_loss:.4f}")
    parts.append(f"lr {event.lr:.1e}")
    parts.append(f"{event.tokens_per_second:,.0f} tokens/s")
    if event.step < event.total:
        parts.append(f"{duration(event.eta)} left")
    return "  ".join(parts)


def duration(seconds: float) -> str:
    """0:07, 2:05, 1:02:05; `?` where nothing is known yet."""
    if not 0 <= seconds < float("inf"):
        return "?"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
