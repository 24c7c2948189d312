"""The picture of a run: training loss, raw and smoothed, and the evaluations on top.

From rows of metrics.jsonl to the bytes of a PNG; knows no run folder and no display: the figure is
drawn by Agg directly, without pyplot and its global state, so a run on a server or in a thread
draws the same.

The smoothed curve weights the steps on both sides of a step. The exponential mean that is usual in
training logs looks only back, so on a falling loss it runs above it, and every evaluation seems to
be better than training. The vertical range comes from the smoothed curve and the evaluations;
single steps may leave it, because one outlier would flatten everything else.
"""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

INK, MUTED, GRID = "#1f2933", "#6b7785", "#e4e8ec"
TRAIN, EVAL = "#2f6fb0", "#d9603b"
SIZE = (8.0, 4.5)
DPI = 150

Points = tuple[list[float], list[float]]


def smoothed(values: Sequence[float], share: float = 0.025) -> list[float]:
    """Mean with weights that fall exponentially to both sides, over about `share` of the curve.

    Curves too short for that (40 steps at the default) come back as they are.
    """
    span = share * len(values)
    if span <= 1.0:
        return list(values)
    keep = 1.0 - 1.0 / span
    ahead = _trailing(values, keep)
    behind = _trailing(values[::-1], keep)[::-1]
    # Each side counts the step itself, so it is taken out once.
    return [
        (a + b - value) / (n + m - 1.0)
        for (a, n), (b, m), value in zip(ahead, behind, values, strict=True)
    ]


def _trailing(values: Sequence[float], keep: float) -> list[tuple[float, float]]:
    """(weighted sum, sum of weights) of every value and those before it."""
    total, weight = 0.0, 0.0
    out = []
    for value in values:
        total, weight = keep * total + value, keep * weight + 1.0
        out.append((total, weight))
    return out


def points(rows: Sequence[Mapping[str, Any]], name: str) -> Points:
    """(steps, values) of the rows that have a number under `name`."""
    found = [(row["step"], row[name]) for row in rows if row.get(name) is not None]
    found = [(step, value) for step, value in found if math.isfinite(value)]
    return [float(step) for step, _ in found], [float(value) for _, value in found]


class Drawn(Figure):
    """A figure that a notebook shows by itself, without pyplot and its state."""

    def _repr_png_(self) -> bytes:
        return as_png(self)


def as_png(figure: Figure) -> bytes:
    """The figure as PNG, at its own resolution."""
    out = io.BytesIO()
    figure.savefig(out, format="png")
    return out.getvalue()


def loss_png(rows: Sequence[Mapping[str, Any]], title: str = "") -> bytes:
    """`loss_figure` as PNG."""
    return as_png(loss_figure(rows, title))


def loss_figure(rows: Sequence[Mapping[str, Any]], title: str = "") -> Figure:
    """The loss curve of a run.

    Args:
        rows: of metrics.jsonl: training rows have `step` and `loss`, evaluations `eval_loss`.
        title: shown above, at the left.
    """
    figure = Drawn(figsize=SIZE, dpi=DPI, facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    train, evaluations = points(rows, "loss"), points(rows, "eval_loss")
    trend = smoothed(train[1])
    _draw_training(axes, train, trend)
    _draw_evaluations(axes, evaluations)
    _set_range(axes, [*trend, *evaluations[1]], [*train[0], *evaluations[0]])
    _dress(axes, title)
    return figure


def _draw_training(axes: Axes, train: Points, trend: Sequence[float]) -> None:
    steps, values = train
    if not steps:
        return
    marker = "o" if len(steps) == 1 else ""
    rough = list(trend) != values
    if rough:
        axes.plot(steps, values, color=TRAIN, alpha=0.28, linewidth=0.9, label="training, raw")
    label = "training, smoothed" if rough else "training"
    axes.plot(steps, trend, color=TRAIN, linewidth=2.0, marker=marker, label=label, zorder=3)


def _draw_evaluations(axes: Axes, evaluations: Points) -> None:
    steps, values = evaluations
    if not steps:
        return
    axes.plot(
        steps,
        values,
        color=EVAL,
        linewidth=1.4,
        marker="o",
        markersize=5,
        markeredgecolor="white",
        label="evaluation",
        zorder=4,
    )
    low = min(range(len(values)), key=values.__getitem__)
    axes.annotate(
        f"best {values[low]:.3f}",
        (steps[low], values[low]),
        xytext=(0, -16),
        textcoords="offset points",
        ha="center",
        va="top",
        color=EVAL,
        fontsize=9,
        fontweight="bold",
        bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.75, "pad": 1.5},
        zorder=5,
    )


def _set_range(axes: Axes, values: Sequence[float], steps: Sequence[float]) -> None:
    if not values:
        return
    axes.set_xlim(0, max(steps) * 1.03 + 0.1)
    low, high = min(values), max(values)
    room = 0.12 * (high - low) or 0.1 * abs(high) or 1.0
    axes.set_ylim(low - 1.6 * room, high + room)


def _dress(axes: Axes, title: str) -> None:
    axes.set_axisbelow(True)
    axes.grid(axis="y", color=GRID, linewidth=0.8)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(MUTED)
    axes.tick_params(colors=MUTED, labelsize=9, length=0)
    axes.tick_params(axis="x", length=3)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("step", color=MUTED, fontsize=10)
    axes.set_ylabel("loss per trained token", color=MUTED, fontsize=10)
    if title:
        axes.set_title(title, loc="left", color=INK, fontsize=12, fontweight="bold", pad=10)
    if axes.lines:
        axes.legend(frameon=False, fontsize=9, labelcolor=INK, loc="upper right")
