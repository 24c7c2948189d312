"""The loop on a bigram model: invariants, schedule in the metrics, guards, best weights, events."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tiny_run import ROWS, MemoryRun, TinyModel, TinySteps, flat, job
from torch import Tensor
from torch.nn import Parameter

from decal.data.batch import Batch
from decal.errors import StorageError, TrainingError
from decal.train import train
from decal.train.events import EvalDone, Evaluating, Event, Note, Saved, StepDone
from decal.train.loop import total_steps
from decal.train.optim import lr_at


def trained(**changes: Any) -> tuple[TinyModel, MemoryRun]:
    model, run = TinyModel(torch.float64), MemoryRun()
    train(job(run, model, **changes))
    return model, run


def test_cutting_a_step_changes_nothing() -> None:
    """1 x 8 = 2 x 4 = 8 x 1 in float64 at 1e-9, with rows of 3 to 8 tokens.

    Mutation: divide each micro-batch by its own trained tokens and average.
    """
    whole, run = trained(steps=TinySteps(cuts=1))
    for cuts in (2, 8):
        cut, other = trained(steps=TinySteps(cuts=cuts))
        for name, parameter in whole.parameters.items():
            torch.testing.assert_close(cut.parameters[name], parameter, rtol=1e-9, atol=1e-11)
        assert other.column("loss") == pytest.approx(run.column("loss"), rel=1e-9)
        assert other.column("grad_norm") == pytest.approx(run.column("grad_norm"), rel=1e-9)
        assert other.column("trained_tokens") == run.column("trained_tokens")


def test_the_loss_is_per_trained_token_of_the_step() -> None:
    """Step 1 against one loss over all its rows. Mutation: divide by tokens."""
    model = TinyModel(torch.float64)
    steps = TinySteps(cuts=3)
    first = next(steps.steps(0))
    total, count = model.loss(flat([row for batch in first.micro for row in batch.rows]), 0)
    expected = float(total.detach()) / count
    run = MemoryRun()
    train(job(run, model, steps=steps))
    line = run.lines[0]
    assert line["loss"] == pytest.approx(expected, rel=1e-12)
    assert line["trained_tokens"] == count < line["tokens"]
    exact = {"step", "epoch", "loss", "lr", "grad_norm", "tokens", "trained_tokens"}
    assert set(line) == exact | {"seconds"}


def test_training_learns_and_follows_the_schedule() -> None:
    """The rate of every line is the schedule's. Mutation: forget to set the group's rate."""
    model, run = TinyModel(), MemoryRun()
    before = {name: p.detach().clone() for name, p in model.parameters.items()}
    this = job(run, model, max_steps=40, lr=0.05)
    result = train(this)
    rates = [lr_at(step, 40, this.settings) for step in range(40)]
    assert run.column("lr") == pytest.approx(rates, rel=1e-12)
    assert result.loss < 0.8 * run.lines[0]["loss"]
    assert all(not torch.equal(before[n], p) for n, p in model.parameters.items())
    assert [step for step, _ in result.curve] == list(range(1, 41))


def test_updates_use_the_scheduled_rate() -> None:
    """In step 1 Adam moves each entry by the rate, whatever its gradient; here half the peak.

    Mutation: leave the optimizer's rate at the peak.
    """
    model = TinyModel(torch.float64)
    bias = model.parameters["head.bias"]
    seen = [bias.detach().clone()]

    def loss(batch: Batch, epoch: int | None) -> tuple[Tensor, int]:
        seen.append(bias.detach().clone())
        return model.loss(batch, epoch)

    settings = {"max_steps": 2, "warmup": 0.5, "lr": 0.02, "steps": TinySteps(cuts=1)}
    train(job(MemoryRun(), model, loss=loss, eval_batches=[], **settings))
    moved = (seen[2] - seen[0]).abs()
    assert moved[moved > 0].tolist() == pytest.approx([0.01] * int((moved > 0).sum()), rel=1e-4)


def test_length_of_a_run() -> None:
    """Mutation: round epochs * steps down."""
    settings = job(MemoryRun()).settings
    assert total_steps(7, settings) == 12
    free = settings.model_copy(update={"max_steps": None, "epochs": 1.5})
    assert total_steps(7, free) == 11
    assert total_steps(10, free.model_copy(update={"epochs": 0.3})) == 3


@pytest.mark.parametrize(
    ("epochs", "max_steps", "per_epoch", "total"),
    [
        (0.07, None, 100, 7),  # 0.07 * 100 is 7.000000000000001
        (1 / 3, None, 3, 1),
        (1e-9, None, 5, 1),
        (2.0001, None, 5, 11),
        (3, None, 1, 3),
        (0.5, None, 1, 1),
        (0.5, 1000, 10, 1000),  # max_steps goes beyond the epochs
        (50.0, 1, 10, 1),  # and stops short of them
    ],
)
def test_parts_of_epochs_and_max_steps(
    epochs: float, max_steps: int | None, per_epoch: int, total: int
) -> None:
    """Fails when the product is not rounded before it is rounded up, or when fewer steps win."""
    settings = job(MemoryRun(), epochs=epochs, max_steps=max_steps).settings
    assert total_steps(per_epoch, settings) == total


def test_a_run_ends_in_the_middle_of_an_epoch() -> None:
    """1.5 epochs of 3 steps: 5 steps, the last in epoch 1; the schedule ends there too.

    Fails when whole epochs are run, or when the schedule is that of whole epochs.
    """
    run = MemoryRun()
    this = job(run, epochs=1.5, max_steps=None, eval_every=50)
    train(this)
    assert run.column("epoch") == [0, 0, 0, 1, 1]
    assert run.column("lr") == pytest.approx([lr_at(k, 5, this.settings) for k in range(5)])
    assert [line["step"] for line in run.lines if "eval_loss" in line] == [5]


def breaking(row: int, value: float, model: TinyModel) -> Callable[..., tuple[Tensor, int]]:
    """The model's loss, times `value` where `row` is in the micro-batch."""

    def loss(batch: Batch, epoch: int | None) -> tuple[Tensor, int]:
        total, count = model.loss(batch, epoch)
        return (total * value if row in batch.rows else total), count

    return loss


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_not_a_number_stops_and_names_step_and_rows(value: float) -> None:
    """Weights are those of the last good step, no later checkpoint and no later metrics exist.

    Mutation: look at the losses after the update.
    """
    steps = TinySteps()
    third = next(steps.steps(2))
    bad = third.micro[1]
    model, run = TinyModel(), MemoryRun()
    with pytest.raises(TrainingError) as caught:
        train(job(run, model, loss=breaking(bad.rows[0], value, model), eval_every=1))
    text = str(caught.value)
    assert f"the loss of step 3 is {value}" in text
    rows = ", ".join(str(row) for row in sorted(bad.rows))
    assert f"rows {rows} (epoch 0, micro-batch 2 of 2)" in text
    assert "train.lr (now 0.02)" in text
    assert max(run.kept) == 2
    assert run.column("step")[-1] == 2
    for name, parameter in model.parameters.items():
        assert torch.equal(parameter, run.kept[2].files["trainable"][name])


