"""A bar for work that is counted in bytes: merging, hashing. Draws on a terminal only."""

from __future__ import annotations

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn


class Bytes:
    """As a context manager it shows what `observe` is told and clears the bar at the end."""

    def __init__(self, console: Console, what: str):
        columns = (TextColumn(what), BarColumn(24), DownloadColumn(), TimeRemainingColumn())
        self._bar = Progress(
            *columns, console=console, transient=True, disable=not console.is_terminal
        )
        self._task = self._bar.add_task(what, total=None)

    def __enter__(self) -> Bytes:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def observe(self, done: int, total: int) -> None:
        """Takes bytes done and bytes in total."""
        self._bar.update(self._task, completed=done, total=total)
