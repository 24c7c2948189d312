"""A figure as SVG inside a page, in the page's own colours and fonts.

The figure is drawn with placeholders, one colour for each role, and these become CSS variables: so
one drawing follows the reader's colour scheme, and text stays text. What would act on the rest of
the page is taken out: matplotlib's style sheet, ids of groups, its metadata. All names in a figure
pass through matplotlib's own XML escaping.
"""

from __future__ import annotations

import hashlib
import io
import re

import matplotlib
from matplotlib.figure import Figure

from decal.markup import text as text_of
from decal.report.figures import LIGHT, Theme

_ROLES = {"ink": "#010101", "muted": "#010102", "grid": "#010103", "card": "#010104",
          "mark": "#010105"}  # fmt: skip
_SERIES = tuple(f"#0102{i:02x}" for i in range(len(LIGHT.series)))
PLACEHOLDERS = Theme(**_ROLES, series=_SERIES)
"""Colours that are no one's; `inline` puts variables in their places."""
_VARIABLES = {**{colour: f"var(--{role})" for role, colour in _ROLES.items()},
              **{colour: f"var(--c{i})" for i, colour in enumerate(_SERIES)}}  # fmt: skip


def variables(theme: Theme) -> dict[str, str]:
    """CSS variable -> colour."""
    roles = {f"--{role}": getattr(theme, role) for role in _ROLES}
    return {**roles, **{f"--c{i}": colour for i, colour in enumerate(theme.series)}}


def inline(figure: Figure, label: str) -> str:
    """The `<svg>` element of a figure drawn with `PLACEHOLDERS`; `label` names it to readers."""
    out = io.StringIO()
    salt = hashlib.sha256(label.encode()).hexdigest()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": salt}):
        figure.savefig(out, format="svg", metadata={"Date": None}, transparent=True)
    text = out.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r"<style[^>]*>.*?</style>", "", text, flags=re.DOTALL)
    text = re.sub(r"<!--.*?-->", "", text, flags=re.DOTALL)
    text = re.sub(r'<g id="[^"]*"', "<g", text)
    text = re.sub(r"font: ([^;\"]*?[\d.]+px) [^;\"]*", r"font: \1 var(--font)", text)
    text = re.sub(r"font-family: [^;\"]*;? ?", "", text)
    text = re.sub(r' transform="rotate\(-0 [^"]*"', "", text)
    for colour, variable in _VARIABLES.items():
        text = text.replace(colour, variable)
    size = re.search(r'viewBox="[^"]*"', text)
    assert size is not None
    named = text_of(label)
    head = f'<svg {size[0]} role="img" aria-label="{named}" xmlns:xlink="http://www.w3.org/1999/xlink">'
    body = text[text.index(">") + 1 :]
    return head + re.sub(r"\n\s*", "\n", body)
