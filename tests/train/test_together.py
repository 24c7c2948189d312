"""Several trainings side by side: each ends as it would alone, whatever the others do."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest
import torch
from tiny_run import MemoryRun, TinyModel, TinySteps, flat, job
from torch import Tensor

from decal.data.batch import Batch
from decal.errors import DecalError, Interrupted, TrainingError
from decal.train import train
from decal.train.checkpoint import Progress
from decal.train.events import EvalDone, Event, Job, Note, Over, Result, StepDone
from decal.train.passes import Pass
from decal.train.together import Share, _groups, train_together

Changes = dict[str, Any]


class Crowd:
    """Tiny trainings by name, and what the joint passes were."""

    def __init__(self, dtype: torch.dtype = torch.float64, **jobs: Changes):
        self.models = {name: TinyModel(dtype) for name in jobs}
        self.runs = {name: MemoryRun() for name in jobs}
        self.events: list[tuple[str | None, Event]] = []
        self.passes: list[list[Share]] = []
        self.jobs = {name: self._job(name, changes) for name, changes in jobs.items()}

    def _job(self, name: str, changes: Changes) -> Job:
        def observe(event: Event) -> None:
            self.events.append((name, event))

        return job(self.runs[name], self.models[name], **{"observe": observe, **changes})

    def losses(self, shares: Sequence[Share]) -> list[Tensor]:
        self.passes.append(list(shares))
        assert len({share.epoch is None for share in shares}) == 1
        return [self.models[s.name].loss(s.batch, s.epoch)[0] for s in shares]

    def train(self, tokens: int = 4096, **named: Any) -> dict[str, Any]:
        named.setdefault("observe", lambda event: self.events.append((None, event)))
        return train_together(self.jobs, named.pop("losses", self.losses), tokens=tokens, **named)

    def notes(self, name: str | None) -> list[str]:
        return [e.text for n, e in self.events if n == name and isinstance(e, Note)]


def assert_same(crowd: Crowd, name: str, changes: Changes) -> None:
    """As the training alone, to 1e-9: gradients of micro-batches are added in another order."""
    model, run = TinyModel(torch.float64), MemoryRun()
    train(job(run, model, **changes))
    for column in ("loss", "lr", "grad_norm", "eval_loss", "tokens", "trained_tokens"):
        ours, theirs = crowd.runs[name].column(column), run.column(column)
        assert ours == pytest.approx(theirs, rel=1e-9), column
    for key, parameter in model.parameters.items():
        torch.testing.assert_close(
            crowd.models[name].parameters[key], parameter, rtol=1e-9, atol=1e-11
        )


MIXED: dict[str, Changes] = {
    "a": {"lr": 0.02},
    "b": {"lr": 0.005, "max_steps": 7, "schedule": "linear"},
    "c": {"steps": TinySteps(batch_size=6, cuts=3), "eval_every": 3, "weight_decay": 0.0},
    "d": {"early_stopping": 1, "eval_every": 1, "lr": 0.5, "max_grad_norm": 9.0},
}


@pytest.mark.parametrize("tokens", [4096, 30, 9, 1])
def test_each_is_what_it_is_alone(tokens: int) -> None:
    """Other lengths, batches, schedules and evaluations side by side, in float64.

    Fails when losses are divided by the tokens of all, or an answer goes to another training.
    """
    crowd = Crowd(**MIXED)
    outcomes = crowd.train(tokens)
    assert list(outcomes) == list(MIXED)
    for name, changes in MIXED.items():
        assert isinstance(outcomes[name], Result)
        assert_same(crowd, name, changes)
    assert outcomes["d"].stopped is not None
    assert sorted(n for n, e in crowd.events if isinstance(e, Over) and n) == list(MIXED)


@pytest.mark.parametrize("tokens", [200, 40, 20])
def test_passes_keep_to_the_budget(tokens: int) -> None:
    """Fails when a pass is longer than the budget, or micro-batches that fit are run apart."""
    crowd = Crowd(**MIXED)
    crowd.train(tokens)
    sizes = [sum(s.batch.tokens for s in shares) for shares in crowd.passes]
    longest = max(tokens, 8)
    assert max(sizes) <= longest
    assert len({len({s.name for s in shares}) for shares in crowd.passes}) > 1
    for shares in crowd.passes:
        names = [share.name for share in shares]
        assert names == sorted(names), "micro-batches of one training lie side by side"


def test_evaluations_come_before_steps() -> None:
    """`fast` evaluates after each step, `slow` never: they are at one step in every pass.

    Fails when the one that evaluates falls behind.
    """
    crowd = Crowd(fast={"eval_every": 1}, slow={"eval_every": 12})
    crowd.train()
    learning = [shares for shares in crowd.passes if shares[0].epoch is not None]
    assert len(learning) == 12
    assert all({s.name for s in shares} == {"fast", "slow"} for shares in learning)


def padded(rows: int, width: int) -> Batch:
    some = flat(range(rows))
    tensors = {n: torch.zeros(rows, width, dtype=torch.long) for n in ("input_ids", "targets")}
    return Batch(
        layout="padded",
        **tensors,
        positions=tensors["input_ids"],
        attention=torch.ones(rows, width, dtype=torch.long),
        cu_seq_lens=None,
        max_length=width,
        sample_ids=tensors["input_ids"],
        rows=some.rows,
        trained=rows,
        tokens=rows * width,
    )


def test_padding_counts() -> None:
    """Two narrow batches and a wide one: joined, all are as wide as the widest.

    Fails when tokens are added up as if nothing were padded.
    """
    cut = {"a": [padded(4, 5)], "b": [padded(1, 40)], "c": [padded(2, 5)]}
    request = Pass(
        job=job(MemoryRun()), progress=Progress(), batches=[], epoch=0, where="in step 1"
    )
    found = _groups(dict.fromkeys(cut, request), cut, 60)
    assert [[share.name for share in group] for group in found] == [["a"], ["b"], ["c"]]
    found = _groups(dict.fromkeys(cut, request), cut, 7 * 40)
    assert [[share.name for share in group] for group in found] == [["a", "b", "c"]]


def test_one_that_fails_is_out_and_the_others_go_on() -> None:
    """Fails when the first error ends all, or is said at the end only."""
    crowd = Crowd(good=MIXED["a"], bad={"lr": 1e200}, other=MIXED["c"])
    outcomes = crowd.train()
    assert isinstance(outcomes["bad"], TrainingError)
    assert_same(crowd, "good", MIXED["a"])
    assert_same(crowd, "other", MIXED["c"])
    [over] = [e for n, e in crowd.events if n == "bad" and isinstance(e, Over)]
    assert over.error is outcomes["bad"]
    steps = [e for n, e in crowd.events if n == "good" and isinstance(e, StepDone)]
    assert crowd.events.index(("bad", over)) < crowd.events.index(("good", steps[-1]))


class Scarce:
    """Memory for so many tokens in a pass; every other failure is in backward."""

    def __init__(self, crowd: Crowd, tokens: int, but: str | None = None):
        self.crowd, self.tokens, self.but, self.failures = crowd, tokens, but, 0

    def __call__(self, shares: Sequence[Share]) -> list[Tensor]:
        size = sum(share.batch.tokens for share in shares)
        found = self.crowd.losses(shares)
        if size > self.tokens or any(share.name == self.but for share in shares):
            self.failures += 1
            self.crowd.passes.pop()
            if self.failures % 2 == 0 or not found[0].requires_grad:
                raise torch.OutOfMemoryError("CUDA out of memory")
            found[0].register_hook(self.fail)
        return found

    def fail(self, gradient: Tensor) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")


def test_too_little_memory_means_smaller_passes() -> None:
    """Fails when gradients of the attempt are kept, or the smaller size is forgotten."""
    changes = {"a": MIXED["a"], "c": MIXED["c"]}
    crowd = Crowd(**changes)
    scarce = Scarce(crowd, 25)
    outcomes = crowd.train(losses=scarce)
    assert scarce.failures <= 3
    for name, own in changes.items():
        assert_same(crowd, name, own)
        assert outcomes[name].micro_batch_tokens is not None
        assert crowd.runs[name].kept[12].state["micro_batch_tokens"] is not None
    said = crowd.notes(None)
    assert len(said) == scarce.failures
    assert said[0].startswith("memory ran out with ")
    assert said[0].endswith("; the results are the same")


def test_one_whose_sample_does_not_fit_fails_alone() -> None:
    """Fails when the largest candidate takes the others with it."""
    crowd = Crowd(good=MIXED["a"], large={})
    outcomes = crowd.train(losses=Scarce(crowd, 10_000, but="large"))
    assert isinstance(outcomes["large"], TrainingError)
    assert "out of memory in step 1: row" in outcomes["large"].message
    assert_same(crowd, "good", MIXED["a"])


def test_other_errors_pass() -> None:
    crowd = Crowd(a={}, b={})

    def broken(shares: Sequence[Share]) -> list[Tensor]:
        raise RuntimeError("shapes")

    with pytest.raises(RuntimeError, match="shapes"):
        crowd.train(losses=broken)


def stopping(crowd: Crowd, name: str, step: int) -> Callable[[Event], None]:
    def observe(event: Event) -> None:
        if isinstance(event, StepDone) and event.step == step:
            os.kill(os.getpid(), signal.SIGINT)

    return observe


def test_all_are_saved_at_one_step_before_it_stops() -> None:
    """Ctrl-C while the second of three is at step 5, of which one evaluates; resumed to the bit.

    Fails when a training is left without its checkpoint, or they stop at different steps.
    """
    changes: dict[str, Changes] = {
        "a": {"eval_every": 5},
        "b": {"lr": 0.01, "eval_every": 12},
        "c": {"lr": 0.03, "eval_every": 4},
    }
    crowd = Crowd(**changes)
    crowd.jobs["b"] = job(
        crowd.runs["b"], crowd.models["b"], **changes["b"], observe=stopping(crowd, "b", 5)
    )
    with pytest.raises(Interrupted) as caught:
        crowd.train()
    assert {max(run.kept) for run in crowd.runs.values()} == {6}
    assert (
        caught.value.message == "stopped with 3 trainings under way; each has written a checkpoint"
    )
    assert caught.value.exit_code == 130
    whole = Crowd(**changes)
    whole.train()
    again = Crowd(**changes)
    again.jobs = {
        name: job(crowd.runs[name], again.models[name], **own, resume=True)
        for name, own in changes.items()
    }
    again.train()
    for name in changes:
        for column in ("loss", "grad_norm", "eval_loss"):
            assert crowd.runs[name].column(column) == whole.runs[name].column(column)
        for key, parameter in whole.models[name].parameters.items():
            assert torch.equal(again.models[name].parameters[key], parameter)


class Ending:
    """Lets nobody go on before all have come to their evaluation; then ends one."""

    def __init__(self, victim: str, count: int):
        self.victim, self.count = victim, count
        self.ended: list[tuple[str, bool]] = []
        self.most = 0

    def verdicts(self, waiting: Mapping[str, Progress]) -> Mapping[str, str | None]:
        self.most = max(self.most, len(waiting))
        if len(waiting) < self.count - len(self.ended):
            return {}
        return {name: "ended" if name == self.victim else None for name in waiting}

    def over(self, name: str, curve: Sequence[tuple[int, float]] | None) -> None:
        self.ended.append((name, curve is None))


def test_those_that_wait_for_a_verdict() -> None:
    """They evaluate at other steps, and one fails: the rest are judged together all the same.

    Fails when a training goes on without its verdict, or the ended one has no checkpoint.
    """
    changes: dict[str, Changes] = {
        "a": {"eval_every": 3},
        "b": {"eval_every": 4},
        "bad": {"lr": 1e200},
        "victim": {"eval_every": 6},
    }
    crowd = Crowd(**changes)
    judge = Ending("victim", len(changes))
    outcomes = crowd.train(judge=judge)
    assert judge.most == 3
    assert sorted(judge.ended) == [("a", False), ("b", False), ("bad", True), ("victim", False)]
    assert (outcomes["victim"].halted, outcomes["victim"].steps) == (True, 6)
    assert outcomes["victim"].stopped == "ended"
    assert max(crowd.runs["victim"].kept) == 6
    for name in ("a", "b"):
        assert not outcomes[name].halted
        assert_same(crowd, name, changes[name])


def test_a_judge_that_never_decides_is_an_error() -> None:
    """Fails when it is waited for ever."""
    crowd = Crowd(a={}, b={})
    with pytest.raises(RuntimeError, match="wait for each other"):
        crowd.train(judge=Ending("a", 3))


def test_a_finished_one_is_only_reported() -> None:
    """One of two was over before: nothing of it is computed, and the judge knows its curve."""
    first = Crowd(a={"lr": 0.01})
    first.train()
    crowd = Crowd(a={"lr": 0.01}, b={})
    crowd.jobs["a"] = job(first.runs["a"], crowd.models["a"], lr=0.01, resume=True)
    curves = {}

    class Listening(Ending):
        def over(self, name: str, curve: Any) -> None:
            curves[name] = curve

    judge = Listening("", 1)
    judge.count = 1
    outcomes = crowd.train(judge=judge)
    assert {s.name for shares in crowd.passes for s in shares} == {"b"}
    assert [step for step, _ in curves["a"]] == [4, 8, 12]
    assert outcomes["a"].steps == 12
    evaluated = [e.step for n, e in crowd.events if n == "b" and isinstance(e, EvalDone)]
    assert evaluated == [4, 8, 12]
    assert not any(isinstance(o, DecalError) for o in outcomes.values())
