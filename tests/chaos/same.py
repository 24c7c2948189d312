"""Whether two run folders hold the same training, to the bit (times apart)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from decal.store.files import is_leftover
from decal.store.run import RunFolder

TIMES = {"seconds", "step_seconds"}


def exact(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Metrics without their times."""
    return [{k: v for k, v in row.items() if k not in TIMES} for row in rows]


def leftovers(folder: Path) -> list[str]:
    """What killed writers left anywhere below a folder."""
    return [str(path) for path in folder.rglob("*") if is_leftover(path.name)]


def assert_same_training(one: Path, other: Path) -> None:
    """Metrics, and every kept checkpoint's tensors and state; nothing half written in `other`."""
    a, b = RunFolder.look(one), RunFolder.look(other)
    assert exact(a.metrics()) == exact(b.metrics())
    assert a.steps() == b.steps()
    for step in a.steps():
        left, right = a.checkpoint(step), b.checkpoint(step)
        for stem in ("trainable", "optimizer"):
            ours, theirs = left.tensors(stem), right.tensors(stem)
            assert ours.keys() == theirs.keys()
            assert all(torch.equal(ours[name], theirs[name]) for name in ours)
        for key in left.state.keys() - TIMES:
            assert left.state[key] == right.state[key], key
    assert leftovers(other) == []
