"""Hints: each is called for by its own curve and by no other."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable
from pathlib import Path

import pytest

from decal.report.candidate import Candidate
from decal.report.hints import hints

Curve = Callable[[int, random.Random], float]
STEPS = 120


def run(
    train: Curve, evaluations: list[float] | None = None, seed: int = 0, **result: float
) -> Candidate:
    """A finished run with this loss at every step, and evaluations spread over it."""
    chance = random.Random(seed)
    rows: list[dict[str, float]] = [
        {"step": step, "loss": train(step, chance)} for step in range(1, STEPS + 1)
    ]
    values = evaluations or []
    rows += [
        {"step": (i + 1) * STEPS // len(values), "eval_loss": value}
        for i, value in enumerate(values)
    ]
    return Candidate(name="a", rows=rows, result={"steps": STEPS, **result})


def healthy(step: int, chance: random.Random) -> float:
    """Falls from 3 to 1 and ends level, with the noise of small batches."""
    return 1.0 + 2.0 * math.exp(-8 * step / STEPS) + chance.gauss(0, 0.12)


def spiky(step: int, chance: random.Random) -> float:
    return healthy(step, chance) + (2.5 if step in (60, 90) else 0)


def kinds(candidate: Candidate) -> list[str]:
    return [hint.kind for hint in hints(candidate)]


@pytest.mark.parametrize("seed", range(20))
def test_a_healthy_run_has_no_hints(seed: int) -> None:
    """Mutation: a threshold without the curve's own noise."""
    assert kinds(run(healthy, [2.0, 1.3, 1.15, 1.14, 1.139], seed)) == []


def test_rising() -> None:
    """2 % above the lowest. Mutation: compare with the first evaluation, or any rise at all."""
    found = hints(run(healthy, [1.5, 1.2, 1.25, 1.4], kept_step=60))
    assert [hint.kind for hint in found] == ["rising"]
    assert "lowest at step 60 (1.2) and rose to 1.4" in found[0].seen
    assert "dropout" in found[0].advice
    assert "step 60" in found[0].advice
    assert kinds(run(healthy, [1.5, 1.2, 1.21, 1.215])) == []
    assert kinds(run(healthy, [1.2, 1.4])) == []


def test_spikes() -> None:
    """Mutation: look at single steps without their neighbours, or be content with one."""
    found = hints(run(spiky))
    assert [hint.kind for hint in found] == ["spikes"]
    assert "2 steps" in found[0].seen
    assert "lora_alpha" in found[0].advice
    assert kinds(run(lambda step, c: healthy(step, c) + (2.5 if step == 60 else 0))) == []


def test_diverged() -> None:
    """It says so once, not as spikes too. Mutation: compare the ends with each other."""

    def up(step: int, chance: random.Random) -> float:
        return healthy(step, chance) if step < 60 else 3.0 + chance.gauss(0, 0.1)

    assert kinds(run(up)) == ["diverged"]


def test_flat() -> None:
    """Mutation: call a loss flat that ends where it fell to."""
    found = hints(run(lambda step, c: 2.0 - 0.0003 * step + c.gauss(0, 0.02)))
    assert [hint.kind for hint in found] == ["flat"]
    assert "higher lr" in found[0].advice


def test_still_falling() -> None:
    """More than 2 % in the last third. Mutation: say it of a run that has not ended."""
    early = run(healthy, [2.0, 1.8, 1.6, 1.4, 1.2, 1.1])
    assert kinds(early) == ["falling"]
    assert "1.4 at step 80, 1.1 at step 120" in hints(early)[0].seen
    assert kinds(Candidate(name="a", rows=early.rows, status="unfinished")) == []


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("too low a learning rate", ["flat"]),
        ("r=16", ["falling"]),
        ("r=16, a high learning rate", []),
    ],
)
def test_real_runs(name: str, wanted: list[str]) -> None:
    """Sixty steps on the embedded task, as metrics.jsonl had them.

    Mutation: thresholds for smooth curves only, or a fall of 8 from 10 that is called flat.
    """
    curves = json.loads(Path(__file__).with_name("real_curves.json").read_text(encoding="utf-8"))
    assert kinds(Candidate(name=name, rows=curves[name], result={"steps": 60})) == wanted


def test_skipped_updates() -> None:
    assert kinds(run(healthy, skipped=5)) == ["skipped"]
    assert kinds(run(healthy, skipped=1)) == []


def test_short_and_empty_curves_say_nothing() -> None:
    """Mutation: divide by the length of a part that is empty."""
    assert kinds(Candidate(name="a")) == []
    rows = [{"step": 1, "loss": 2.0}, {"step": 2, "loss": None}, {"step": 2, "eval_loss": 2.0}]
    assert kinds(Candidate(name="a", rows=rows, result={"steps": 2})) == []
