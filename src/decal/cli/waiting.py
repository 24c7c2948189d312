"""A bar for steps of any work, on a terminal only, and only once the work takes a while."""

from __future__ import annotations

import time
from collections.abc import Callable

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TextColumn,
    TimeRemainingColumn,
)

PATIENCE = 2.0
"""Seconds before the bar is drawn."""


class Waiting:
    """As a context manager it shows what `observe` is told and clears the bar at the end.

    Args:
        console: where to draw.
        amount: how to show what is done; left out: as `3/20`.
        clock: seconds that only ever rise.
    """

    def __init__(
        self,
        console: Console,
        amount: ProgressColumn | None = None,
        clock: Callable[[], float] = time.monotonic,
    ):
        columns = (
            TextColumn("{task.description}", markup=False),
            BarColumn(24),
            amount or MofNCompleteColumn(),
            TimeRemainingColumn(),
        )
        self._bar = Progress(*columns, console=console, transient=True)
        self._task = self._bar.add_task("", total=None)
        self._live = console.is_terminal
        self._clock, self._began, self._drawn = clock, clock(), False

    def __enter__(self) -> Waiting:
        return self

    def __exit__(self, *_: object) -> None:
        if self._drawn:
            self._bar.stop()

    def observe(self, what: str, done: int, total: int) -> None:
        """Takes what is worked on, steps done and steps in total."""
        if self._live and not self._drawn and self._clock() - self._began >= PATIENCE:
            self._bar.start()
            self._drawn = True
        self._bar.update(self._task, description=what, completed=done, total=total)
