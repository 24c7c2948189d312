"""A training on stderr: one live bar on a terminal, a plain line now and then elsewhere.

Knows the events of training and nothing of what trains. Rejected: rich's progress columns for the
numbers; their widths jump as values change, so the line is formatted here.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn
from rich.text import Text

from decal.train.events import EvalDone, Evaluating, Event, Note, Saved, StepDone

PLAIN_SECONDS = 10.0
"""Between two lines where there is no terminal: shows life without filling a log."""


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
        self._steps: dict[str, StepDone] = {}
        self._evaluated: dict[int, dict[str, float]] = {}
        self._over: set[str] = set()

    def __enter__(self) -> SweepProgress:
        return self

    def __exit__(self, *_: object) -> None:
        self._shown.__exit__()

    def say(self, what: Any) -> None:
        """As `TrainingProgress.say`."""
        self._shown.say(what)

    def observe(self, name: str | None, event: Event) -> None:
        """Takes an event of one candidate, or with None of all of them."""
        if isinstance(event, StepDone) and name is not None:
            self._steps[name] = event
            if event.step == event.total:
                self._over.add(name)
            running = [e for n, e in self._steps.items() if n not in self._over] or [event]
            if name == next((n for n in reversed(self._steps) if n not in self._over), name):
                self._shown.step(min(running, key=lambda e: e.step), self._losses())
        elif isinstance(event, EvalDone) and name is not None:
            self._evaluated.setdefault(event.step, {})[name] = event.eval_loss
            found = self._evaluated[event.step]
            if len(found) == len(self._steps):
                parts = "  ".join(f"{n} {loss:.4f}" for n, loss in found.items())
                self.say(f"step {event.step:,}: eval loss  {parts}")
        elif isinstance(event, Note):
            if name is not None and not event.warning:
                self._over.add(name)
            text = event.text if name is None else f"{name}: {event.text}"
            self._shown.observe(Note(text=text, warning=event.warning))
        elif isinstance(event, Evaluating):
            self._shown.observe(event)

    def _losses(self) -> str:
        """`r4 1.2345  r8 1.1987  812 tokens/s  2:05 left`"""
        parts = [f"{name} {event.loss:.4f}" for name, event in self._steps.items()]
        last = max(self._steps.values(), key=lambda e: e.eta)
        parts.append(f"{last.tokens_per_second:,.0f} tokens/s")
        if last.step < last.total:
            parts.append(f"{duration(last.eta)} left")
        return "  ".join(parts)


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
