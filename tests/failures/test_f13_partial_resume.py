"""F13: a resumed run loses its optimizer, its place in the data or its random numbers.

Of the same family: an adapter that was loaded frozen, and a training of nothing at all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from decal.config import LoraConfig
from decal.data.batch import Batch
from decal.data.pack import Batches, Step
from decal.errors import TrainingError
from decal.model import attention
from decal.model.inject import attach
from decal.objectives import sft
from decal.train import checkpoint, loop
from decal.train.events import Event, Job, Saved
from decal.train.optim import Optimizer
from tests import zoo
from tests.failures.situations import draw
from tests.failures.test_f12_packing_accumulation import samples
from tests.train.tiny_run import MemoryRun, job

STOP, STEPS = 3, 7


class _KilledError(Exception):
    """Nothing that the loop catches."""


def gpt2() -> tuple[nn.Module, dict[str, nn.Parameter]]:
    """An adapter on a base with dropout of its own, which draws from torch's generator."""
    model = zoo.build("gpt2")
    attach(model, LoraConfig(r=3, lora_alpha=7, lora_dropout=0, target_modules=["c_attn"]))
    draw(model)
    model.train()
    return model, {n: p for n, p in model.named_parameters() if p.requires_grad}


def sitting(run: MemoryRun, observe: Callable[[Event], None], *, resume: bool = False) -> Any:
    """One sitting of the same training, from a process that begins anew."""
    torch.manual_seed(17 if resume else 5)
    model, parameters = gpt2()
    assert model.config.resid_pdrop > 0

    def loss(batch: Batch, epoch: int | None) -> tuple[Tensor, int]:
        keep = sft.trained_positions(batch)
        logits = attention.forward(model, batch, keep)
        return sft.losses(logits, batch.targets.flatten()[keep]).sum(), batch.trained

    batches = Batches(samples=samples(), batch_size=3, micro_batch_tokens=40, layout="padded")
    settings = {"max_steps": STEPS, "save_every": STOP, "eval_every": 100, "lr": 0.02}
    loop.train(
        job(
            run,
            loss=loss,
            parameters=parameters,
            steps=batches,
            eval_batches=[],
            observe=observe,
            resume=resume,
            **settings,
        )
    )
    return [p.detach().clone() for p in parameters.values()]


def killed_and_resumed() -> tuple[list[Tensor], list[float]]:
    def kill(event: Event) -> None:
        if isinstance(event, Saved) and event.step == STOP:
            raise _KilledError

    run = MemoryRun()
    with pytest.raises(_KilledError):
        sitting(run, kill)
    weights = sitting(run, lambda event: None, resume=True)
    return weights, run.column("loss")


@pytest.fixture(scope="module")
def straight() -> tuple[list[Tensor], list[float]]:
    run = MemoryRun()
    return sitting(run, lambda event: None), run.column("loss")


def test_killed_and_resumed_is_never_stopped(straight: tuple[list[Tensor], list[float]]) -> None:
    """To the bit: weights and every loss. Fails when anything of the checkpoint is dropped."""
    weights, losses = killed_and_resumed()
    assert losses == straight[1]
    assert all(torch.equal(a, b) for a, b in zip(weights, straight[0], strict=True))


def _no_optimizer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Optimizer, "load", lambda *_: None)


def _no_position(monkeypatch: pytest.MonkeyPatch) -> None:
    real = Batches.steps

    def from_the_top(self: Batches, start: int = 0) -> Iterator[Step]:
        for step in real(self, 0):
            yield Step(**{**vars(step), "index": step.index + start})

    monkeypatch.setattr(Batches, "steps", from_the_top)


def _no_random_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "_set_generators", lambda *_: None)


def _no_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "load_trainable", lambda *_: None)


@pytest.mark.parametrize("lose", [_no_optimizer, _no_position, _no_random_numbers, _no_weights])
def test_what_is_lost_changes_the_run(
    lose: Callable[[pytest.MonkeyPatch], None],
    straight: tuple[list[Tensor], list[float]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """One thing at a time is not restored; the run ends well, and is another one."""
    lose(monkeypatch)
    weights, losses = killed_and_resumed()
    assert len(losses) == STEPS
    assert losses[:STOP] == straight[1][:STOP]
    assert losses != straight[1]
    moved = torch.cat([t.flatten() for t in straight[0]])
    found = torch.cat([t.flatten() for t in weights])
    assert float((found - moved).norm() / moved.norm()) > 1e-3


def test_a_checkpoint_of_another_adapter_is_refused() -> None:
    """A strict bijection of names and shapes. Fails when what fits is loaded."""

    def small(run: MemoryRun, targets: list[str], **changes: Any) -> Job:
        model = zoo.build("llama")
        lora = LoraConfig(r=3, lora_alpha=7, lora_dropout=0, target_modules=targets)
        attach(model, lora)
        parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}

        def loss(batch: Batch, epoch: int | None) -> tuple[Tensor, int]:
            total = sum((p * p).sum() for p in parameters.values())
            return total * batch.trained, batch.trained  # type: ignore[return-value]

        return job(run, parameters=parameters, loss=loss, eval_batches=[], max_steps=2, **changes)

    run = MemoryRun()
    loop.train(small(run, ["q_proj", "v_proj"], save_every=1))
    with pytest.raises(TrainingError, match="weights"):
        loop.train(small(run, ["q_proj"], resume=True))


def test_nothing_to_train_is_an_error() -> None:
    """0 parameters, and parameters that are frozen. Fails when the loop starts all the same."""
    with pytest.raises(TrainingError, match="nothing to train: 0 parameters"):
        loop.train(job(MemoryRun(), parameters={}))
    _, parameters = gpt2()
    for parameter in parameters.values():
        parameter.requires_grad_(False)
    with pytest.raises(TrainingError, match=f"{len(parameters)} of {len(parameters)} tensors"):
        loop.train(job(MemoryRun(), parameters=parameters))


def test_a_frozen_adapter_trains_in_silence_by_hand() -> None:
    """What a loop without the guard does: the input needs a gradient (as gradient checkpointing
    asks for), so backward runs, the optimizer steps, and no number has changed."""
    model, parameters = gpt2()
    for parameter in parameters.values():
        parameter.requires_grad_(False)
    before = [p.clone() for p in parameters.values()]
    optimizer = torch.optim.AdamW(parameters.values(), lr=1.0)
    model.enable_input_require_grads()
    batch = Batches(samples=samples(), batch_size=8, micro_batch_tokens=999, layout="padded")
    micro = next(batch.steps()).micro[0]
    loss = model(input_ids=micro.input_ids, labels=micro.targets).loss
    loss.backward()
    optimizer.step()
    assert loss.isfinite()
    assert all(torch.equal(a, b) for a, b in zip(before, parameters.values(), strict=True))
