"""Figures of several runs: losses, quality against size, what adapters learned, memory.

Each is drawn once, in roles instead of colours (`Theme`): with the colours of `LIGHT` it is a PNG
or a figure in a notebook, with the placeholders of svg.py it takes the page's colours, light or
dark. One size is for a phone's width and for half a page, so that text is readable on both.

As in plots.py there is no pyplot and no display.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter, NullLocator

from decal.report.advice import Advice
from decal.report.candidate import Candidate
from decal.report.plots import Drawn, Points, smoothed
from decal.report.spectra import Learned, kinds, layers, relative

SIZE = (4.4, 3.0)
"""Inches; a point is a pixel and a half where the figure fills half a wide page."""
DPI = 160
FONT = 9.0
LEFT, TOP, BOTTOM = 40.0, 28.0, 34.0
"""Margins in points: tick labels, the title, the axis' name."""
GAP = 0.062
"""Least distance of two labels, in heights of the axes."""
LOG = 6.0
"""Largest loss over smallest from which the axis is logarithmic."""


@dataclass(frozen=True, kw_only=True)
class Theme:
    """Colours by role."""

    ink: str
    muted: str
    grid: str
    card: str
    """What the figure lies on."""
    mark: str
    """The recommended candidate."""
    series: tuple[str, ...]


LIGHT = Theme(
    ink="#1c2530",
    muted="#5b6875",
    grid="#e3e7eb",
    card="#ffffff",
    mark="#0b6b3a",
    series=(
        "#0067b1", "#c8500a", "#00795a", "#a8458a",
        "#8a6100", "#5a6b7b", "#b3283c", "#2f7fb8",
    ),
)  # fmt: skip
"""Hues after Okabe and Ito (2008), darkened until text in them is readable on white."""
DASHES = ("solid", (0, (4, 1.6)), (0, (1.2, 1.4)))
"""For more candidates than hues."""


def plain(text: str) -> str:
    """A name as matplotlib shows it: a dollar sign would begin a formula."""
    return "".join(c if c.isprintable() else "·" for c in text).replace("$", r"\$")


def short(text: str, most: int = 18) -> str:
    return text if len(text) <= most else text[: most - 1] + "…"


