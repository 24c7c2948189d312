"""A run that has too little memory: smaller micro-batches by itself, or on resume."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from decal.config import RunConfig
from decal.data.batch import Batch
from decal.errors import ConfigError
from decal.store.run import RunFolder
from decal.train.events import Event, Note
from decal.verbs.session import Session
from decal.verbs.train import train
from tests.chaos.server import settings, write_inputs


class StopError(Exception):
    pass


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("memory")
    write_inputs(root)
    return root


def exact_run(root: Path, output: str, **changes: Any) -> RunConfig:
    """The run of tests/chaos in float32, with `changes` in its training settings."""
    config = settings(root, output, "nf4")
    base = config.base.model_copy(update={"dtype": "float32"})
    training = config.train.model_copy(update=changes)
    return config.model_copy(update={"base": base, "train": training})


def losses(config: RunConfig) -> list[float]:
    rows = RunFolder.look(config.output).metrics()
    return [row.get("loss", row.get("eval_loss")) for row in rows]


def test_a_small_device_trains_the_same(inputs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """float32 with dropout: losses to 1e-4, and the size is said in metrics and info.json.

    Fails when dropout follows the micro-batch instead of sample and position.
    """
    whole, small = exact_run(inputs, "whole"), exact_run(inputs, "small")
    train(whole)
    real = Session.loss

    def scarce(self: Session, batch: Batch, epoch: int | None) -> tuple[Tensor, int]:
        if batch.input_ids.numel() > 40:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.00 GiB")
        return real(self, batch, epoch)

    monkeypatch.setattr(Session, "loss", scarce)
    done = train(small)
    assert done is not None
    assert losses(small) == pytest.approx(losses(whole), rel=1e-4)
    size = done.result.micro_batch_tokens
    assert size is not None
    assert size <= 40
    run = RunFolder.look(small.output)
    assert run.info()["result"]["micro_batch_tokens"] == size
    assert run.metrics()[-2]["micro_batch_tokens"] == size
    assert done.summary()["micro_batch_tokens"] == size
    assert RunFolder.look(whole.output).info()["result"]["micro_batch_tokens"] is None


def test_a_resumed_run_may_need_less_memory(inputs: Path) -> None:
    """Stopped after step 5, resumed with half the tokens at once and checkpointing: same losses.

    Fails when the evaluation data count as changed because they are cut otherwise, or when a
    setting that changes the result passes too.
    """
    whole = exact_run(inputs, "straight")
    train(whole)

    def stop(event: Event) -> None:
        if getattr(event, "step", 0) == 5:
            raise StopError

    with pytest.raises(StopError):
        train(exact_run(inputs, "resumed"), observe=stop)
    with pytest.raises(ConfigError, match="1 settings differ") as caught:
        train(exact_run(inputs, "resumed", micro_batch_tokens=32, lr=1.0), resume=True)
    assert "micro_batch_tokens" in str(caught.value.hint)
    notes: list[Event] = []
    less = exact_run(inputs, "resumed", micro_batch_tokens=32, gradient_checkpointing=True)
    train(less, resume=True, observe=notes.append)
    assert losses(less) == pytest.approx(losses(whole), rel=1e-4)
    assert [note.text for note in notes if isinstance(note, Note) and note.warning] == [
        "the run goes on with other settings: gradient_checkpointing was False, is True, "
        "micro_batch_tokens was 64, is 32"
    ]
