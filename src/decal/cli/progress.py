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
            self._step(event)
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

    def _step(self, event: StepDone) -> None:
        done = event.step >= event.total
        if self._live:
            self._describe(numbers(event, self._eval_loss), event)
            if done:
                self._stop()
                self._console.print(_line(event, self._eval_loss), markup=False)
            return
        now = self._clock()
        if done or event.step == 1 or now - self._last_line >= PLAIN_SECONDS:
            self._last_line = now
            self._console.print(_line(event, self._eval_loss), markup=False)

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


def _line(event: StepDone, eval_loss: float | None) -> str:
    return f"step {event.step:,}/{event.total:,}  {numbers(event, eval_loss)}"


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