def style(theme: Theme, place: int) -> dict[str, Any]:
    """Colour and dashes of the candidate at this place."""
    hues = len(theme.series)
    return {
        "color": theme.series[place % hues],
        "linestyle": DASHES[place // hues % len(DASHES)],
    }


def _begin(
    theme: Theme, size: tuple[float, float] = SIZE, *, left: float = LEFT, right: float = 12.0
) -> tuple[Figure, Axes]:
    """A figure with one axes inside fixed margins, `left` and `right` in points.

    Rejected: constrained layout, which takes as long as all the rest, and by which the axes of two
    figures below each other begin at different places.
    """
    figure = Drawn(figsize=size, dpi=DPI, facecolor=theme.card)
    FigureCanvasAgg(figure)
    wide, tall = (72 * length for length in size)
    box = (left / wide, BOTTOM / tall, (wide - left - right) / wide, (tall - TOP - BOTTOM) / tall)
    return figure, figure.add_axes(box, facecolor="none")


def _room(names: Sequence[str]) -> float:
    """Points that the longest of these names takes, and a little air."""
    return 10.0 + 0.6 * FONT * max((len(short(name)) for name in names), default=0)


def _dress(axes: Axes, theme: Theme, x: str, title: str) -> None:
    """Axes without frame; the title says what the vertical axis is."""
    axes.set_axisbelow(True)
    axes.grid(axis="y", color=theme.grid, linewidth=0.7)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(theme.grid)
    axes.tick_params(colors=theme.muted, labelsize=FONT, length=0, which="both")
    axes.set_xlabel(x, color=theme.muted, fontsize=FONT)
    figure = axes.figure
    assert isinstance(figure, Figure)
    place = (1.5 / (72 * figure.get_figwidth()), 1 - 3 / (72 * figure.get_figheight()))
    figure.text(*place, title, va="top", color=theme.ink, fontsize=FONT + 1, fontweight="bold")


def _number(value: float, _: Any = None) -> str:
    return f"{value:.4g}"


def _vertical(axes: Axes, values: Sequence[float]) -> bool:
    """Sets the range, and a logarithmic axis where losses differ by much; says whether."""
    known = [v for v in values if math.isfinite(v)]
    if not known:
        return False
    low, high = min(known), max(known)
    if low > 0 and high / low >= LOG:
        axes.set_yscale("log")
        axes.set_ylim(low / 1.15, high * 1.1)
        axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axes.yaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_formatter(FuncFormatter(_number))
        axes.yaxis.set_minor_formatter(NullFormatter())
        return True
    room = 0.08 * (high - low) or 0.1 * abs(high) or 1.0
    axes.set_ylim(low - room, high + room)
    axes.yaxis.set_major_locator(MaxNLocator(nbins=5))
    axes.yaxis.set_major_formatter(FuncFormatter(_number))
    return False


@dataclass(frozen=True)
class _Label:
    text: str
    color: str
    at: tuple[float, float]
    bold: bool = False


def _label_ends(axes: Axes, labels: Sequence[_Label]) -> None:
    """Names at the right ends of their lines, moved apart where they would cover each other."""
    inverse = axes.transAxes.inverted()
    heights = [float(inverse.transform(axes.transData.transform(one.at))[1]) for one in labels]
    order = sorted(range(len(labels)), key=heights.__getitem__)
    placed = apart([min(max(heights[i], 0.0), 1.0) for i in order], GAP)
    for i, height in zip(order, placed, strict=True):
        one = labels[i]
        axes.annotate(
            plain(short(one.text)),
            (1.0, height),
            xycoords="axes fraction",
            xytext=(4, 0),
            textcoords="offset points",
            va="center",
            color=one.color,
            fontsize=FONT,
            fontweight="bold" if one.bold else "normal",
            annotation_clip=False,
        )


def apart(places: Sequence[float], gap: float) -> list[float]:
    """Sorted places moved as little as possible, in squares, until neighbours are `gap` apart.

    With i * gap taken off, that is the closest rising sequence: runs that fall become their mean.
    """
    runs: list[tuple[float, int]] = []
    for i, place in enumerate(places):
        mean, size = place - i * gap, 1
        while runs and runs[-1][0] > mean:
            before, many = runs.pop()
            mean, size = (mean * size + before * many) / (size + many), size + many
        runs.append((mean, size))
    flat = [mean for mean, size in runs for _ in range(size)]
    return [place + i * gap for i, place in enumerate(flat)]


def losses_figure(
    candidates: Sequence[Candidate],
    name: str = "eval_loss",
    *,
    names: Sequence[str] = (),
    theme: Theme = LIGHT,
) -> Figure | None:
    """One loss of all candidates, each named at the end of its line.

    Args:
        candidates: in the order of their colours.
        name: `loss` (smoothed) or `eval_loss`.
        names: those to be set in bold.

    Returns:
        None where no candidate has such a loss.
    """
    curves = [(place, one, _shown(one, name)) for place, one in enumerate(candidates)]
    curves = [(place, one, curve) for place, one, curve in curves if curve[0]]
    if not curves:
        return None
    figure, axes = _begin(theme, right=_room([one.name for _, one, _ in curves]))
    dots = name == "eval_loss"
    for place, _, (steps, values) in curves:
        marker: dict[str, Any] = (
            {"marker": "o", "markersize": 3.2} if dots or len(steps) == 1 else {}
        )
        axes.plot(steps, values, linewidth=1.6, **style(theme, place), **marker)
    log = _vertical(axes, [v for _, _, (_, values) in curves for v in values])
    end = max(max(steps) for _, _, (steps, _) in curves)
    axes.set_xlim(0, end)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
    kind = "Evaluation loss" if dots else "Training loss, smoothed"
    _dress(axes, theme, "step", kind + (" (log scale)" if log else ""))
    _label_ends(
        axes,
        [
            _Label(one.name, style(theme, place)["color"], (end, values[-1]), one.name in names)
            for place, one, (_, values) in curves
        ],
    )
    return figure


def run_figure(candidate: Candidate, *, theme: Theme = LIGHT) -> Figure | None:
    """Training and evaluation loss of one run; the distance between them is what to look at.

    None where there is neither.
    """
    train, evaluations = candidate.curve("loss"), candidate.curve("eval_loss")
    if not train[0] and not evaluations[0]:
        return None
    figure, axes = _begin(theme, right=_room(["evaluation"]))
    labels = []
    trend = smoothed(train[1])
    end = max([*train[0], *evaluations[0]])
    if train[0]:
        colour = theme.series[0]
        axes.plot(*train, color=colour, linewidth=0.7, alpha=0.35)
        axes.plot(train[0], trend, color=colour, linewidth=1.6)
        labels.append(_Label("training", colour, (end, trend[-1])))
    if evaluations[0]:
        colour = theme.series[1]
        axes.plot(*evaluations, color=colour, linewidth=1.4, marker="o", markersize=3.6)
        labels.append(_Label("evaluation", colour, (end, evaluations[1][-1])))
    log = _vertical(axes, [*trend, *evaluations[1]])
    axes.set_xlim(0, end)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
    title = "Loss per trained token" + (" (log scale)" if log else "")
    _dress(axes, theme, "step", title)
    _label_ends(axes, labels)
    return figure


def _shown(candidate: Candidate, name: str) -> Points:
    steps, values = candidate.curve(name)
    return (steps, smoothed(values)) if name == "loss" else (steps, values)


def quality_figure(
    candidates: Sequence[Candidate], advice: Advice, *, theme: Theme = LIGHT
) -> Figure | None:
    """Best evaluation loss against trainable parameters, the recommended one ringed.

    The band is what counts as equal to the best: the noise. None for fewer than two points.
    """
    found = [
        (place, one, one.trainable, one.best[1])
        for place, one in enumerate(candidates)
        if one.trainable and one.best is not None and one.finished
    ]
    if len(found) < 2:
        return None
    figure, axes = _begin(theme)
    sizes, values = [size for *_, size, _ in found], [value for *_, value in found]
    axes.set_xscale("log")
    low, high = min(sizes), max(sizes)
    axes.set_xlim(low / 1.6, high * 1.6)
    log = _vertical(axes, values)
    if advice.best is not None and advice.noise is not None:
        axes.axhspan(advice.best, advice.best + advice.noise, color=theme.mark, alpha=0.16, lw=0)
    line = sorted(zip(sizes, values, strict=True))
    axes.plot(*zip(*line, strict=True), color=theme.grid, linewidth=1.2, zorder=1)
    for place, one, size, value in found:
        chosen = one.name in advice.names
        colour = style(theme, place)["color"]
        axes.plot([size], [value], "o", markersize=6, color=colour, zorder=3)
        if chosen:
            axes.plot(
                [size], [value], "o", markersize=13, markerfacecolor="none",
                markeredgecolor=theme.mark, markeredgewidth=1.8, zorder=4,
            )  # fmt: skip
        axes.annotate(
            plain(short(one.name)),
            (size, value),
            xytext=(0, 10 if chosen else 7),
            textcoords="offset points",
            ha="center",
            color=theme.mark if chosen else theme.ink,
            fontsize=FONT,
            fontweight="bold" if chosen else "normal",
            zorder=5,
        )
    _sizes(axes, sizes)
    bottom, top = axes.get_ylim()
    axes.set_ylim(bottom, top * (top / bottom) ** 0.12 if log else top + 0.12 * (top - bottom))
    title = "Best evaluation loss" + (" (log scale)" if log else "")
    _dress(axes, theme, "trainable parameters (log scale)", title)
    return figure


def _sizes(axes: Axes, sizes: Sequence[int]) -> None:
    """Ticks at the candidates themselves, as far as they have room."""
    shown: list[int] = []
    for size in sorted(set(sizes)):
        if not shown or size / shown[-1] > 1.5:
            shown.append(size)
    axes.set_xticks(shown, [count(size) for size in shown])
    axes.xaxis.set_minor_locator(NullLocator())


def count(number: float) -> str:
    """`92k`, `1.6M`: parameters as people say them."""
    for unit, size in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:.3g}{unit}"
    return f"{number:.0f}"