class _Explodes(torch.autograd.Function):
    """Identity whose gradient is infinite."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient * math.inf


def test_gradients_that_are_not_finite_stop_and_are_named() -> None:
    """The loss is a number, one tensor's gradient is not. Mutation: check the losses only."""
    model = TinyModel()

    def loss(batch: Batch, epoch: int | None) -> tuple[Tensor, int]:
        total, count = model.loss(batch, epoch)
        return total + _Explodes.apply(model.parameters["head.bias"]).sum(), count

    with pytest.raises(TrainingError, match="gradient norm of step 1") as caught:
        train(job(MemoryRun(), model, loss=loss))
    assert caught.value.message.endswith("1 tensors hold NaN or infinity")
    assert caught.value.details[0] == "head.bias"
    assert bool(torch.isfinite(model.parameters["head.bias"]).all())


def test_with_loss_scaling_an_overflow_is_a_skipped_step() -> None:
    """Step 1 overflows float32 at a scale of 2^16, step 2 does not; the run goes on.

    Mutation: treat it as an error, write Infinity into the metrics, or do not count it.
    """
    model, run, calls = TinyModel(), MemoryRun(), [0]

    def loss(batch: Batch, epoch: int | None) -> tuple[Tensor, int]:
        calls[0] += 1
        total, count = model.loss(batch, epoch)
        factor = 1e36 if calls[0] == 1 else 1.0
        return total * factor, count

    events: list[Event] = []
    result = train(job(run, model, loss=loss, scale_loss=True, observe=events.append))
    norms = run.column("grad_norm")
    assert norms[0] is None
    assert None not in norms[1:]
    assert run.column("skipped") == [1] * 12
    assert [e.skipped for e in events if isinstance(e, StepDone)] == [1] * 12
    assert result.skipped == 1
    assert run.kept[12].state["scaler"]["scale"] == 2.0**15


