"""Small tables for the terminal. Knows nothing of what is in them."""

from __future__ import annotations

from collections.abc import Sequence
from math import isfinite

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text


def table(
    header: Sequence[str], rows: Sequence[Sequence[str]], *, wrap: int | None = None
) -> Table:
    """Columns of text; all but the first are right-aligned unless they wrap.

    Args:
        wrap: widest a cell may get before it breaks into lines; None never breaks.
    """
    drawn = Table(box=SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for i, name in enumerate(header):
        right = i > 0 and wrap is None
        drawn.add_column(
            name, justify="right" if right else "left", max_width=wrap, no_wrap=wrap is None
        )
    for row in rows:
        drawn.add_row(*(Text(cell) for cell in row))
    return drawn


def marked(pieces: Sequence[tuple[str, bool]], *, colour: bool) -> Text:
    """A sample's text with what is trained in bold green, or in brackets without colour."""
    text = Text()
    for piece, trained in pieces:
        if not trained:
            text.append(piece)
        elif colour:
            text.append(piece, style="bold green")
        else:
            text.append(f"[[{piece}]]")
    return text


BLOCKS = "▁▂▃▄▅▆▇█"


def curve(values: Sequence[float], width: int = 60) -> str:
    """Values as one line of blocks, from 0 to the largest; at most `width` of them, evenly spaced.

    What is not a number or not finite is a `?`.
    """
    if len(values) > width:
        step = (len(values) - 1) / (width - 1)
        values = [values[round(i * step)] for i in range(width)]
    top = max((v for v in values if isfinite(v)), default=0.0) or 1.0
    return "".join(BLOCKS[round(max(v, 0) / top * 7)] if isfinite(v) else "?" for v in values)


def size(count: int | None) -> str:
    """Bytes as people read them: 7.3 MB (10**6 bytes)."""
    if count is None:
        return "unknown"
    value = float(count)
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if value < 1000 or unit == "TB":
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1000
    raise AssertionError
