"""What memory a sweep may plan with."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from decal.verbs import env, waves


def on(device: str) -> Any:
    return SimpleNamespace(model=SimpleNamespace(device=torch.device(device)))


def test_what_is_free_and_what_is_held_already(monkeypatch: pytest.MonkeyPatch) -> None:
    """Mutations: count only what is free, as if the base had to be loaded again; ignore the limit
    of a container, which ends the process; make up a number where nothing is known."""
    monkeypatch.setattr(waves, "anonymous", lambda: 3)
    monkeypatch.setattr(env, "memory", lambda: {"total": 100, "available": 10})
    assert waves.room(on("cpu")) == 13
    monkeypatch.setattr(env, "memory", lambda: {"total": 100, "available": 10, "limit": 8})
    assert waves.room(on("cpu")) == 8
    monkeypatch.setattr(env, "memory", dict)
    assert waves.room(on("cpu")) is None
    assert waves.room(on("meta")) is None