def test_every_tensor_must_have_had_a_gradient() -> None:
    """F13: a tensor the forward pass does not use is named after step 2, not saved as trained.

    Mutation: drop the check, or check in step 1 (A has none there, and the run must pass).
    """
    events: list[Event] = []
    train(job(MemoryRun(), TinyModel(), observe=events.append))
    assert not [e for e in events if isinstance(e, Note)]
    model, run = TinyModel(), MemoryRun()
    model_parameters = {**model.parameters, "tail.lora_A": Parameter(torch.ones(2, 3))}
    with pytest.raises(TrainingError, match="1 of 4 trainable tensors") as caught:
        train(job(run, model, parameters=model_parameters))
    assert caught.value.details == ("tail.lora_A",)
    assert run.kept == {}


def with_experts(model: TinyModel, heard: Callable[[int], set[int]]) -> Any:
    """The model's loss plus experts 0 to 2; `heard` says which of them act in a micro-batch."""
    experts = {f"layers.0.experts.{i}.lora_A": Parameter(torch.ones(2)) for i in range(3)}
    calls = [0]

    def loss(batch: Batch, epoch: int | None) -> tuple[Tensor, int]:
        total, count = model.loss(batch, epoch)
        if epoch is not None:
            calls[0] += 1
            for i in heard(calls[0]):
                total = total + 0.01 * experts[f"layers.0.experts.{i}.lora_A"].square().sum()
        return total, count

    return loss, {**model.parameters, **experts}


def warnings_of(events: list[Event]) -> list[str]:
    return [e.text for e in events if isinstance(e, Note) and e.warning]


def test_an_expert_without_tokens_is_a_warning() -> None:
    """Expert 2 acts in step 23 first, expert 1 never; both have a sibling that acts at once.

    Fails when every silent tensor is an error, or when what stayed silent is not said.
    """
    model, events = TinyModel(), []
    heard = lambda call: {0, 2} if call > 44 else {0}  # noqa: E731
    loss, parameters = with_experts(model, heard)
    train(job(MemoryRun(), model, loss=loss, parameters=parameters, max_steps=24,
              observe=events.append))  # fmt: skip
    first, last = warnings_of(events)
    names = "layers.0.experts.1.lora_A, layers.0.experts.2.lora_A"
    assert first == (
        "2 of 6 trainable tensors had no gradient in the first 20 updates and learned nothing: "
        f"{names}"
    )
    assert last.startswith("1 of 6 trainable tensors had no gradient in the whole run")
    assert last.endswith("layers.0.experts.1.lora_A")


