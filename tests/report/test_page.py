"""The page: what it shows, what it leaves out, and that nothing in it can act."""

from __future__ import annotations

import re
from html import unescape
from html.parser import HTMLParser
from typing import Any

import pytest

from decal.markup import Markup, join, tag
from decal.report.advice import Advice
from decal.report.candidate import Candidate
from decal.report.html import MARK, page, section, table
from decal.report.page import Report, duration, render
from tests.report.made_up import HOSTILE, candidate, learned, report, sample, wide


class Outline(HTMLParser):
    """Elements, attributes and text of a document."""

    def __init__(self, document: str):
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.elements: set[str] = set()
        self.attributes: set[str] = set()
        self.texts: list[str] = []
        self.unbalanced: list[str] = []
        self.feed(document)
        self.close()

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.elements.add(tag)
        self.attributes |= {name for name, _ in attrs}
        if tag not in ("meta", "br", "hr"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: Any) -> None:
        self.elements.add(tag)
        self.attributes |= {name for name, _ in attrs}

    def handle_endtag(self, tag: str) -> None:
        if not self.open or self.open.pop() != tag:
            self.unbalanced.append(tag)

    def handle_data(self, data: str) -> None:
        self.texts.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.texts).split())


def test_children_are_escaped_unless_they_are_markup() -> None:
    """Mutation: escape nothing, or escape markup once more."""
    made = tag("p", HOSTILE, tag("b", "<i>"), title=HOSTILE, data_x=None)
    assert "<script" not in made
    assert "<img" not in made
    assert "<b>&lt;i&gt;</b>" in made
    outline = Outline(made)
    assert outline.elements == {"p", "b"}
    assert outline.attributes == {"title"}
    assert "$x^2$ \\x202e\\x1b[31m" in outline.text
    assert isinstance(made, Markup)
    assert join(("<", None, 3, Markup("<br>"))) == "&lt;3<br>"


def test_hostile_names_prompts_and_answers_stay_text() -> None:
    """Everything that comes from files, at once. Mutation: make Markup of any of it."""
    first = candidate(
        4,
        name=HOSTILE,
        faults=[HOSTILE],
        about={"decal": HOSTILE},
        status="stopped",
        why=HOSTILE,
        settings=dict.fromkeys(candidate(4).settings, HOSTILE) | {"adapter.r": 4, HOSTILE: 1},
        planned={"peak_bytes": 10, "parts": {HOSTILE: 3}},
        learned={
            **learned(4),
            "beside": [{"name": HOSTILE, "norm": 1.0}],
            "base": HOSTILE,
            "modules": [{**m, "kind": m["kind"] + HOSTILE} for m in learned(4)["modules"]],
        },
    )
    samples = [sample(HOSTILE, "base", HOSTILE, output=HOSTILE)]
    for several in ([first], [first, candidate(8)]):
        document = render(report(several, title=HOSTILE, samples=samples, notes=[HOSTILE]))
        outline = Outline(document)
        assert not outline.unbalanced
        assert not outline.open
        assert not outline.elements & {"script", "img", "iframe", "link", "object", "a", "base"}
        assert not [name for name in outline.attributes if name.startswith("on")]
        assert outline.text.count("alert(1)") > 5


def test_the_page_loads_nothing() -> None:
    """Mutation: a font, a style sheet or a picture from elsewhere; or no policy."""
    document = render(report([candidate(4), candidate(8)]))
    assert "default-src 'none'" in unescape(document)
    addresses = set(re.findall(r"https?://[^\"'\s<]+", document))
    assert addresses <= {"http://www.w3.org/1999/xlink", "http://www.w3.org/2000/svg"}
    assert not re.findall(r"@import|url\((?!#)", document)
    assert document.startswith("<!doctype html>")
    assert MARK in document


def test_several_candidates() -> None:
    """Mutation: leave out a candidate, the recommendation's reason, or the marked row."""
    made = report([candidate(r) for r in (2, 4, 8, 16)], samples=[sample("Hi?", "base", "r4")])
    document = render(made)
    shown = Outline(document).text
    assert made.advice.names == ("r16",)
    assert made.advice.text in shown
    assert "go on doubling, to r=32" in shown
    assert "1 % of the best loss" in shown
    assert all(f"r{r} {r} {2 * r} all-linear {20000 * r:,}" in shown for r in (2, 4, 8, 16))
    assert document.count('<tr class="marked">') == 1
    assert 'class="answer right"' in document
    assert document.count("<svg") == 4
    assert document.count("<details") == 4


