"""What makes two runs the same to the bit: deterministic algorithms, and where tensors begin."""

from __future__ import annotations

import os
import warnings
from pathlib import Path

import pytest
import torch
import torch.utils.deterministic
from tiny_run import MemoryRun, TinyModel, job
from torch import Tensor
from torch.nn import Parameter

from decal.config import TrainConfig
from decal.data.batch import Batch
from decal.store.run import RunFolder
from decal.train import checkpoint, train
from decal.train.events import Event, Note
from decal.train.exact import WORKSPACE, deterministic, set_workspace
from decal.train.optim import ALIGNED, Optimizer


def modes() -> tuple[bool, bool, bool]:
    return (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
        torch.utils.deterministic.fill_uninitialized_memory,
    )


def test_the_mode_is_on_while_a_run_trains_and_goes_back() -> None:
    """Also after an error. Fails when a user's own mode is lost, or fresh memory is filled."""
    before = modes()
    model, seen = TinyModel(), []

    def loss(batch: Batch, epoch: int | None) -> tuple[Tensor, int]:
        seen.append(modes())
        if len(seen) == 9:
            raise RuntimeError("broken")
        return model.loss(batch, epoch)

    with pytest.raises(RuntimeError, match="broken"):
        train(job(MemoryRun(), model, loss=loss))
    assert set(seen) == {(True, True, False)}
    assert modes() == before
    torch.use_deterministic_algorithms(True)
    try:
        train(job(MemoryRun(), max_steps=1))
        assert modes() == (True, False, before[2])
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])


def test_what_has_no_deterministic_kernel_is_said_once() -> None:
    """A real operation of torch, in every step. Fails when torch's own words reach the user."""
    model, events = TinyModel(), []

    def loss(batch: Batch, epoch: int | None) -> tuple[Tensor, int]:
        torch.zeros(3).put_(torch.tensor([1]), torch.ones(1))
        return model.loss(batch, epoch)

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(job(MemoryRun(), model, loss=loss, observe=events.append))
    assert [e.text for e in events if isinstance(e, Note)] == [
        "`put_` is not deterministic here: a resumed run differs in its last bits"
    ]


def test_other_warnings_pass() -> None:
    """Fails when the block swallows them; cuBLAS without its workspace is said as such."""
    events: list[Event] = []
    text = f"enabled, but this uses CuBLAS and it is not deterministic: set {WORKSPACE}=:16:8"
    with deterministic(events.append):
        warnings.warn(text, stacklevel=1)
    with pytest.warns(UserWarning, match="mind the gap"), deterministic(events.append):
        warnings.warn("mind the gap", stacklevel=1)
    assert [e.text.split()[0] for e in events if isinstance(e, Note)] == ["cuBLAS"]


def test_the_workspace_is_the_users_if_he_has_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails when a value that is set is replaced."""
    monkeypatch.setenv(WORKSPACE, ":16:8")
    set_workspace()
    assert os.environ[WORKSPACE] == ":16:8"
    monkeypatch.delenv(WORKSPACE)
    set_workspace()
    assert os.environ[WORKSPACE] == ":4096:8"


def test_what_a_resumed_run_computes_with_is_aligned(tmp_path: Path) -> None:
    """Tensors of odd sizes begin at odd places of their file. Fails when they are views of it."""
    with RunFolder.create(tmp_path / "run", "tiny\n") as run:
        train(job(run, max_steps=4))
        model = TinyModel()
        resumed = job(run, model, max_steps=8, resume=True)
        optimizer = Optimizer(model.parameters, resumed.settings)
        checkpoint.start(resumed, optimizer)
    held = {**model.parameters, **optimizer.tensors()}
    assert len(held) == 3 + 3 * 3
    assert {name for name, tensor in held.items() if tensor.data_ptr() % ALIGNED} == set()


def test_trained_weights_leave_the_file_they_were_mapped_from() -> None:
    """Fails when a parameter stays where its file put it, or becomes another object."""
    storage = torch.arange(40, dtype=torch.float32)
    weights = Parameter(storage[3:24].view(3, 7))
    assert weights.data_ptr() % ALIGNED
    optimizer = Optimizer({"w": weights}, TrainConfig())
    assert optimizer.parameters["w"] is weights
    assert weights.data_ptr() % ALIGNED == 0
    assert torch.equal(weights.detach(), storage[3:24].view(3, 7))
