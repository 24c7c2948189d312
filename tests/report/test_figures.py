"""Figures: every candidate is in them and named, and names cannot act."""

from __future__ import annotations

import random
import re
from itertools import pairwise

import pytest
from matplotlib.figure import Figure

from decal.report.advice import recommend, scores
from decal.report.candidate import Candidate
from decal.report.figures import (
    LIGHT,
    apart,
    count,
    kept_figure,
    losses_figure,
    plain,
    quality_figure,
    run_figure,
    spectrum_figure,
)
from decal.report.plots import as_png
from decal.report.style import DARK
from decal.report.svg import PLACEHOLDERS, inline
from tests.report.made_up import HOSTILE, candidate, learned
from tests.report.test_plots import share_of


def texts(figure: Figure) -> list[str]:
    found = [text.get_text() for axes in figure.axes for text in axes.texts]
    return [text.replace(r"\$", "$") for text in found]


def luminance(colour: str) -> float:
    """Relative luminance of sRGB, as WCAG 2 defines it."""
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("theme", [LIGHT, DARK], ids=["light", "dark"])
def test_colours_can_be_read_on_the_card(theme: object) -> None:
    """WCAG: 4.5 for text, 3 for lines. Mutation: the light scheme's colours on a dark card."""
    assert isinstance(theme, type(LIGHT))

    def contrast(colour: str) -> float:
        a, b = sorted((luminance(colour), luminance(theme.card)))
        return (b + 0.05) / (a + 0.05)

    assert min(map(contrast, (theme.ink, theme.muted, theme.mark))) >= 4.5
    assert min(map(contrast, theme.series)) >= 4.2


@pytest.mark.parametrize("seed", range(5))
def test_labels_are_moved_apart_as_little_as_possible(seed: int) -> None:
    """Order kept, distance kept, and none moves that had room. Mutation: push upwards only."""
    chance = random.Random(seed)
    places = sorted(chance.random() for _ in range(9))
    moved = apart(places, 0.05)
    assert all(b - a >= 0.05 - 1e-12 for a, b in pairwise(moved))
    assert sum(moved) == pytest.approx(sum(places))
    assert apart([0.0, 0.5, 0.52, 1.0], 0.1) == pytest.approx([0.0, 0.46, 0.56, 1.0])


def test_every_candidate_is_drawn_and_named() -> None:
    """More than there are hues. Mutation: leave one out, or repeat colour and dashes."""
    candidates = [candidate(2 * r) for r in range(1, 12)]
    figure = losses_figure(candidates, names=["r2"])
    assert figure is not None
    assert texts(figure) == [one.name for one in sorted(candidates, key=lambda c: -c.r)]
    styles = {(line.get_color(), str(line.get_linestyle()), str(line._unscaled_dash_pattern))
              for line in figure.axes[0].lines}  # fmt: skip
    assert len(styles) == 11
    assert losses_figure([Candidate(name="a")]) is None


def test_losses_that_fall_far_are_on_a_log_scale() -> None:
    steep = [{"step": s, "eval_loss": 10.0 ** -(s / 20)} for s in range(1, 41)]
    figure = losses_figure([Candidate(name="a", rows=steep)])
    assert figure is not None
    assert figure.axes[0].get_yscale() == "log"
    even = losses_figure([candidate(8)], "loss")
    assert even is not None
    assert even.axes[0].get_yscale() == "linear"


def test_the_recommended_candidate_is_ringed() -> None:
    """Mutation: ring the best instead, or no band of noise."""
    candidates = [candidate(r) for r in (2, 4, 256, 512)]
    advice = recommend(scores(candidates))
    assert advice.names == ("r256",)
    figure = quality_figure(candidates, advice)
    assert figure is not None
    rings = [line for line in figure.axes[0].lines if line.get_markersize() == 13]
    assert [list(ring.get_xdata()) for ring in rings] == [[20_000 * 256]]
    assert share_of(as_png(figure), LIGHT.mark) > 1e-4
    assert quality_figure(candidates[:1], advice) is None


def test_a_single_run_shows_training_beside_evaluation() -> None:
    figure = run_figure(candidate(8))
    assert figure is not None
    assert sorted(texts(figure)) == ["evaluation", "training"]
    assert run_figure(Candidate(name="a")) is None
    alone = run_figure(Candidate(name="a", rows=[{"step": 3, "eval_loss": 1.0}]))
    assert alone is not None


def test_energy_and_heat_of_adapters() -> None:
    """Mutation: cells in another order than their labels."""
    assert kept_figure({"a": {"kept": []}}) is None
    assert kept_figure({"a": learned(1)}) is not None
    figure = spectrum_figure(learned(8, 40), title="r8")
    mesh = figure.axes[0].collections[0].get_array()
    assert mesh is not None
    assert mesh.shape == (7, 40)
    assert float(mesh[0, 39]) == pytest.approx(39.5)
    assert figure.axes[0].get_yticklabels()[0].get_text() == "q_proj"


def test_names_are_no_formulas_and_no_elements() -> None:
    """Mutation: let matplotlib parse a dollar sign, or paste a label without escaping."""
    bad = [candidate(4, name=HOSTILE), candidate(8, name=r"\$ $\frac{$")]
    figure = losses_figure(bad, theme=PLACEHOLDERS)
    assert figure is not None
    drawn = inline(figure, HOSTILE)
    assert "<script" not in drawn
    assert "<img" not in drawn
    assert "<text" in drawn
    assert plain("a$b\x1b") == r"a\$b·"


def test_drawings_do_not_act_on_the_page() -> None:
    """Mutation: leave matplotlib's style sheet, its metadata, or fixed colours and fonts."""
    figure = losses_figure([candidate(4), candidate(8)], theme=PLACEHOLDERS)
    assert figure is not None
    drawn = inline(figure, "losses")
    assert drawn.startswith('<svg viewBox="0 0 ')
    assert not re.findall(r"<style|<metadata|<!--|DejaVu|id=\"figure", drawn)
    assert "var(--c0)" in drawn
    assert "var(--ink)" in drawn
    again = losses_figure([candidate(4), candidate(8)], theme=PLACEHOLDERS)
    assert again is not None
    assert inline(again, "losses") == drawn


@pytest.mark.parametrize(
    ("number", "text"), [(999, "999"), (92_160, "92.2k"), (1_572_864, "1.57M"), (7e9, "7B")]
)
def test_counts(number: float, text: str) -> None:
    assert count(number) == text
