"""What a bug report needs is there, and is plain data."""

from __future__ import annotations

import json
import os
import platform

import torch

from decal.kernels import ops
from decal.verbs.env import env
from decal.version import __version__


def test_versions_and_machine() -> None:
    """Fails when a version is taken from somewhere else than the running package."""
    found = env()
    assert found["versions"]["decal"] == __version__
    assert found["versions"]["python"] == platform.python_version()
    assert found["versions"]["torch"] == torch.__version__
    assert found["cpu"]["cores"] == os.cpu_count()
    assert found["cpu"]["torch_threads"] == torch.get_num_threads()
    assert len(found["gpus"]) == torch.cuda.device_count() or torch.backends.mps.is_available()


def test_kernels_are_those_that_would_run() -> None:
    """Fails when an op is missing, or its reason is not shown."""
    found = env()["kernels"]
    assert set(found) == set(ops.explain())
    for name, choice in ops.explain().items():
        assert choice.backend in found[name]
        assert choice.reason in found[name]


def test_it_is_json() -> None:
    """Fails when a value is a torch object instead of plain data."""
    found = env()
    assert json.loads(json.dumps(found)) == found
