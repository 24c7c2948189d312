"""The loss curve: its numbers, and that the picture shows what the rows hold."""

from __future__ import annotations

import io
import math
import random
from typing import Any

import pytest
from matplotlib.image import imread

from decal.report.plots import EVAL, TRAIN, loss_png, points, smoothed


def rows(count: int, every: int) -> list[dict[str, Any]]:
    chance = random.Random(4)
    out: list[dict[str, Any]] = []
    for step in range(1, count + 1):
        loss = 1.0 + math.exp(-6 * step / count) + chance.gauss(0, 0.1)
        out.append({"step": step, "loss": loss, "lr": 1e-4})
        if step % every == 0:
            out.append({"step": step, "eval_loss": 1.1})
    return out


def test_smoothing_does_not_lag_and_keeps_a_constant() -> None:
    """A falling line is its own smoothing in the middle; a constant everywhere.

    Mutation: look back only (the line runs above), or count the step itself twice.
    """
    line = [100.0 - step for step in range(101)]
    assert smoothed(line)[50] == pytest.approx(50.0, abs=1e-9)
    assert smoothed([3.0] * 101) == pytest.approx([3.0] * 101, rel=1e-12)
    weights = smoothed([0.0] * 50 + [1.0] + [0.0] * 50, share=2 / 101)
    assert weights[49] == pytest.approx(weights[50] / 2, rel=1e-9)


def test_short_curves_are_not_smoothed() -> None:
    """Mutation: smooth over less than a step (division by zero or a negative weight)."""
    assert smoothed([2.0, 1.0, 4.0]) == [2.0, 1.0, 4.0]
    assert smoothed([]) == []


def test_points_leave_out_rows_without_the_number() -> None:
    """Evaluations are rows of their own, and null stands for what was not finite.

    Mutation: let None or NaN through.
    """
    found = [{"step": 1, "loss": 2.5}, {"step": 1, "eval_loss": 2.0}, {"step": 2, "loss": None}]
    assert points(found, "loss") == ([1.0], [2.5])
    assert points([{"step": 3, "loss": math.nan}], "loss") == ([], [])


def share_of(png: bytes, colour: str) -> float:
    """Share of the pixels that have this colour, within 2 %."""
    wanted = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    image = imread(io.BytesIO(png))[..., :3]
    return float((abs(image - wanted).max(axis=-1) < 0.02).mean())


def test_the_picture_shows_training_and_evaluation_on_white() -> None:
    """Mutation: leave out either curve, or let a dark style through."""
    png = loss_png(rows(200, 20), "runs/one")
    assert png.startswith(b"\x89PNG")
    assert share_of(png, TRAIN) > 1e-3
    assert share_of(png, EVAL) > 1e-3
    assert share_of(png, "#ffffff") > 0.8
    alone = loss_png([row for row in rows(200, 20) if "loss" in row])
    assert share_of(alone, EVAL) == 0


@pytest.mark.parametrize("few", [[], [{"step": 1, "loss": 2.0}], [{"step": 1, "eval_loss": 2.0}]])
def test_a_run_of_no_or_one_step_has_a_picture(few: list[dict[str, Any]]) -> None:
    """Mutation: take the minimum of nothing, or an empty range of the axis."""
    assert loss_png(few).startswith(b"\x89PNG")


def test_an_outlier_does_not_flatten_the_rest() -> None:
    """One step of loss 1000 leaves the evaluations' height in the picture as it was, nearly.

    Mutation: let the raw curve set the range.
    """
    calm, wild = rows(400, 20), rows(400, 20)
    wild[0]["loss"] = 1000.0
    assert share_of(loss_png(wild), TRAIN) > 0.3 * share_of(loss_png(calm), TRAIN)
