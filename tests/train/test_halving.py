"""Who is ended when: the worse half, never the last two, the same in any order of arrival."""

from __future__ import annotations

import random

import pytest

from decal.train.checkpoint import Progress
from decal.train.halving import LAST, Curve, Halving, halvings

STEPS, EVERY = 64, 4


@pytest.mark.parametrize(
    ("count", "left"), [(0, []), (1, []), (2, []), (3, [2]), (4, [2]), (5, [3, 2]), (8, [4, 2])]
)
def test_how_many_are_left(count: int, left: list[int]) -> None:
    """Fails when an odd number is halved down, or the last two are halved."""
    assert halvings(count) == left


class Race:
    """Candidates that come to their evaluations in a random order, as `train_together` asks."""

    def __init__(self, curves: dict[str, Curve], judge: Halving, shuffled: random.Random):
        self.curves, self.judge, self.random = curves, judge, shuffled
        self.at = dict.fromkeys(curves, 0)
        """Evaluations that each has seen."""
        self.waiting: set[str] = set()
        self.over: set[str] = set()
        self.fails: dict[str, int] = {}
        """Evaluations after which one fails."""

    def run(self, most: int = 10_000) -> None:
        """Up to so many events."""
        for _ in range(most):
            free = [n for n in self.curves if n not in self.waiting | self.over]
            if not free and not self.waiting:
                return
            if free:
                self.move(self.random.choice(free))
            self.ask()

    def move(self, name: str) -> None:
        if self.at[name] == self.fails.get(name):
            self.end(name, failed=True)
        elif self.at[name] == len(self.curves[name]):
            self.end(name)
        else:
            self.at[name] += 1
            self.waiting.add(name)

    def end(self, name: str, *, failed: bool = False) -> None:
        self.over.add(name)
        self.judge.over(name, None if failed else self.curves[name][: self.at[name]])

    def ask(self) -> None:
        waiting = {n: Progress(eval_curve=self.curves[n][: self.at[n]]) for n in self.waiting}
        verdicts = self.judge.verdicts(waiting) if waiting else {}
        assert verdicts or len(self.waiting | self.over) < len(self.curves) or not waiting
        for name, verdict in verdicts.items():
            self.waiting.discard(name)
            if verdict is not None:
                self.end(name)


def curves_of(count: int, seed: int, *, short: bool = False) -> dict[str, Curve]:
    draw = random.Random(seed)
    found = {}
    for i in range(count):
        last = draw.choice([STEPS, STEPS // 3]) if short else STEPS
        steps = range(EVERY, last + 1, EVERY)
        found[f"c{i}"] = [(step, draw.random()) for step in steps]
    return found


def decided(curves: dict[str, Curve], seed: int, fails: dict[str, int] | None = None) -> Race:
    judge = Halving(list(curves), dict.fromkeys(curves, STEPS))
    race = Race(curves, judge, random.Random(seed))
    race.fails = fails or {}
    race.run()
    assert race.over == set(curves)
    return race


@pytest.mark.parametrize("count", range(1, 12))
@pytest.mark.parametrize("short", [False, True])
def test_the_same_in_any_order(count: int, short: bool) -> None:
    """Whoever comes first, and whether some stop early by themselves: one decision.

    Fails when a round is decided by those that are there, or more than all but two are ended.
    """
    curves = curves_of(count, count, short=short)
    found = [decided(curves, seed) for seed in range(12)]
    assert len({tuple(sorted(race.judge.ended.items())) for race in found}) == 1
    assert len({tuple(sorted(race.at.items())) for race in found}) == 1
    kept = count - len(found[0].judge.ended)
    assert kept >= min(count, LAST)
    if not short:
        assert kept == min(count, LAST)


@pytest.mark.parametrize("count", range(3, 10))
def test_failures_count_until_they_happen(count: int) -> None:
    """One fails before its first evaluation, one after its third, in any order: one decision.

    Fails when a failed one takes a place of the last two, or others wait for it for ever.
    """
    curves, fails = curves_of(count, count), {"c0": 0, "c1": 3}
    found = [decided(curves, seed, fails) for seed in range(12)]
    assert len({tuple(sorted(race.judge.ended.items())) for race in found}) == 1
    finished = set(curves) - set(found[0].judge.ended) - set(fails)
    assert len(finished) >= min(LAST, count - len(fails))


@pytest.mark.parametrize("count", range(3, 10))
def test_the_same_after_a_restart(count: int) -> None:
    """Stopped after some events; those that are over are known, the rest begins where it was.

    Fails when those that were ended before are not compared with, or the order decides.
    """
    curves = curves_of(count, 50 + count)
    whole = decided(curves, 0)
    for seed in range(20):
        first = Race(
            curves, Halving(list(curves), dict.fromkeys(curves, STEPS)), random.Random(seed)
        )
        first.run(seed * 2)
        known = {n: curves[n][: first.at[n]] for n in first.over}
        judge = Halving(list(curves), dict.fromkeys(curves, STEPS), known)
        again = Race(curves, judge, random.Random(seed + 1))
        again.over = set(first.over)
        # Checkpoints are behind what was evaluated, by one evaluation at most.
        again.at = {n: at - (n not in first.over and at > 0) for n, at in first.at.items()}
        again.waiting = {n for n in curves if n not in first.over and again.at[n]}
        again.ask()
        again.run()
        assert again.at == whole.at
        assert {**first.judge.ended, **again.judge.ended} == whole.judge.ended


def test_who_is_ended_and_why() -> None:
    """Four candidates, one halving at half of the steps. Fails when the first evaluation counts
    instead of the one at half, or the best are ended."""
    losses = {"a": (3.0, 1.0), "b": (2.0, 2.0), "c": (1.0, 3.0), "d": (0.5, 4.0)}
    judge = Halving(list(losses), dict.fromkeys(losses, 10))
    early = {n: Progress(eval_curve=[(2, pair[0])]) for n, pair in losses.items()}
    assert judge.verdicts(early) == dict.fromkeys(losses)
    half = {n: Progress(eval_curve=[(2, p[0]), (6, p[1])]) for n, p in losses.items()}
    some = {n: half[n] for n in ("a", "b", "c")}
    assert judge.verdicts(some) == {}
    verdicts = judge.verdicts(half)
    assert [verdicts[n] is None for n in losses] == [True, True, False, False]
    assert verdicts["d"] == (
        "halved out at an eval loss of 4.0000, place 4 of 4; the 2 that went on had 2.0000 or less"
    )
