"""What glibc is told about freed memory while a model trains.

How many pages that saves depends on what the process did before, so a bench measures it.
"""

from __future__ import annotations

import pytest

from decal.model import heap


def test_thresholds_rise_for_the_block_and_fall_after_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails when the thresholds are not set back where the block fails."""
    now: dict[int, int] = {}
    trimmed: list[int] = []
    known = {"mallopt": now.__setitem__, "malloc_trim": trimmed.append}
    monkeypatch.setattr(heap, "_glibc", known.get)
    with pytest.raises(KeyError), heap.keeping_freed():  # noqa: PT012 looked at inside, too
        assert now == heap._TRAINING
        raise KeyError
    assert now == heap._USUAL
    assert trimmed == [0]


def test_another_c_library_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails when a missing function is called."""
    monkeypatch.setattr(heap, "_glibc", lambda name: None)
    with heap.keeping_freed():
        heap.give_back_freed()
