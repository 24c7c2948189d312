"""One input at a time, watched: how long it takes, what it writes, whom it calls.

Python reports what a program does to the system to audit hooks, and a hook stays for the life of
the process; so there is one, and it notes only while an input is read.
"""

from __future__ import annotations

import os
import resource
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from random import Random
from typing import Any

from decal.errors import DecalError

SECONDS = 5.0
"""The longest that one input may take; they are some kilobytes long."""
MEGABYTES = 400
"""How much the process may grow over all inputs of one reader."""

_CHANGES = {
    "os.mkdir",
    "os.rename",
    "os.remove",
    "os.rmdir",
    "os.link",
    "os.symlink",
    "os.truncate",
}
_FORBIDDEN = {"socket.connect", "socket.getaddrinfo", "subprocess.Popen", "os.system", "os.exec"}
_noted: list[str] | None = None
_folder = ""


class TooSlowError(BaseException):
    """The time limit; no `except Exception` of a reader may take it."""


def _hook(event: str, args: tuple[Any, ...]) -> None:
    if _noted is None:
        return
    if event in _FORBIDDEN:
        _noted.append(f"{event} {args[1:] if event == 'socket.connect' else args}")
    elif event == "open" and isinstance(args[0], str | bytes | os.PathLike):
        written = args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT) if args[2] else False
        if written and not os.fspath(args[0]).startswith(_folder):
            _noted.append(f"wrote {args[0]!r}")
    elif event in _CHANGES and not str(args[0]).startswith(_folder):
        _noted.append(f"{event} {args[0]!r}")


@contextmanager
def watched(folder: Path) -> Iterator[None]:
    """Raises AssertionError after the block for what was written elsewhere, or anybody called."""
    global _noted, _folder
    if not getattr(sys, "_decal_audited", False):
        sys.addaudithook(_hook)
        sys._decal_audited = True  # type: ignore[attr-defined]
    noted: list[str] = []
    _noted, _folder = noted, str(folder)
    try:
        yield
    finally:
        _noted = None
    assert not noted, noted


@contextmanager
def timed(seconds: float = SECONDS) -> Iterator[None]:
    """Raises TooSlowError in the block after that many seconds."""

    def stop(*_: Any) -> None:
        raise TooSlowError(f"longer than {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def attempt(read: Callable[[Path, Random], None], name: str, number: int, folder: Path) -> bool:
    """Reads input `number` of a reader; whether it was accepted. Raises what a reader must not.

    The files of the input before are removed from `folder`; removing the folder itself takes longer
    than most inputs.
    """
    for file in [f for f in folder.rglob("*") if not f.is_dir()]:
        file.unlink()
    with timed(), watched(folder):
        try:
            read(folder, Random(f"{name} {number}"))
        except DecalError as error:
            length = len(str(error))
        else:
            return True
    assert length < 20_000, "a message of a page is enough"
    return False


def grown() -> int:
    """The most megabytes that this process ever held."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
