"""Reports in a real browser: on a phone and on a desk, in light and dark.

Nothing is wider than the screen, nothing is empty, text is as dark or light as it must be, and the
browser fetched nothing.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from matplotlib.image import imread

from decal.report.figures import LIGHT
from decal.report.page import render
from decal.report.style import DARK
from tests.report.browser import Browser, chromium
from tests.report.made_up import candidate, report, sample, wide

pytestmark = pytest.mark.skipif(
    chromium() is None, reason="no Chromium here: apt-get install chromium"
)
VIEWS = [(width, dark) for width in (400, 1400) for dark in (False, True)]
PAGES = {
    "one": lambda: report([candidate(8)], title="tickets"),
    "several": lambda: report(
        [candidate(r) for r in (2, 4, 8, 16, 32)],
        samples=[sample("The lamp is broken.", "base", "r2", "r32")],
    ),
    "wide": wide,
}


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with Browser() as running:
        yield running


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("pages")
    for name, made in PAGES.items():
        (folder / f"{name}.html").write_text(render(made()), encoding="utf-8")
    return {name: folder / f"{name}.html" for name in PAGES}


def ids(view: tuple[int, bool]) -> str:
    return f"{view[0]}-{'dark' if view[1] else 'light'}"


@pytest.mark.parametrize("view", VIEWS, ids=ids)
@pytest.mark.parametrize("name", list(PAGES))
def test_nothing_is_wider_than_the_screen(
    browser: Browser, pages: dict[str, Path], name: str, view: tuple[int, bool]
) -> None:
    """Tables scroll in their boxes. Mutation: a table, a long word or a figure without a bound."""
    browser.open(pages[name], width=view[0], dark=view[1])
    wide, seen = browser.run(
        "[document.documentElement.scrollWidth, document.documentElement.clientWidth]"
    )
    assert wide <= seen == view[0]
    outside = browser.run(
        "[...document.querySelectorAll('section *')].filter(e => !e.closest('.scroll') &&"
        " !e.closest('svg') && e.getBoundingClientRect().right > innerWidth + 0.5)"
        ".map(e => e.tagName + '.' + e.className)"
    )
    assert outside == []


@pytest.mark.parametrize("view", VIEWS, ids=ids)
def test_text_in_figures_is_readable(
    browser: Browser, pages: dict[str, Path], view: tuple[int, bool]
) -> None:
    """At least 9 pixels. Mutation: figures of half a page shrunk to a phone."""
    browser.open(pages["several"], width=view[0], dark=view[1])
    sizes = browser.run(
        "[...document.querySelectorAll('svg')].map(s => parseFloat(getComputedStyle("
        "s.querySelector('text')).fontSize) * s.getBoundingClientRect().width /"
        " s.viewBox.baseVal.width)"
    )
    assert len(sizes) == 4
    assert min(sizes) >= 9
    assert max(sizes) <= 18
    beside = browser.run(
        "[...document.querySelectorAll('svg text')].filter(t => {const s = t.closest('svg')"
        ".getBoundingClientRect(), r = t.getBoundingClientRect(); return r.width &&"
        " (r.left < s.left - 1 || r.right > s.right + 1)}).map(t => t.textContent)"
    )
    assert beside == []


def pixels(browser: Browser, width: int) -> Any:
    """The top of the page, where the figures are, as numbers 0 to 255."""
    height = 1100 if width > 600 else 1600
    return (255 * imread(io.BytesIO(browser.picture(width, height)))[..., :3]).astype("int16")


def share(image: Any, colour: str) -> float:
    wanted = [int(colour[i : i + 2], 16) for i in (1, 3, 5)]
    return float((abs(image - wanted).max(axis=-1) < 5).mean())


@pytest.mark.parametrize("width", [400, 1400])
def test_both_schemes_are_drawn(browser: Browser, pages: dict[str, Path], width: int) -> None:
    """Every candidate's line is there in the scheme's own colour, on the scheme's own ground.

    Mutation: no media query, or colours in the drawings that do not follow it.
    """
    bright = []
    for dark, theme in ((False, LIGHT), (True, DARK)):
        browser.open(pages["several"], width=width, dark=dark)
        image = pixels(browser, width)
        bright.append(float(image.mean()) / 255)
        assert share(image, theme.card) > 0.4
        assert all(share(image, colour) > 2e-5 for colour in theme.series[:5])
    assert bright[0] > 0.85
    assert bright[1] < 0.25


def test_nothing_is_fetched_and_nothing_runs(browser: Browser, pages: dict[str, Path]) -> None:
    """Mutation: a font or a script, inline ones too."""
    browser.open(pages["several"], width=1400, dark=False)
    assert browser.run("performance.getEntriesByType('resource').length") == 0
    assert browser.run("document.scripts.length") == 0
    document = pages["several"].read_text(encoding="utf-8")
    attacked = pages["several"].with_name("attacked.html")
    script = "<script>document.title = 'ran'</script>"
    attacked.write_text(document.replace("</main>", f"{script}</main>"), encoding="utf-8")
    browser.open(attacked, width=1400, dark=False)
    assert browser.run("document.title") == "sweep"