def kept_figure(
    learned: Mapping[str, Learned | None],
    *,
    names: Sequence[str] = (),
    theme: Theme = LIGHT,
) -> Figure | None:
    """The share of the update's energy that one rank everywhere keeps, of each adapter.

    `learned` is by candidate, in the order of their colours; `names` are to be set in bold.
    """
    found = [
        (place, name, one["kept"]) for place, (name, one) in enumerate(learned.items())
        if one and one["kept"]
    ]  # fmt: skip
    if not found:
        return None
    figure, axes = _begin(theme)
    longest = max(len(kept) for *_, kept in found)
    for place, _, kept in found:
        ranks = list(range(1, len(kept) + 1))
        axes.plot(ranks, [100 * k for k in kept], linewidth=1.6, **style(theme, place))
        axes.plot([ranks[-1]], [100 * kept[-1]], "o", markersize=3.6, **style(theme, place))
    axes.axhline(99, color=theme.muted, linewidth=0.8, linestyle=(0, (3, 2)))
    least = min(100 * kept[0] for *_, kept in found)
    axes.set_ylim(max(0.0, least - 0.1 * (100 - least)), 101.5)
    if longest > 1:
        axes.set_xscale("log", base=2)
        axes.set_xlim(1, longest)
    ticks = [1 << i for i in range(longest.bit_length())]
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.0f} %"))
    _dress(axes, theme, "rank kept (log scale)", "Energy of the update that a rank keeps")
    if len(found) > 1:
        handles = axes.get_lines()[: 2 * len(found) : 2]
        axes.legend(
            handles,
            [plain(short(name)) for _, name, _ in found],
            frameon=False,
            fontsize=FONT,
            labelcolor=theme.ink,
            loc="lower right",
            ncols=1 + (len(found) > 6),
        )
    return figure


