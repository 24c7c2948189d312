"""Whatever a file holds: success or one of decal's errors, in time, and nothing else happens.

`make test` reads ten thousand inputs, the same ones every time. `make soak` reads a million, or as
many as DECAL_FUZZ says; DECAL_FUZZ_START is the number of the first. A failure names the reader and
the number: `attempt(READERS[name].attempt, name, number, folder)` makes it again.
"""

from __future__ import annotations

import os
import warnings
from pathlib import Path

import pytest

from tests.fuzz.guard import MEGABYTES, attempt, grown
from tests.fuzz.readers import READERS, prepare

INPUTS = 10_000
SOAK = int(os.environ.get("DECAL_FUZZ", "1000000"))
START = int(os.environ.get("DECAL_FUZZ_START", "100000000"))


def _read_all(name: str, first: int, count: int, folder: Path) -> None:
    reader = READERS[name]
    prepare()
    before, accepted = grown(), 0
    for number in range(first, first + count):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                accepted += attempt(reader.attempt, name, number, folder)
        except BaseException as problem:
            problem.add_note(f"input {number} of reader {name!r}")
            raise
    assert grown() - before < MEGABYTES
    assert 0 < accepted < count, "all inputs are good, or all are bad: nothing is tested"


def test_the_shares_are_whole() -> None:
    assert sum(reader.share for reader in READERS.values()) == 100


@pytest.mark.parametrize("name", READERS)
def test_inputs(name: str, tmp_path: Path) -> None:
    """Fails when a reader lets a KeyError, a RecursionError, … pass, or hangs, or writes."""
    _read_all(name, 0, INPUTS * READERS[name].share // 100, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", READERS)
def test_soak(name: str, tmp_path: Path) -> None:
    """The same with more inputs than anybody waits for."""
    _read_all(name, START, SOAK * READERS[name].share // 100, tmp_path)
