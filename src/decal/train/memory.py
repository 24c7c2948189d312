"""Peak memory of this process, so that a planned peak can be compared with a measured one.

Peak memory on a CPU is anonymous memory plus what is really held. The kernel keeps a high-water
mark of resident memory only (`ru_maxrss`), and that one counts every page of a mapped weight file
which happened to be in the page cache: after quantizing a 16-bit base it is several times what the
process needs. So a thread reads anonymous memory from /proc/self/status every few milliseconds.
`smaps_rollup` would give the same number but walks all page tables on each read. A peak shorter
than the interval is missed. Where there is no /proc only resident memory is known.
"""

from __future__ import annotations

import sys
import threading
from pathlib import Path
from types import TracebackType

import torch

from decal.train.events import Memory

STATUS = Path("/proc/self/status")


def parse_status(text: str) -> tuple[int, int]:
    """(anonymous and shared memory, mapped files) in bytes, from /proc/self/status."""
    kilobytes = {}
    for line in text.splitlines():
        name, _, value = line.partition(":")
        if name in ("RssAnon", "RssShmem", "RssFile"):
            kilobytes[name] = int(value.split()[0])
    anonymous = kilobytes.get("RssAnon", 0) + kilobytes.get("RssShmem", 0)
    return anonymous * 1024, kilobytes.get("RssFile", 0) * 1024


def anonymous() -> int:
    """Anonymous and shared memory of this process now, in bytes; 0 where there is no /proc."""
    return parse_status(STATUS.read_text())[0] if STATUS.exists() else 0


def resident_peak() -> int | None:
    """The highest resident memory in bytes since the process began; None on Windows."""
    try:
        import resource
    except ImportError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


class PeakMemory:
    """Watches memory inside a `with` block; `peak()` says how high it went, at any time."""

    def __init__(self, device: torch.device, interval: float = 0.02):
        self._device = device
        self._interval = interval
        self._anonymous = 0
        self._mapped = 0
        self._over = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> PeakMemory:
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
        if STATUS.exists():
            self._sample()
            self._thread = threading.Thread(target=self._watch, name="decal-memory", daemon=True)
            self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._over.set()
        if self._thread is not None:
            self._thread.join()

    def _watch(self) -> None:
        while not self._over.wait(self._interval):
            self._sample()

    def _sample(self) -> None:
        anonymous, mapped = parse_status(STATUS.read_text())
        if anonymous > self._anonymous:
            self._anonymous, self._mapped = anonymous, mapped

    def peak(self) -> Memory:
        """The peak so far."""
        known = self._thread is not None
        if known:
            self._sample()
        cuda = self._device.type == "cuda"
        return Memory(
            anonymous=self._anonymous if known else None,
            mapped=self._mapped if known else None,
            resident=resident_peak(),
            device=torch.cuda.max_memory_allocated(self._device) if cuda else None,
        )