def spectrum_figure(learned: Learned, *, title: str = "", theme: Theme = LIGHT) -> Figure:
    """The heat map of one adapter: how large each module's update is, layer by layer.

    Update over base weight where the base was at hand, else the update's norm.
    """
    rows, columns = kinds(learned), layers(learned)
    wide, tall = max(SIZE[0], 1.8 + 0.16 * len(columns)), max(1.6, 0.9 + 0.24 * len(rows))
    left, right = _room([row.name for row in rows]), 56.0
    figure, axes = _begin(theme, (wide, tall), left=left, right=right)
    share = relative(learned)
    cells = [[math.nan if v is None else v * (100 if share else 1) for v in row.sizes] for row in
             rows]  # fmt: skip
    ramp = LinearSegmentedColormap.from_list("update", [theme.grid, theme.series[0]])
    mesh = axes.pcolormesh(cells, cmap=ramp, vmin=0.0, edgecolors=theme.card, linewidth=1.0)
    axes.invert_yaxis()
    axes.set_yticks([i + 0.5 for i in range(len(rows))], [plain(short(row.name)) for row in rows])
    every = max(1, math.ceil(len(columns) / 16))
    marks = range(0, len(columns), every)
    axes.set_xticks([i + 0.5 for i in marks], [_layer(columns[i]) for i in marks])
    what = "update / base weight" if share else "norm of the update"
    _dress(axes, theme, "layer", plain(short(title, 40)) + (" · " if title else "") + what)
    axes.grid(visible=False)
    axes.spines["bottom"].set_visible(False)
    place = axes.get_position()
    at = (place.x1 + 8 / (72 * wide), place.y0, 8 / (72 * wide), place.height)
    bar = figure.colorbar(mesh, cax=figure.add_axes(at))
    bar.outline.set_visible(False)
    bar.ax.tick_params(colors=theme.muted, labelsize=FONT - 1, length=0)
    if share:
        bar.ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.3g} %"))
    return figure


def _layer(layer: int | None) -> str:
    return "–" if layer is None else str(layer)
