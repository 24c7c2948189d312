"""HTML whose texts are escaped unless they are markup: for pages, and for objects in notebooks.

`tag` escapes every child and every attribute that is not `Markup`, so a prompt, an answer or a name
from a file cannot become an element, and forgetting to escape is not possible. That is why there is
no template engine: Jinja2 is installed with torch, but as somebody else's dependency, it escapes
when it is told to, and a page of tables and figures has little text around its holes.

An object shows itself in Jupyter by a method `_repr_html_` that returns what `facts` or `grid`
makes of it: a small table without a style sheet, which takes the notebook's colours.

Knows no pages and no objects.
"""

from __future__ import annotations

import html
import unicodedata
from collections.abc import Iterable, Mapping, Sequence

__all__ = ["Child", "Markup", "facts", "grid", "join", "tag", "text"]

_VOID = {"br", "meta", "hr"}
_LEFT, _RIGHT = "text-align:left", "text-align:right"


class Markup(str):
    """HTML that stands as it is; any other text is escaped."""

    __slots__ = ()


Child = str | Markup | int | None
"""What may stand in an element; None leaves nothing there."""


def text(value: object) -> Markup:
    """Escaped; control characters become visible, because they may reorder or hide a line."""
    shown = "".join(c if _shows(c) else f"\\x{ord(c):02x}" for c in str(value))
    return Markup(html.escape(shown, quote=True))


def _shows(char: str) -> bool:
    """Printable, or a space of any width: French has a narrow one before each colon."""
    return char.isprintable() or char in "\n\t" or unicodedata.category(char) == "Zs"


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


def facts(values: Mapping[str, Child] | Sequence[tuple[str, Child]], title: str = "") -> Markup:
    """Names and values below each other, for a notebook."""
    pairs = values.items() if isinstance(values, Mapping) else values
    rows = (
        tag("tr", tag("th", name, style=_LEFT), tag("td", value, style=_LEFT))
        for name, value in pairs
    )
    return join((_title(title), tag("table", *rows)))


def grid(header: Sequence[Child], rows: Sequence[Sequence[Child]], title: str = "") -> Markup:
    """A table for a notebook; all but the first column are aligned to the right."""
    head = tag("tr", *(tag("th", c, style=_RIGHT if i else _LEFT) for i, c in enumerate(header)))
    body = (
        tag("tr", *(tag("td", c, style=_RIGHT if i else _LEFT) for i, c in enumerate(row)))
        for row in rows
    )
    return join((_title(title), tag("table", tag("thead", head), tag("tbody", *body))))


def _title(title: str) -> Markup | None:
    return tag("div", tag("b", title)) if title else None
