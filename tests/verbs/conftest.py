"""One short QLoRA run on the embedded base, shared by the verbs' tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from decal import demo
from decal.config import RunConfig
from decal.verbs.train import RunResult, train

STEPS = 8


def settings(folder: Path, **changes: Any) -> RunConfig:
    """A run of a few seconds; `changes` replace whole sections."""
    data = folder / "train.jsonl"
    if not data.exists():
        demo.write_jsonl(data, "train", limit=80)
    sections: dict[str, Any] = {
        "base": str(demo.base_path()),
        "quant": "nf4",
        "adapter": {"r": 4, "lora_alpha": 10, "lora_dropout": 0.1},
        "data": {"path": str(data), "max_length": 128, "eval": 0.1},
        "train": {"max_steps": STEPS, "batch_size": 8, "lr": 2e-3, "eval_every": 4},
        "output": str(folder / "run"),
    }
    return RunConfig(**{**sections, **changes})


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> RunResult:
    """A finished QLoRA run, its model still loaded."""
    done = train(settings(tmp_path_factory.mktemp("finished")))
    assert done is not None
    return done


@pytest.fixture(scope="session")
def finished_plain(tmp_path_factory: pytest.TempPathFactory) -> RunResult:
    """The same on a bf16 base."""
    done = train(settings(tmp_path_factory.mktemp("plain"), quant="none"))
    assert done is not None
    return done
