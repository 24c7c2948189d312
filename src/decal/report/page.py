"""The report's page: what is shown of runs, in which order, and in which words.

What runs did not leave is left out, with its section; nothing is guessed. Knows no folders.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import PurePath
from typing import Any

from decal.markup import Markup, join, tag
from decal.report import memory
from decal.report.advice import Advice
from decal.report.candidate import Candidate, differing
from decal.report.figures import kept_figure, losses_figure, quality_figure, run_figure
from decal.report.heat import heat_maps, spectra_table
from decal.report.hints import Hint
from decal.report.html import page, section, table
from decal.report.spectra import percent
from decal.report.svg import PLACEHOLDERS, inline
from decal.report.tables import size

LONGEST = 3000
"""Characters of a sample that are shown."""


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One prompt, and what each model made of it."""

    prompt: str
    expected: str | None
    outputs: Mapping[str, str]


@dataclass(frozen=True, kw_only=True)
class Report:
    """Everything that a page shows."""

    title: str
    candidates: Sequence[Candidate]
    advice: Advice
    hints: Mapping[str, Sequence[Hint]]
    """By candidate."""
    samples: Sequence[Sample] = ()
    notes: Sequence[str] = ()
    """What a reader should know first, in sentences."""
    grid: Mapping[str, Any] = field(default_factory=dict)

    @property
    def several(self) -> bool:
        return len(self.candidates) > 1


def render(report: Report) -> str:
    """The page as a document."""
    parts = [
        _head(report),
        _notes(report),
        _facts(report),
        _advice(report),
        _curves(report),
        _table(report),
        _samples(report),
        memory.section_of(report.candidates, report.several),
        _spectra(report),
        _foot(report),
    ]
    return page(report.title, join(parts))


def _dot(place: int) -> Markup:
    colour = place % len(PLACEHOLDERS.series)
    return tag("i", class_="dot", style=f"background:var(--c{colour})")


def _named(report: Report, one: Candidate) -> Markup:
    """A candidate's name with its colour."""
    if not report.several:
        return join((one.name,))
    return join((_dot(report.candidates.index(one)), one.name))


def may_be_id(text: str) -> bool:
    """Whether a text is a word or a hub id, and no path on a disk."""
    return re.fullmatch(r"[\w.-]+(/[\w.-]+)?", text) is not None and not text.startswith(".")


def _head(report: Report) -> Markup:
    first = report.candidates[0].settings
    same = set(differing(report.candidates))
    names = ("base.path", "quant.format", "adapter.method", "data.path", "objective")
    # A folder's place on the author's disk is nobody's business.
    shown = [
        str(first[n]) if may_be_id(str(first[n])) else PurePath(str(first[n])).name
        for n in names
        if first.get(n) not in (None, "none") and n not in same
    ]
    for name, values in report.grid.items():
        tried = values if isinstance(values, list) else [values]
        shown.append(f"{name} = {', '.join(map(str, tried))}")
    return tag("header", tag("h1", report.title), tag("p", " · ".join(shown), class_="sub"))


def _notes(report: Report) -> Markup:
    lines = [*report.notes]
    for one in report.candidates:
        lines += [f"{one.name}: {fault}" for fault in one.faults]
        if one.status != "done":
            lines.append(_standing(one))
    return tag("section", *(tag("p", line) for line in lines), class_="warn") if lines else join(())


def _standing(one: Candidate) -> str:
    of = f" of {one.steps:,}" if one.steps else ""
    if one.status == "unfinished":
        return (
            f"{one.name} has not ended: it is at step {one.last_step:,}{of}. It is training still,"
            " or was stopped; decal train --resume goes on."
        )
    if one.status in ("stopped", "failed"):
        why = f": {one.why}" if one.why else "."
        ended = "failed" if one.status == "failed" else "was stopped"
        return f"{one.name} {ended} at step {one.last_step:,}{of}{why}"
    return f"{one.name} is {one.status}."


def _facts(report: Report) -> Markup:
    """The numbers that one looks for first."""
    found: list[tuple[str, str]] = []
    if report.several:
        scored = [(one.best[1], one.name) for one in report.candidates if one.best and one.finished]
        done = sum(one.finished for one in report.candidates)
        found.append((f"{done} of {len(report.candidates)}", "candidates ended"))
        if scored:
            low, name = min(scored)
            found.append((f"{low:.4g}", f"best evaluation loss ({name})"))
        if report.advice.names:
            found.append((", ".join(report.advice.names), "recommended"))
        seconds = [s for one in report.candidates if (s := one.seconds) is not None]
        found += [(duration(sum(seconds)), "training, all together")] if seconds else []
    else:
        one = report.candidates[0]
        if one.best:
            found.append((f"{one.best[1]:.4g}", f"best evaluation loss (step {one.best[0]:,})"))
        elif one.curve("loss")[1]:
            found.append((f"{one.curve('loss')[1][-1]:.4g}", "training loss of the last step"))
        cells = ((c.title, c.cell(one)) for c in COLUMNS if c.tile)
        found += [(value, title) for title, value in cells if value is not None]
    return tag("div", *(tag("div", tag("b", value), tag("span", name), class_="fact")
                        for value, name in found), class_="facts")  # fmt: skip


