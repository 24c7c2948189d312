"""Learning eight rows by heart: it works, leaves no trace, and tells the causes apart."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from decal.adapters import Routing
from decal.kernels.precision import multiplies_bf16
from decal.model.inject import disabled
from decal.verbs import overfit as subject
from decal.verbs.overfit import Learning, overfit
from decal.verbs.session import Session, prepare
from tests import zoo
from tests.verbs.conftest import settings
from tests.verbs.test_classify import settings as classifier


def nothing(line: str) -> None:
    """Says nothing."""


def bits(session: Session) -> dict[str, bytes]:
    """All weights and buffers, packed ones too, as bytes."""
    state = session.model.state_dict()
    named = {**state, **dict(session.model.named_parameters())}
    return {n: t.detach().contiguous().view(torch.uint8).numpy().tobytes()
            for n, t in named.items() if t.ndim}  # fmt: skip


@pytest.fixture(scope="module")
def session(tmp_path_factory: pytest.TempPathFactory) -> Session:
    """The demo, quantized, with an adapter that has learned nothing."""
    return prepare(settings(tmp_path_factory.mktemp("demo")), nothing)


def names(found: Learning) -> list[str]:
    return [cause.name for cause in found.causes]


def test_a_sound_run_learns_and_nothing_is_left_of_it(session: Session) -> None:
    """Mutations: keep one parameter; draw a number from torch's generator; leave a gradient, the
    flat attention or training mode behind."""
    session.model.train()
    before, state = bits(session), torch.get_rng_state()
    attention = session.model.config._attn_implementation
    found = overfit(session)
    assert found.verdict == "learned"
    assert found.losses[-1] < 0.2 * found.losses[0] <= 0.2 * max(found.losses) * 1.001
    assert len(set(found.rows)) == 8
    assert found.causes == ()
    assert found.lr == session.config.train.lr == 2e-3
    assert bits(session) == before
    assert torch.equal(torch.get_rng_state(), state)
    assert session.model.config._attn_implementation == attention
    assert session.model.training
    assert all(p.grad is None for p in session.parameters.values())
    assert found.as_dict()["losses"] == list(found.losses)


def test_it_has_no_dropout(session: Session) -> None:
    """The losses are the same whatever the dropout. Mutation: pass an epoch."""
    first = overfit(session).losses
    torch.manual_seed(5)
    assert overfit(session).losses == first


@pytest.fixture
def few_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where nothing is learned, a hundred steps show no more than these."""
    monkeypatch.setattr(subject, "STEPS", 12)


@pytest.mark.usefixtures("few_steps")
def test_a_rate_that_is_far_too_small(session: Session) -> None:
    """Mutation: take any loss that does not fall for a broken mask."""
    found = overfit(session, lr=1e-9)
    assert found.verdict == "failed"
    assert names(found) == ["learning rate"]
    assert "too low" in found.causes[0].text


@pytest.mark.usefixtures("few_steps")
def test_a_rate_that_is_far_too_high(session: Session) -> None:
    """Mutation: ask only whether the weights moved."""
    found = overfit(session, lr=30.0)
    assert found.verdict in ("failed", "unclear")
    assert names(found) == ["learning rate"]
    assert "too high" in found.causes[0].text


@pytest.mark.parametrize("share", [0.0, 0.3])
def test_a_broken_mask(session: Session, share: float) -> None:
    """No token trained, or tokens drawn by lot. Mutations: call the frozen parameters first; take
    scattered tokens for answers."""
    generator = np.random.default_rng(0)

    def broken(sample: Any) -> Any:
        lots = generator.random(len(sample)) < share
        lots[0] = False
        return replace(sample, trained=lots, ended=False)

    samples = [broken(sample) for sample in session.samples]
    damaged = replace(session, samples=samples, batches=replace(session.batches, samples=samples))
    found = overfit(damaged)
    assert names(found) == ["mask"]
    assert found.verdict == "failed" or share


def test_a_frozen_adapter(session: Session) -> None:
    """Nothing requires a gradient. Mutation: fail for want of parameters."""
    trained = list(session.parameters.values())
    for parameter in trained:
        parameter.requires_grad_(False)
    try:
        found = overfit(session)
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)
    assert (found.verdict, names(found)) == ("failed", ["frozen parameters"])


