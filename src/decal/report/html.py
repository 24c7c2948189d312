"""Pages of HTML: elements whose texts are escaped unless they say that they are markup.

`tag` escapes every child and every attribute that is not `Markup`, so a prompt, an answer or a name
from a file cannot become an element, and forgetting to escape is not possible. That is why there is
no template engine: Jinja2 is installed with torch, but as somebody else's dependency, it escapes
when it is told to, and a page of tables and figures has little text around its holes.

The page loads nothing and runs nothing; its own policy (Content-Security-Policy) forbids both, for
the case that all else fails.
"""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence

from decal.report.figures import LIGHT, Theme
from decal.report.style import CSS, DARK
from decal.report.svg import variables

MARK = '<meta name="generator" content="decal report">'
"""By which a file is known as a report that may be replaced."""
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
_VOID = {"br", "meta", "hr"}


class Markup(str):
    """HTML that stands as it is; any other text is escaped."""

    __slots__ = ()


Child = str | Markup | int | None


def text(value: object) -> Markup:
    """Escaped; control characters become visible, because they may reorder or hide a line."""
    shown = "".join(c if c.isprintable() or c in "\n\t" else f"\\x{ord(c):02x}" for c in str(value))
    return Markup(html.escape(shown, quote=True))


def tag(element: str, /, *children: Child, **attributes: str | None) -> Markup:
    """One element; `class_` is `class`, `_` in other names is `-`, None leaves it out."""
    given = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{text(value)}"'
        for key, value in attributes.items()
        if value is not None
    )
    if element in _VOID:
        return Markup(f"<{element}{given}>")
    return Markup(f"<{element}{given}>{join(children)}</{element}>")


def join(children: Iterable[Child]) -> Markup:
    """Children one after the other."""
    known = [child for child in children if child is not None]
    return Markup("".join(c if isinstance(c, Markup) else text(c) for c in known))


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
