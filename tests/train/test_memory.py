"""Peak memory: what the numbers of /proc mean, and that a peak is seen and a mapped file is not."""

from __future__ import annotations

import mmap
import time
from pathlib import Path

import pytest
import torch

from decal.train.memory import STATUS, PeakMemory, parse_status, resident_peak

MIB = 2**20


def test_status_is_kilobytes_of_anonymous_shared_and_file_pages() -> None:
    """Mutation: count shared memory as a file, or take kB for bytes."""
    text = "Name:\tx\nVmHWM:\t 90 kB\nRssAnon:\t    5 kB\nRssFile:\t 7 kB\nRssShmem:\t 2 kB\n"
    assert parse_status(text) == (7 * 1024, 7 * 1024)


@pytest.mark.skipif(not STATUS.exists(), reason="no /proc here")
def test_a_passing_tensor_counts_and_a_mapped_file_does_not(tmp_path: Path) -> None:
    """64 MiB that are gone before the end are in the peak; 64 MiB of mapped file are not.

    Mutation: read memory only at the end, or take resident for anonymous memory.
    """
    path = tmp_path / "weights"
    path.write_bytes(b"\1" * (64 * MIB))
    with PeakMemory(torch.device("cpu"), interval=0.005) as memory:
        before = memory.peak()
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as view:
            assert sum(view[:: mmap.PAGESIZE]) == 64 * MIB // mmap.PAGESIZE
            mapped = memory.peak()
        tensor = torch.ones(16 * MIB)
        time.sleep(0.2)
        del tensor
        after = memory.peak()
    assert before.anonymous is not None
    assert mapped.anonymous is not None
    assert after.anonymous is not None
    assert mapped.anonymous - before.anonymous < 16 * MIB
    assert after.anonymous - mapped.anonymous > 48 * MIB
    assert after.device is None
    assert after.bytes == after.anonymous
    assert (after.resident or 0) >= after.anonymous


def test_resident_memory_is_bytes() -> None:
    """A Python with torch holds more than 50 MB and less than 50 GB. Mutation: forget the kB."""
    peak = resident_peak()
    assert peak is not None
    assert 50e6 < peak < 50e9