def test_a_single_run() -> None:
    """No recommendation, settings and hints. Mutation: compare one with itself."""
    made = report([candidate(8, learned=learned(8, relative=False))], title="tickets")
    shown = Outline(render(made)).text
    assert "Which one to take" not in shown
    assert "tickets owner/model · nf4 · lora · rows.jsonl" in shown
    assert "/home/somebody" not in shown
    assert "train.lr 0.0002" in shown
    assert "Norms stand alone, because base `x` is not on this disk" in shown


def test_planned_memory_is_shown_where_it_was_planned() -> None:
    """Mutation: take a missing plan for 0 bytes, or say nothing of 20 % more."""
    one = candidate(8, planned={"peak_bytes": 300_000_000, "parts": {"weights": 5_000_000}})
    shown = Outline(render(report([one]))).text
    assert "300.0 MB" in shown
    assert "428.0 MB (+43%)" in shown
    assert "took 43% more memory than planned" in shown
    assert "weights 5.0 MB" in shown
    without = Outline(render(report([candidate(8, planned=None)]))).text
    assert "planned" not in without
    unmeasured = candidate(8, result={"steps": 3})
    assert "planned" not in Outline(render(report([unmeasured]))).text


def test_an_unfinished_run_says_so() -> None:
    """Mutation: show what there is as if it had ended."""
    one = candidate(8, status="unfinished", result={}, steps=150, learned=None, trainable=None)
    one = Candidate(**{**one.__dict__, "rows": one.rows[:33], "steps": 150})
    shown = Outline(render(report([one]))).text
    assert "r8 has not ended: it is at step 30 of 150" in shown
    both = Outline(render(report([one, candidate(4), candidate(16)]))).text
    assert "2 of 3 candidates ended" in both
    assert "r8 has not ended and is left out" in both


def test_a_run_of_nothing_has_a_page() -> None:
    """Killed before its first step. Mutation: the minimum of nothing."""
    document = render(report([Candidate(name="a", status="unfinished")]))
    assert "has not ended" in Outline(document).text
    waiting = [Candidate(name="a", status="waiting"), Candidate(name="b", status="waiting")]
    assert "a is waiting" in Outline(render(report(waiting))).text


def test_a_full_fine_tuning_has_no_rank() -> None:
    settings = {"adapter.method": "full", "adapter.r": None, "base.path": "b"}
    one = candidate(8, name="full", settings=settings, learned=None)
    shown = Outline(render(report([one, candidate(4)]))).text
    assert "full – – –" in shown


def test_what_could_not_be_read_is_said() -> None:
    shown = Outline(render(report([candidate(4, faults=["its adapter cannot be read: x"])]))).text
    assert "r4: its adapter cannot be read: x" in shown


def test_long_samples_are_cut_and_say_so() -> None:
    made = report([candidate(4)], samples=[sample("x" * 5000, "base")])
    assert "(2,000 more characters)" in Outline(render(made)).text


def test_all_at_once_is_well_formed() -> None:
    outline = Outline(render(wide()))
    assert not outline.unbalanced
    assert not outline.open


def test_sections_without_content_are_left_out() -> None:
    assert section("Empty", None, Markup("")) == ""
    assert "<h2>Full</h2>" in section("Full", tag("p", "x"))


def test_tables_align_numbers() -> None:
    made = table(("", "n"), [("a", "1"), ("b", "2")], marked=[1])
    assert made.count('class="n"') == 3
    assert '<tr class="marked"><th scope="row">b' in made


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0 s"), (59.4, "59 s"), (61, "1:01 min"), (7500, "2:05 h")]
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_colours_are_variables_in_both_schemes() -> None:
    """Mutation: a placeholder that is not replaced, or a variable that nobody declares."""
    document = render(report([candidate(r) for r in (2, 4, 8)]))
    assert not re.findall(r"#0102[0-9a-f]{2}|#01010[1-5]", document)
    used = set(re.findall(r"var\((--\w[\w-]*)\)", document))
    declared = set(re.findall(r"(--\w[\w-]*):", document))
    assert used <= declared
    light, dark = document.split("@media (prefers-color-scheme:dark)")[:2]
    for name in ("--ink", "--card", "--c0", "--c7"):
        values = [re.findall(rf"{name}:(#\w+)", part)[0] for part in (light, dark)]
        assert values[0] != values[1]


def test_an_advice_without_names_is_only_said() -> None:
    made = Report(
        title="x",
        candidates=[candidate(4), candidate(8)],
        advice=Advice(text="No recommendation: other rows."),
        hints={},
    )
    document = render(made)
    assert "No recommendation: other rows." in document
    assert 'class="advice"' not in document
    assert "marked" not in document.partition("</style>")[2]


def test_titles_are_escaped() -> None:
    assert "<title>&lt;x&gt;</title>" in page("<x>", "")
