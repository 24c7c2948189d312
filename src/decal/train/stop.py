"""Ctrl-C and SIGTERM during training: the first asks, a second Ctrl-C takes.

The first finishes the optimizer step that is running, so that a checkpoint can be written at a
place from which a resumed run is the same to the bit. A second Ctrl-C raises KeyboardInterrupt at
once; checkpoints are renamed into place when they are whole, so nothing is damaged by it. SIGTERM
is how schedulers ask, and some ask several times before they kill, so a second one changes nothing.

The handler itself only counts: printing from inside a signal handler can meet itself in a
half-written line. The loop asks after every micro-batch, and `poll` tells the user once.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Protocol

from decal.train.events import Event, Note

SIGNALS = (signal.SIGINT, signal.SIGTERM)
ANNOUNCEMENT = "stopping after this step; Ctrl-C again stops at once, without a checkpoint"


class Stop(Protocol):
    """What a training asks."""

    @property
    def received(self) -> int | None:
        """The signal that asked to stop."""
        ...

    def poll(self) -> None:
        """Tells the user, once, that it was heard."""
        ...


class StopSignal:
    """Catches SIGNALS inside a `with` block, in the main thread only; elsewhere it does nothing."""

    def __init__(self, observe: Callable[[Event], None]):
        self.received: int | None = None
        """The signal that asked to stop."""
        self._announced = False
        self._observe = observe
        self._before: dict[int, object] = {}

    @property
    def requested(self) -> bool:
        """Whether the run should stop after this step."""
        return self.received is not None

    def __enter__(self) -> StopSignal:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._caught) for number in SIGNALS}
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for number, before in self._before.items():
            # None stands for a handler that was not installed from Python and cannot be put back.
            signal.signal(number, before or signal.SIG_DFL)  # type: ignore[arg-type]

    def _caught(self, number: int, frame: FrameType | None) -> None:
        if self.received is None:
            self.received = number
        elif number == signal.SIGINT:
            raise KeyboardInterrupt

    def poll(self) -> None:
        """Tells the observer, once, that the request was heard."""
        if self.requested and not self._announced:
            self._announced = True
            self._observe(Note(text=ANNOUNCEMENT, warning=False))