def test_a_kind_that_autograd_does_not_reach_is_an_error_at_once() -> None:
    """No expert acts. Of a whole model it is a warning, unless nothing was reached at all.

    Fails when siblings excuse each other though all are silent.
    """
    model, run, events = TinyModel(), MemoryRun(), []
    loss, parameters = with_experts(model, lambda call: set())
    changes = {"loss": loss, "parameters": parameters, "eval_every": 9}
    with pytest.raises(TrainingError, match="3 of 6 trainable tensors had no gradient in the f"):
        train(job(run, model, **changes))
    assert run.column("step") == [1]
    train(job(MemoryRun(), model, whole_model=True, observe=events.append, **changes))
    assert len(warnings_of(events)) == 1
    changes["parameters"] = {name: p for name, p in parameters.items() if "experts" in name}
    with pytest.raises(TrainingError, match="3 of 3 trainable tensors"):
        train(job(run, model, whole_model=True, **changes))


def test_a_kind_that_gets_zeros_only_is_an_error_later() -> None:
    """Reached, but times zero: float16 does that for a while. Fails at step 2, or never."""
    model, run = TinyModel(), MemoryRun()
    dead = Parameter(torch.ones(2))

    def loss(batch: Batch, epoch: int | None) -> tuple[Tensor, int]:
        total, count = model.loss(batch, epoch)
        return total + 0.0 * dead.sum(), count

    parameters = {**model.parameters, "tail.lora_A": dead}
    with pytest.raises(TrainingError, match=r"1 of 4 trainable tensors .* first 20 updates"):
        train(job(run, model, loss=loss, parameters=parameters, max_steps=30))
    assert run.column("step")[-1] == 19
    events: list[Event] = []
    train(job(MemoryRun(), model, loss=loss, parameters=parameters, observe=events.append))
    assert warnings_of(events)[-1].endswith("tail.lora_A")


def test_gradients_that_are_all_zero_are_an_error_at_once() -> None:
    """Reached but zero, all of them. Fails when that waits for update 20."""
    model, run = TinyModel(), MemoryRun()

    def loss(batch: Batch, epoch: int | None) -> tuple[Tensor, int]:
        total, count = model.loss(batch, epoch)
        return total * 0.0 + 1.0, count

    with pytest.raises(TrainingError, match=r"3 of 3 .* first 2 updates"):
        train(job(run, model, loss=loss))


def test_nothing_to_train_is_an_error() -> None:
    """F13: no parameters, frozen ones, a loss without gradient. Mutation: drop any one check."""
    with pytest.raises(TrainingError, match="0 parameters require"):
        train(job(MemoryRun(), parameters={}))
    model = TinyModel()
    model.parameters["head.lora_B"].requires_grad_(False)
    with pytest.raises(TrainingError, match="1 of 3 tensors to be trained are frozen"):
        train(job(MemoryRun(), model))
    model = TinyModel()

    def detached(batch: Batch, epoch: int | None) -> tuple[Tensor, int]:
        total, count = model.loss(batch, epoch)
        return total.detach(), count

    with pytest.raises(TrainingError, match="does not depend on any"):
        train(job(MemoryRun(), model, loss=detached))


def test_an_objective_that_counts_otherwise_than_the_batch_is_an_error() -> None:
    """F9: losses are divided by the batch's count. Mutation: trust it."""
    model = TinyModel()

    def miscounted(batch: Batch, epoch: int | None) -> tuple[Tensor, int]:
        total, count = model.loss(batch, epoch)
        return total, count + 1

    with pytest.raises(TrainingError, match=r"counted \d+ trained tokens, the batch has \d+"):
        train(job(MemoryRun(), model, loss=miscounted))


def with_eval_losses(model: TinyModel, values: list[float]) -> Callable[..., tuple[Tensor, int]]:
    """The model's loss in training; in evaluation these sums, one after the other."""
    rest = iter(values)

    def loss(batch: Batch, epoch: int | None) -> tuple[Tensor, int]:
        if epoch is None:
            assert not torch.is_grad_enabled()
            return torch.tensor(next(rest)), 2
        return model.loss(batch, epoch)

    return loss


