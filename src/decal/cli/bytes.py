"""A bar for work that is counted in bytes: merging, hashing. Late, and on a terminal only."""

from __future__ import annotations

from rich.console import Console
from rich.progress import DownloadColumn

from decal.cli.waiting import Waiting


class Bytes:
    """As a context manager it shows what `observe` is told and clears the bar at the end."""

    def __init__(self, console: Console, what: str):
        self._waiting = Waiting(console, DownloadColumn())
        self._what = what

    def __enter__(self) -> Bytes:
        return self

    def __exit__(self, *_: object) -> None:
        self._waiting.__exit__()

    def observe(self, done: int, total: int) -> None:
        """Takes bytes done and bytes in total."""
        self._waiting.observe(self._what, done, total)
