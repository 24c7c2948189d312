"""Ctrl-C during training: the first asks, the second takes.

The first finishes the optimizer step that is running, so that a checkpoint can be written at a
place from which a resumed run is the same to the bit. The second raises KeyboardInterrupt at once;
checkpoints are renamed into place when they are whole, so nothing is damaged by it.

The handler itself only counts: printing from inside a signal handler can meet itself in a
half-written line. The loop asks after every micro-batch, and `poll` tells the user once.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from types import FrameType, TracebackType

from decal.train.events import Event, Note

ANNOUNCEMENT = "stopping after this step; Ctrl-C again stops at once, without a checkpoint"


class StopSignal:
    """Catches SIGINT inside a `with` block, in the main thread only; elsewhere it does nothing."""

    def __init__(self, observe: Callable[[Event], None]):
        self.requested = False
        self._announced = False
        self._observe = observe
        self._installed = False
        self._before: object = None

    def __enter__(self) -> StopSignal:
        if threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGINT, self._caught)
            self._installed = True
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._installed:
            # None stands for a handler that was not installed from Python and cannot be put back.
            signal.signal(signal.SIGINT, self._before or signal.SIG_DFL)  # type: ignore[arg-type]

    def _caught(self, number: int, frame: FrameType | None) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True

    def poll(self) -> None:
        """Tells the observer, once, that the request was heard."""
        if self.requested and not self._announced:
            self._announced = True
            self._observe(Note(text=ANNOUNCEMENT, warning=False))
