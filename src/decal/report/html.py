"""The report's document: its head, its sections, tables that scroll in their boxes.

The page loads nothing and runs nothing; its own policy (Content-Security-Policy) forbids both, for
the case that all else fails. What escapes its texts is `decal.markup`.
"""

from __future__ import annotations

from collections.abc import Sequence

from decal.markup import Child, Markup, join, tag
from decal.report.figures import LIGHT, Theme
from decal.report.style import CSS, DARK
from decal.report.svg import variables

MARK = '<meta name="generator" content="decal report">'
"""By which a file is known as a report that may be replaced."""
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"


def table(header: Sequence[Child], rows: Sequence[Sequence[Child]], *, marked: Sequence[int] = (),
          numbers: bool = True) -> Markup:  # fmt: skip
    """A table in a box that scrolls; all but the first column are numbers, aligned to the right.

    Args:
        marked: rows that are set off.
    """
    right = "n" if numbers else None
    head = tag("tr", *(tag("th", cell, class_=right if i else None, scope="col")
                       for i, cell in enumerate(header)))  # fmt: skip
    body = [
        tag(
            "tr",
            tag("th", row[0], scope="row"),
            *(tag("td", cell, class_=right) for cell in row[1:]),
            class_="marked" if place in marked else None,
        )
        for place, row in enumerate(rows)
    ]
    return tag("div", tag("table", tag("thead", head), tag("tbody", *body)), class_="scroll",
               tabindex="0")  # fmt: skip


def section(title: str, *children: Child, lead: Child = None) -> Markup:
    """A part of the page under a heading; nothing where there are no children."""
    known = [child for child in children if child]
    if not known:
        return Markup("")
    return tag("section", tag("h2", title), lead and tag("p", lead, class_="lead"), *known)


def page(title: str, body: Child) -> str:
    """A whole document in both colour schemes."""
    dark = f"@media (prefers-color-scheme:dark){{:root{{{_declared(DARK)}}}}}"
    style = f":root{{{_declared(LIGHT)}}}\n{dark}"
    head = join(
        (
            tag("meta", charset="utf-8"),
            tag("meta", http_equiv="Content-Security-Policy", content=_POLICY),
            tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
            tag("meta", name="color-scheme", content="light dark"),
            Markup(MARK),
            tag("title", title),
            Markup(f"<style>{style}\n{CSS}</style>"),
        )
    )
    document = tag("html", tag("head", head), tag("body", tag("main", body)), lang="en")
    return f"<!doctype html>\n{document}\n"


def _declared(theme: Theme) -> str:
    return ";".join(f"{name}:{colour}" for name, colour in variables(theme).items())
