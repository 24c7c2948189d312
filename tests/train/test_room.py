"""A step that finds no memory begins anew in smaller pieces, and its result is the same."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_run import MemoryRun, TinyModel, TinySteps, flat, job
from torch import Tensor

from decal.data.batch import Batch
from decal.errors import TrainingError
from decal.train import train
from decal.train.events import Event, Note
from decal.train.room import is_out_of_memory

CPU = (
    "[enforce fail at alloc_cpu.cpp:116] . DefaultCPUAllocator: can't allocate memory: you tried "
    "to allocate 64 bytes. Error code 12 (Cannot allocate memory)"
)
ERRORS = {
    "cuda": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    "cublas": RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate"),
    "mps": RuntimeError("MPS backend out of memory (MPS allocated: 17 GB)"),
    "cpu": RuntimeError(CPU),
    "python": MemoryError(),
}


class Small:
    """A device for so many tokens: the loss of a longer batch runs out of memory.

    Each failure takes the next of `tokens`, so that memory can grow scarcer. Every second failure
    comes in the forward pass, the others in backward.
    """

    def __init__(self, model: TinyModel, *tokens: int, error: Exception = ERRORS["cuda"]):
        self.model, self.tokens, self.error = model, tokens, error
        self.seen: list[int] = []
        self.failures = 0

    def loss(self, batch: Batch, epoch: int | None) -> tuple[Tensor, int]:
        self.seen.append(batch.tokens)
        total, count = self.model.loss(batch, epoch)
        if batch.tokens > self.tokens[min(self.failures, len(self.tokens) - 1)]:
            self.failures += 1
            if self.failures % 2 == 0 or epoch is None:
                raise self.error
            total.register_hook(self._fail)
        return total, count

    def _fail(self, gradient: Tensor) -> None:
        raise self.error


def notes_of(events: list[Event]) -> list[str]:
    return [e.text for e in events if isinstance(e, Note)]


@pytest.mark.parametrize("error", ERRORS)
def test_the_result_is_the_same(error: str) -> None:
    """float64: losses, norms and weights to 1e-12, though the steps are cut otherwise.

    The first failure is the second micro-batch of step 3, when the first has left its gradients.
    Fails when gradients of the first attempt are kept, or each piece is divided by its own count.
    """
    whole, cut, events = MemoryRun(), MemoryRun(), []
    model = TinyModel(torch.float64)
    train(job(whole, model, eval_batches=[flat(range(100, 106))]))
    other = TinyModel(torch.float64)
    small = Small(other, 22, 10, error=ERRORS[error])
    changes: dict[str, Any] = {"eval_batches": [flat(range(100, 106))], "observe": events.append}
    result = train(job(cut, other, loss=small.loss, **changes))
    for name in ("loss", "grad_norm", "eval_loss"):
        assert cut.column(name) == pytest.approx(whole.column(name), rel=1e-12), name
    for name, parameter in model.parameters.items():
        torch.testing.assert_close(other.parameters[name], parameter, rtol=1e-12, atol=1e-14)
    assert small.failures == 2
    assert result.micro_batch_tokens == 5
    assert cut.column("micro_batch_tokens") == [5] * 10
    said = notes_of(events)
    assert said == [
        f"memory ran out in step 3 with {n} tokens at once: from here on at most {n // 2}; "
        "the result is the same"
        for n in (23, 11)
    ]


def test_enough_memory_changes_nothing() -> None:
    """Fails when batches are cut, or metrics name a size, without need."""
    run, events = MemoryRun(), []
    small = Small(TinyModel(), 10_000)
    result = train(job(run, small.model, loss=small.loss, observe=events.append))
    assert result.micro_batch_tokens is None
    assert run.column("micro_batch_tokens") == []
    assert notes_of(events) == []


def test_an_evaluation_begins_anew() -> None:
    """Only the evaluation batch is too long: its loss is that of the whole.

    Fails when the pieces that fit are counted twice.
    """
    whole, cut, events = MemoryRun(), MemoryRun(), []
    batches = [flat([100]), flat(range(101, 110))]
    train(job(whole, TinyModel(torch.float64), eval_batches=batches))
    small = Small(TinyModel(torch.float64), 36)
    changes: dict[str, Any] = {"eval_batches": batches, "observe": events.append}
    train(job(cut, small.model, loss=small.loss, **changes))
    assert cut.column("eval_loss") == pytest.approx(whole.column("eval_loss"), rel=1e-12)
    assert notes_of(events)[0].startswith("memory ran out in the evaluation after step 4 with")


@pytest.mark.parametrize("stop", [3, 5, 9])
def test_the_size_survives_a_resume(stop: int) -> None:
    """The long step is the sixth; stopped before, at once after and later, resumed = not stopped.

    The resumed device has room for everything from step 8 on, and must cut all the same. Noise
    from torch's generator is part of the loss. Fails when the size is not in the checkpoint, or
    the generators are not set back before the second attempt.
    """

    def loss_of(model: TinyModel) -> Any:
        small = Small(model, 15)

        def loss(batch: Batch, epoch: int | None) -> tuple[Tensor, int]:
            first = epoch is None or epoch != 1
            return model.loss(batch, epoch) if first else small.loss(batch, epoch)

        return loss

    class StopError(Exception):
        pass

    def observe(event: Event) -> None:
        if getattr(event, "step", None) == stop and type(event).__name__ == "StepDone":
            raise StopError

    changes: dict[str, Any] = {"save_every": 2, "steps": TinySteps(cuts=1)}
    whole, run = MemoryRun(), MemoryRun()
    model = TinyModel(noise=0.1)
    train(job(whole, model, loss=loss_of(model), **changes))
    model = TinyModel(noise=0.1)
    with pytest.raises(StopError):
        train(job(run, model, loss=loss_of(model), observe=observe, **changes))
    model = TinyModel(noise=0.1)
    train(job(run, model, loss=loss_of(model), resume=True, **changes))
    for name in ("loss", "grad_norm", "eval_loss", "micro_batch_tokens"):
        assert run.column(name) == whole.column(name), name
    assert whole.column("micro_batch_tokens")


def test_one_sample_that_does_not_fit_is_an_error() -> None:
    """Row, tokens and what needs less. Fails when it is tried for ever, or the cause is lost."""
    run, model = MemoryRun(), TinyModel()
    small = Small(model, 7)
    with pytest.raises(TrainingError, match=r"out of memory in step 1: row \d+ alone, 8") as caught:
        train(job(run, model, loss=small.loss))
    assert "gradient_checkpointing: true" in str(caught.value.hint)
    assert "max_length" in str(caught.value.hint)
    assert "2.00 GiB" in caught.value.details[0]
    assert len(small.seen) < 40
    assert run.lines == []


def test_other_errors_pass() -> None:
    """Fails when any RuntimeError is taken for a lack of memory."""
    assert not is_out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    assert not is_out_of_memory(ValueError("out of memory"))

    def broken(batch: Batch, epoch: int | None) -> tuple[Tensor, int]:
        raise RuntimeError("shapes")

    with pytest.raises(RuntimeError, match="shapes"):
        train(job(MemoryRun(), loss=broken))