def _advice(report: Report) -> Markup:
    """The recommendation, beside the figure that it is read from."""
    if not report.several:
        return join(())
    advice, noise, out = report.advice, None, None
    if advice.noise is not None:
        noise = (
            f"Noise: {advice.noise:.2g}, {advice.source}. The green band counts as no worse than"
        )
        noise = tag("p", noise + " the best.", class_="note")
    left = [one.name for one in report.candidates if not one.finished]
    if left:
        many = "has not ended and is" if len(left) == 1 else "have not ended and are"
        out = tag("p", f"{', '.join(left)} {many} left out.", class_="note")
    figure = quality_figure(report.candidates, advice, theme=PLACEHOLDERS)
    said = tag(
        "div",
        tag("p", advice.text, class_="say"),
        advice.more and tag("p", advice.more),
        noise,
        out,
    )
    drawn = figure and _figure(f"{report.title}: best loss by trainable parameters", figure)
    body = tag("div", said, drawn, class_="figures") if drawn else said
    style = "advice" if advice.names else None
    return tag("section", tag("h2", "Which one to take"), body, class_=style)


def _curves(report: Report) -> Markup:
    if not report.several:
        return _curve(report)
    titles = {"eval_loss": "evaluation loss by step", "loss": "training loss by step"}
    bold = report.advice.names
    found = [
        _figure(f"{report.title}: {label}", figure)
        for name, label in titles.items()
        if (figure := losses_figure(report.candidates, name, names=bold, theme=PLACEHOLDERS))
    ]
    shown = tag("div", *found, class_="figures") if found else None
    return join((section("Loss", shown), _hints(report)))


def _curve(report: Report) -> Markup:
    """The curve of a single run, and beside it what it calls for."""
    figure = run_figure(report.candidates[0], theme=PLACEHOLDERS)
    if figure is None:
        return _hints(report)
    found = report.hints.get(report.candidates[0].name, ())
    beside = tag("div", tag("h3", "What to try"), _list(report)) if found else None
    drawn = _figure(f"{report.title}: training and evaluation loss by step", figure)
    return section("Loss", tag("div", drawn, beside, class_="figures"))


def _figure(label: str, figure: Any) -> Markup:
    return tag("figure", Markup(inline(figure, label)))


def _hints(report: Report) -> Markup:
    lead = "Rules of thumb, where a curve calls for one."
    return section("What to try", _list(report), lead=lead)


def _list(report: Report) -> Markup | None:
    """One entry for each piece of advice, under it the candidates that it is for."""
    entries: dict[str, list[Markup]] = {}
    for one in report.candidates:
        for hint in report.hints.get(one.name, ()):
            who = join((_named(report, one), ": ")) if report.several else None
            entries.setdefault(hint.advice, []).append(tag("p", who, hint.seen))
    rows = [tag("li", tag("b", advice), *seen) for advice, seen in entries.items()]
    return tag("ul", *rows, class_="hints") if rows else None


# --- the table --------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Column:
    title: str
    cell: Callable[[Candidate], str | None]
    tile: bool = False
    """Whether it is one of the numbers on top of a single run's page."""


def _setting(name: str) -> Callable[[Candidate], str | None]:
    def cell(one: Candidate) -> str | None:
        value = one.settings.get(name)
        if value is None or (one.method == "full" and name.startswith("adapter.")):
            return None
        shown = ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
        shown = f"{value:g}" if isinstance(value, float) else shown
        return shown if len(shown) <= 40 else shown[:39] + "…"

    return cell


def _share(one: Candidate) -> str | None:
    return percent(one.trainable / one.total) if one.trainable and one.total else None


def _number(name: str, shown: Callable[[float], str]) -> Callable[[Candidate], str | None]:
    def cell(one: Candidate) -> str | None:
        value = one.number(name)
        return None if value is None else shown(value)

    return cell


