"""Recommendations: the smallest within noise of the best, and a reason where there is none."""

from __future__ import annotations

from typing import Any

import pytest

from decal.report.advice import Score, recommend, scores
from decal.report.candidate import Candidate


def ranks(losses: dict[int, float], **more: Any) -> list[Score]:
    return [
        Score(name=f"r{r}", parameters=1000 * r, loss=loss, setting=f"r={r}", r=r, **more)
        for r, loss in losses.items()
    ]


def test_the_smallest_within_one_percent() -> None:
    """Mutation: take the best, or count parameters the wrong way round."""
    found = recommend(ranks({4: 1.3, 8: 1.009, 16: 1.0, 32: 1.001}))
    assert found.names == ("r8",)
    assert found.noise == pytest.approx(0.01)
    assert "8,000 trainable parameters" in found.text
    assert "1.009" in found.text
    assert "the best, 1 of r16" in found.text
    assert found.source.startswith("1 % of the best loss")
    assert found.more is None


def test_seeds_say_what_noise_is() -> None:
    """Two seeds of r=8 are 0.2 apart, so r=4 is as good. Mutation: the threshold all the same."""
    found = ranks({4: 1.15, 16: 1.0})
    found += [
        Score(name=f"r8-{seed}", parameters=8000, loss=loss, setting="r=8", r=8)
        for seed, loss in ((0, 1.0), (1, 1.2))
    ]
    advice = recommend(found)
    assert advice.noise == pytest.approx(0.2)
    assert advice.names == ("r4",)
    assert "r8-0 and r8-1" in advice.source


def test_all_seeds_of_a_setting_are_recommended_together() -> None:
    """By their mean. Mutation: let the luckiest seed stand for its setting."""
    found = [
        Score(name=f"r{r}-{seed}", parameters=1000 * r, loss=loss, setting=f"r={r}", r=r)
        for r, seed, loss in ((4, 0, 1.0), (4, 1, 1.3), (8, 0, 0.8), (8, 1, 0.81))
    ]
    advice = recommend(found)
    assert advice.names == ("r8-0", "r8-1")
    assert advice.best == pytest.approx(0.805)


def test_the_largest_rank_still_improves() -> None:
    """Mutation: be content with the largest; or say it where a larger one is still training."""
    found = ranks({4: 1.3, 8: 1.2, 16: 1.0})
    advice = recommend(found)
    assert advice.names == ("r16",)
    assert "every smaller candidate is worse" in advice.text
    assert advice.more is not None
    assert "to r=32" in advice.more
    assert recommend(found, tried=[4, 8, 16, 32]).more is None


def test_the_smallest_rank_may_not_be_the_end() -> None:
    advice = recommend(ranks({8: 1.0, 16: 1.0}))
    assert advice.names == ("r8",)
    assert advice.more is not None
    assert "r=4 may do" in advice.more
    assert recommend(ranks({1: 1.0, 2: 1.0})).more is None


def test_of_one_size_the_lowest_loss() -> None:
    """Learning rates. Mutation: take the first of them."""
    found = [
        Score(name=f"lr{lr}", parameters=8000, loss=loss, setting=f"lr={lr}", r=8)
        for lr, loss in ((1, 1.005), (2, 1.0), (3, 1.4))
    ]
    assert recommend(found).names == ("lr2",)


def test_other_rows_are_no_comparison() -> None:
    """Mutation: compare losses on other evaluation rows, or refuse seeds that both settings had."""
    other = ranks({4: 1.3}, rows="a") + ranks({8: 1.0}, rows="b")
    assert recommend(other).names == ()
    assert "same rows" in recommend(other).text
    seeds = [
        Score(name=f"r{r}-{s}", parameters=r, loss=1.0, setting=f"r={r}", r=r, rows=f"rows{s}")
        for r in (4, 8)
        for s in (0, 1)
    ]
    assert recommend(seeds).names == ("r4-0", "r4-1")


def test_one_alone_has_no_advice() -> None:
    assert recommend(ranks({4: 1.0})).names == ()
    assert recommend([]).names == ()


def test_scores_are_of_finished_and_evaluated_candidates() -> None:
    """Mutation: count one that is training, or that was never evaluated; or tell seeds apart."""
    rows = [{"step": 1, "eval_loss": 2.0}, {"step": 2, "eval_loss": 1.5}, {"step": 3, "loss": 0.1}]
    common: dict[str, Any] = {"rows": rows, "trainable": 100, "result": {"steps": 3}}
    settings = {"adapter.r": 4, "train.seed": 0, "output": "a"}
    found = scores(
        [
            Candidate(name="a", settings=settings, **common),
            Candidate(name="b", settings={**settings, "train.seed": 1, "output": "b"}, **common),
            Candidate(name="c", settings=settings, **{**common, "status": "unfinished"}),
            Candidate(name="d", settings=settings, **{**common, "rows": rows[2:]}),
            Candidate(name="e", settings=settings, **{**common, "trainable": None}),
        ]
    )
    assert [(s.name, s.loss, s.r) for s in found] == [("a", 1.5, 4), ("b", 1.5, 4)]
    assert found[0].setting == found[1].setting