def test_an_adapter_that_is_switched_off(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    """The loss depends on nothing. Mutation: let autograd's error through."""
    off = Routing((), None)
    monkeypatch.setattr(Session, "_routing", lambda *_: off)
    with disabled(session.model):
        found = overfit(session)
    assert (found.verdict, names(found)) == ("failed", ["frozen parameters"])
    assert "switched on" in found.causes[0].text


@pytest.mark.usefixtures("few_steps")
def test_a_base_that_cannot_read_the_rows(tmp_path: Path) -> None:
    """Weights drawn by lot are sure of nonsense. Mutation: judge by the trained tokens alone."""
    base = {"path": str(zoo.save("qwen2", tmp_path / "base")), "dtype": "float32"}
    data = {"path": settings(tmp_path).data.path, "max_length": 512}
    prepared = prepare(settings(tmp_path, base=base, quant="none", data=data), nothing)
    found = overfit(prepared, lr=1e-9)
    assert names(found) == ["template", "learning rate"]


def test_time_runs_out(session: Session) -> None:
    """After three steps of a minute's clock. Mutation: count steps only."""
    ticks = itertools.count(0.0, 25.0)
    found = overfit(session, lr=1e-3, clock=lambda: next(ticks))
    assert len(found.losses) == 2
    assert found.verdict == "unclear" or found.causes


def test_memory_is_short(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is said, and nothing is tried. Mutation: forget the optimizer's two moments."""
    parameters = sum(p.numel() for p in session.parameters.values())
    monkeypatch.setattr(subject, "memory", lambda: {"available": int(parameters * 12 / 0.8)})
    found = overfit(session)
    assert found.verdict == "skipped"
    assert "are free" in found.reason
    assert found.losses == ()


@pytest.mark.parametrize("name", ["bert", "llama_classify"])
def test_classifiers(name: str, tmp_path: Path) -> None:
    """All classes are among the eight rows, and the head is put back. Mutations: take the shortest
    rows of one class; restore the adapter's factors only."""
    session = prepare(classifier(tmp_path, zoo.save(name, tmp_path / "base")), nothing)
    before, state = bits(session), torch.get_rng_state()
    found = overfit(session)
    labels = {sample.row: sample.label for sample in session.samples}
    assert {labels[row] for row in found.rows} == {0, 1, 2}
    assert found.verdict == "learned"
    assert bits(session) == before
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    "dtype",
    [
        "float32",
        pytest.param(
            "bfloat16",
            marks=pytest.mark.skipif(
                not multiplies_bf16(), reason="this processor takes minutes for bf16 products"
            ),
        ),
    ],
)
def test_every_weight(dtype: str, tmp_path: Path) -> None:
    """Full fine-tuning, at a rate of its own. Mutations: restore masters instead of weights; 1e-3
    for a whole model."""
    base = {"path": settings(tmp_path).base.path, "dtype": dtype}
    changes: dict[str, Any] = {"base": base, "quant": "none", "adapter": "full"}
    train = {"max_steps": 20, "batch_size": 8, "lr": 1e-5}
    session = prepare(settings(tmp_path, **changes, train=train), nothing)
    before = bits(session)
    found = overfit(session)
    assert found.lr == 1e-4
    assert found.verdict == "learned"
    assert bits(session) == before


def test_how_far_the_run_reaches(tmp_path: Path) -> None:
    """A thousandth of the rate reaches a thousandth of the way. Mutation: measure at the run's own
    rate, which then seems too low only for eight rows."""
    reach = []
    for lr in (1e-3, 1e-6):
        train = {"max_steps": 50, "batch_size": 8, "lr": lr}
        session = prepare(settings(tmp_path, train=train), nothing)
        found = overfit(session)
        assert found.lr == 1e-3
        assert found.verdict == "learned"
        reach.append(found.reach or 0.0)
    assert reach[0] > 1
    assert reach[1] == pytest.approx(reach[0] / 1000, rel=1e-6)