def duration(seconds: float) -> str:
    """`42 s`, `3:07 min`, `2:05 h`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    hours, rest = divmod(whole, 3600)
    return f"{hours}:{rest // 60:02} h" if hours else f"{rest // 60}:{rest % 60:02} min"


COLUMNS = (
    _Column("r", _setting("adapter.r")),
    _Column("lora_alpha", _setting("adapter.lora_alpha")),
    _Column("targets", _setting("adapter.target_modules")),
    _Column("trainable parameters", lambda one: f"{one.trainable:,}" if one.trainable else None,
            tile=True),
    _Column("of all parameters", _share),
    _Column("size on disk", lambda one: size(one.nbytes) if one.nbytes else None),
    _Column("peak memory", memory.peak, tile=True),
    _Column("memory alone, planned", memory.alone),
    _Column("time", lambda one: None if one.seconds is None else duration(one.seconds), tile=True),
    _Column("tokens/s", _number("tokens_per_second", lambda v: f"{v:,.0f}"), tile=True),
    _Column("steps", lambda one: f"{one.last_step:,}" if one.last_step else None),
    _Column("final train loss", _number("loss", lambda v: f"{v:.4g}")),
    _Column("final eval loss", _number("eval_loss", lambda v: f"{v:.4g}")),
    _Column("best eval loss", lambda one: f"{one.best[1]:.4g}" if one.best else None),
    _Column("eval accuracy", _number("eval_accuracy", percent), tile=True),
    _Column("eval macro F1", _number("eval_macro_f1", lambda v: f"{v:.3f}")),
)  # fmt: skip
_SHOWN = ("adapter.r", "adapter.lora_alpha", "adapter.target_modules")


def _table(report: Report) -> Markup:
    columns = [*COLUMNS]
    if report.several:
        more = [n for n in differing(report.candidates) if n not in _SHOWN]
        columns = [*columns[:3], *(_Column(name, _setting(name)) for name in more), *columns[3:]]
    cells = {c.title: [c.cell(one) for one in report.candidates] for c in columns}
    cells = {title: row for title, row in cells.items() if any(row)}
    if not report.several:
        rows = [(title, row[0]) for title, row in cells.items()]
        pairs = (
            tag("div", tag("dt", title), tag("dd", value))
            for title, value in (*rows, *_settings(report.candidates[0]))
        )
        return section("The run", tag("dl", *pairs))
    marked = [i for i, one in enumerate(report.candidates) if one.name in report.advice.names]
    rows_ = [
        (_named(report, one), *(row[i] or "–" for row in cells.values()))
        for i, one in enumerate(report.candidates)
    ]
    return section("All candidates", table(("", *cells), rows_, marked=marked))


def _settings(one: Candidate) -> list[tuple[str, str]]:
    """Settings of a single run that its numbers do not show already."""
    names = ("quant.format", "adapter.lora_dropout", "train.lr", "train.batch_size", "train.epochs",
             "train.max_steps", "train.schedule", "train.seed", "data.max_length")  # fmt: skip
    found = ((name, _setting(name)(one)) for name in names)
    return [(name, value) for name, value in found if value is not None]


# --- samples, memory, spectra -----------------------------------------------------------------


def _samples(report: Report) -> Markup:
    shown = [_sample(sample) for sample in report.samples]
    return section(
        "Sample outputs",
        *shown,
        lead="Evaluation rows, answered by the base and by each candidate, greedily."
        if shown else None,
    )  # fmt: skip


def _sample(sample: Sample) -> Markup:
    answers = [_answer(name, output, sample.expected) for name, output in sample.outputs.items()]
    if sample.expected is not None:
        answers.insert(0, _answer("expected", sample.expected, None))
    return tag(
        "div",
        tag("pre", _cut(sample.prompt), class_="prompt"),
        tag("div", *answers, class_="answers"),
        class_="sample",
    )


def _answer(name: str, output: str, expected: str | None) -> Markup:
    right = expected is not None and output.strip() == expected.strip()
    return tag(
        "div",
        tag("span", name),
        tag("pre", _cut(output) or "(nothing)"),
        class_="answer right" if right else "answer",
    )


def _cut(text: str) -> str:
    rest = len(text) - LONGEST
    return text if rest <= 0 else f"{text[:LONGEST]}… ({rest:,} more characters)"


def _spectra(report: Report) -> Markup:
    learned = {one.name: one.learned for one in report.candidates}
    known = {name: one for name, one in learned.items() if one}
    if not known:
        return join(())
    figure = kept_figure(learned, names=report.advice.names, theme=PLACEHOLDERS)
    drawn = _figure(f"{report.title}: energy by rank", figure) if figure else None
    lead = (
        "Singular values of (alpha/r) B A in each module. Energy is their squares: it says how much"
        " of the change of the weights a rank holds, not how much of the quality."
    )
    title = "What the adapter learned"
    if not report.several:
        return section(title, *(heat_maps(n, one, beside=drawn) for n, one in known.items()),
                       lead=lead)  # fmt: skip
    opened = set(report.advice.names) & set(known) or {list(known)[-1]}
    maps = [heat_maps(n, one, folded=True, opened=n in opened) for n, one in known.items()]
    top = tag("div", drawn, tag("div", spectra_table(known)), class_="figures")
    return section("What the adapters learned", top, *maps, lead=lead)


def _foot(report: Report) -> Markup:
    about = report.candidates[0].about
    names = ("decal", "torch", "transformers", "device", "threads")
    facts = [f"{name} {about[name]}" for name in names if about.get(name) is not None]
    return tag("footer", " · ".join([*facts, "drawn by decal report"]))
