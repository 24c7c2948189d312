"""Shared by all tests: few threads (DECAL_TEST_THREADS), no network, own warnings are errors."""

from __future__ import annotations

import os
import sys

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch


@pytest.fixture(autouse=True, scope="session")
def _few_threads() -> None:
    torch.set_num_threads(int(os.environ.get("DECAL_TEST_THREADS", "1")))


@pytest.fixture(autouse=True)
def _no_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs that a test trains leave no report.html: a third of a second for each of some hundred.

    Those of session and module fixtures do, and so do runs in processes of their own.
    """
    if "decal.verbs.leaves" in sys.modules:
        monkeypatch.setattr("decal.verbs.leaves.report", lambda folder: folder)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)