@pytest.mark.parametrize(("keep", "kept"), [("best", 6), ("last", 12)])
def test_the_weights_that_are_asked_for_are_kept(keep: str, kept: int) -> None:
    """Evaluations at 3, 6, 9, 12; the best is at 6, between two checkpoints.

    Mutation: compare with the last instead of the best, or write no checkpoint for the best.
    """
    model, run = TinyModel(), MemoryRun()
    loss = with_eval_losses(model, [8.0, 2.0, 6.0, 4.0])
    batches = [flat([100])]
    changes = {"eval_every": 3, "save_every": 4, "keep": keep, "eval_batches": batches}
    result = train(job(run, model, loss=loss, **changes))
    assert result.kept_step == kept
    assert (result.best_step, result.best_eval_loss, result.eval_loss) == (6, 1.0, 2.0)
    assert result.eval_curve == ((3, 4.0), (6, 1.0), (9, 3.0), (12, 2.0))
    assert sorted(run.kept) == [3, 4, 6, 8, 12]
    assert run.kept[12].state["best"] == {"step": 6, "loss": 1.0}
    for name, parameter in model.parameters.items():
        assert torch.equal(parameter, run.kept[kept].files["trainable"][name])


def test_early_stopping_ends_the_run_and_says_why() -> None:
    """Lowest at step 4; equal is not lower; patience 2 ends at step 8, between two checkpoints.

    Fails when a tie counts as better, when a better one does not start the count again, or when no
    checkpoint is written at the end.
    """
    model, run, events = TinyModel(), MemoryRun(), []
    loss = with_eval_losses(model, [8.0, 6.0, 6.0, 6.5, 1.0])
    changes = {"eval_every": 2, "save_every": 50, "eval_batches": [flat([100])]}
    result = train(job(run, model, loss=loss, early_stopping=2, observe=events.append, **changes))
    why = (
        "stopped early after step 8 of 12: in 2 evaluations the loss has not fallen below 3.0000 "
        "(step 4)"
    )
    assert result.stopped == why
    assert (result.steps, result.kept_step, result.best_step, result.eval_loss) == (8, 4, 4, 3.25)
    assert [e.text for e in events if isinstance(e, Note)] == [why]
    assert {e.total for e in events if isinstance(e, StepDone)} == {12}
    assert sorted(run.kept) == [2, 4, 8]
    assert run.kept[8].state["stale"] == 2
    for name, parameter in model.parameters.items():
        assert torch.equal(parameter, run.kept[4].files["trainable"][name])


def test_a_run_that_runs_out_of_steps_and_patience_did_not_stop_early() -> None:
    """The last evaluation is the one too many. Fails when a full run is called stopped."""
    model = TinyModel()
    loss = with_eval_losses(model, [2.0, 4.0, 6.0])
    changes = {"early_stopping": 2, "eval_batches": [flat([100])]}
    result = train(job(MemoryRun(), model, loss=loss, **changes))
    assert (result.steps, result.stopped) == (12, None)


def test_early_stopping_without_evaluation_is_an_error() -> None:
    """Fails when the run goes on and never stops."""
    with pytest.raises(TrainingError, match="nothing to evaluate on"):
        train(job(MemoryRun(), early_stopping=1, eval_batches=[]))


def test_evaluation_is_per_token_over_all_batches() -> None:
    """Batches of unequal length. Mutation: average the batches' means."""
    model, run = TinyModel(torch.float64), MemoryRun()
    batches = [flat([100, 101, 102]), flat([103])]
    train(job(run, model, max_steps=4, eval_batches=batches, keep="last"))
    with torch.no_grad():
        total, count = model.loss(flat([100, 101, 102, 103]), None)
    assert run.column("eval_loss")[-1] == pytest.approx(float(total) / count, rel=1e-12)


