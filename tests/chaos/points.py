"""Where a process can be killed, or its disk be full: every change of a file, phase by phase.

A point is one call that changes files (write, fsync, mkdir, rename, unlink, …) or computes
(a loss, a backward pass, an update). `install` wraps these calls in this process; what happens at a
point is decided by one function. A phase is the innermost of a run's functions that is running. Its
name stands in a mapped file, so that a process that was killed from outside tells where it was.

Knows of decal's functions only which of them are phases.
"""

from __future__ import annotations

import builtins
import inspect
import io
import mmap
import os
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from decal.store.run import RunFolder
from decal.train import loop
from decal.train.optim import Optimizer
from decal.verbs import leaves
from decal.verbs import merge as merging
from decal.verbs.session import Session

PHASES: list[tuple[Any, str, str]] = [
    (loop, "_learn", "step"),
    (loop, "_evaluate", "evaluation"),
    (RunFolder, "append_metrics", "metrics"),
    (RunFolder, "truncate_metrics", "restore"),
    (RunFolder, "write_checkpoint", "checkpoint"),
    (RunFolder, "rotate", "rotation"),
    (leaves, "_save", "save"),
    (merging, "merge_files", "merge"),
]
OTHERWISE = "around"
"""The phase outside of all of these: opening the folder, info.json, the plot."""
GROWS = ("write", "fsync", "mkdir", "create", "rename")
"""Points that a full disk refuses."""
CALLS = {
    "mkdir": "mkdir",
    "replace": "rename",
    "rename": "rename",
    "fsync": "fsync",
    "unlink": "unlink",
    "rmdir": "unlink",
}
"""Functions of os, and what kind of point they are."""

Action = Callable[[], None]
"""Called at a point instead of going on: kills the process or raises."""
Decide = Callable[[str, str, int], tuple[str, Action] | None]
"""(phase, kind, number of the point within the phase) -> (before | torn | after, action)."""


class Points:
    """Counts points by phase and does what is decided for each."""

    def __init__(self, decide: Decide, phase_file: Path | None = None):
        self.decide = decide
        self.counts: Counter[str] = Counter()
        self.calls: Counter[str] = Counter()
        self._phases = [OTHERWISE]
        self._shown: mmap.mmap | None = None
        if phase_file is not None:
            with phase_file.open("r+b") as file:
                self._shown = mmap.mmap(file.fileno(), 0)

    def at(self, kind: str, do: Callable[[], Any], torn: Action | None = None) -> Any:
        """Does `do`; at a point that is decided on, the action comes before, after or in it."""
        phase = self._phases[-1]
        self.counts[phase] += 1
        when, action = self.decide(phase, kind, self.counts[phase]) or ("never", None)
        if action is None:
            return do()
        if when == "torn" and torn is not None:
            torn()
        elif when == "after":
            do()
        return action()

    def within(self, phase: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function as a phase; one that asks for its passes is in it while they are made."""
        if inspect.isgeneratorfunction(function):

            def asking(*args: Any, **named: Any) -> Any:
                self.calls[phase] += 1
                self._enter([*self._phases, phase])
                try:
                    return (yield from function(*args, **named))
                finally:
                    self._enter(self._phases[:-1])

            return asking

        def wrapped(*args: Any, **named: Any) -> Any:
            self.calls[phase] += 1
            self._enter([*self._phases, phase])
            try:
                return function(*args, **named)
            finally:
                self._enter(self._phases[:-1])

        return wrapped

    def _enter(self, phases: list[str]) -> None:
        self._phases = phases
        if self._shown is not None:
            self._shown[:32] = phases[-1].encode().ljust(32)


def install(points: Points, root: Path) -> Action:
    """Wraps the calls of this process that change files below `root`; returns what undoes it."""
    undone: list[tuple[Any, str, Any]] = []

    def put(owner: Any, name: str, value: Any) -> None:
        undone.append((owner, name, getattr(owner, name)))
        setattr(owner, name, value)

    for owner, name, phase in PHASES:
        put(owner, name, points.within(phase, getattr(owner, name)))
    for name, kind in CALLS.items():
        put(os, name, _counted(points, kind, getattr(os, name)))
    for owner, name in ((Session, "loss"), (Optimizer, "scaled"), (Optimizer, "update")):
        put(owner, name, _counted(points, name, getattr(owner, name)))
    opened = _opening(points, io.open, str(root))
    put(io, "open", opened)
    put(builtins, "open", opened)

    def undo() -> None:
        for owner, name, value in reversed(undone):
            setattr(owner, name, value)

    return undo


def _counted(points: Points, kind: str, function: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *args, **named: points.at(kind, lambda: function(*args, **named))


def _opening(points: Points, real: Callable[..., Any], root: str) -> Callable[..., Any]:
    """`open` whose files to be written below `root` have a point in every write."""

    class Writer(io.BufferedWriter):
        def write(self, data: Any) -> int:
            def whole() -> int:
                count = super(Writer, self).write(data)
                self.flush()
                return count

            def half() -> None:
                super(Writer, self).write(bytes(data)[: len(data) // 2])
                self.flush()

            return points.at("write", whole, half)

    def opened(file: Any, mode: str = "r", *args: Any, **named: Any) -> Any:
        plain = mode.replace("t", "")
        ours = isinstance(file, int) or str(file).startswith(root)
        if plain.rstrip("b") not in ("w", "x", "a") or not ours:
            return real(file, mode, *args, **named)
        raw = points.at("create", lambda: io.FileIO(file, plain.replace("b", "")))
        writer = Writer(raw)
        if "b" in mode:
            return writer
        return io.TextIOWrapper(writer, encoding=named.get("encoding", "utf-8"))

    return opened