def test_evaluations_come_ten_times_a_run_and_at_the_end() -> None:
    """37 steps: every 4, and step 37. Mutation: leave out the end."""
    run = MemoryRun()
    train(job(run, max_steps=37, eval_every=None))
    steps = [line["step"] for line in run.lines if "eval_loss" in line]
    assert steps == [*range(4, 37, 4), 37]


def test_without_evaluation_data_the_last_weights_are_kept() -> None:
    """Mutation: evaluate an empty list (0 / 0)."""
    result = train(job(MemoryRun(), eval_batches=[]))
    assert (result.kept_step, result.eval_loss, result.best_step) == (12, None, None)


def test_a_nan_in_evaluation_is_an_error() -> None:
    """A NaN compares false with everything. Mutation: let it pass as not the best."""
    model, run = TinyModel(), MemoryRun()
    with pytest.raises(TrainingError, match="evaluation loss after step 4 is nan"):
        train(job(run, model, loss=with_eval_losses(model, [math.nan, 1.0])))
    assert run.kept == {}


def test_events_say_what_happens() -> None:
    """One event a step, evaluations by batch, checkpoints. Mutation: observe before counting."""
    events: list[Event] = []
    run = MemoryRun()
    result = train(job(run, observe=events.append))
    done = [e for e in events if isinstance(e, StepDone)]
    assert [e.step for e in done] == list(range(1, 13))
    assert {e.total for e in done} == {12}
    assert [e.loss for e in done] == run.column("loss")
    assert [e.epoch for e in done] == run.column("epoch") == [i * 8 // ROWS for i in range(12)]
    assert all(e.tokens_per_second > 0 and e.eta >= 0 for e in done)
    assert done[-1].eta == 0
    assert [(e.step, e.batch) for e in events if isinstance(e, Evaluating)][:2] == [(4, 1), (4, 2)]
    assert [e.step for e in events if isinstance(e, EvalDone)] == [4, 8, 12]
    assert [e.step for e in events if isinstance(e, Saved)] == [4, 8, 12]
    assert not [e for e in events if isinstance(e, Note)]
    assert result.tokens == sum(e.tokens for e in done)
    assert result.tokens_per_second >= result.tokens / result.seconds


def test_data_that_end_early_are_an_error() -> None:
    """Mutation: return a result of fewer steps."""
    short = TinySteps()
    endless = short.steps
    short.steps = lambda start: (s for s, _ in zip(endless(start), range(5), strict=False))
    with pytest.raises(TrainingError, match="the data ended after step 5 of 12"):
        train(job(MemoryRun(), steps=short))


def test_a_full_disk_is_passed_on_and_leaves_earlier_checkpoints() -> None:
    """Mutation: swallow the error and train on without checkpoints."""
    run = MemoryRun()
    write = run.write_checkpoint

    def full(step: int, tensors: Any, state: Any, *, best: int | None) -> None:
        if step > 4:
            raise StorageError("the disk is full")
        write(step, tensors, state, best=best)

    run.write_checkpoint = full
    with pytest.raises(StorageError):
        train(job(run))
    assert sorted(run.kept) == [4]


def test_full_fine_tuning_in_bfloat16_goes_through_masters() -> None:
    """A rate far below bfloat16's resolution still lowers the loss and moves the weights.

    Mutation: update the 16-bit parameters themselves.
    """
    model, run = TinyModel(torch.bfloat16), MemoryRun()
    before = model.parameters["head.bias"].detach().clone()
    train(job(run, model, lr=3e-4, max_steps=30, schedule="constant", weight_decay=0.0))
    master = run.kept[30].files["optimizer"]["head.bias.master"]
    assert master.dtype == torch.float32
    assert torch.equal(master.bfloat16(), model.parameters["head.bias"])
    assert not torch.equal(before, model.parameters["head.bias"])
    assert sum(run.column("loss")[-3:]) < sum(run.column("loss")[:3])
