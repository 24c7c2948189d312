"""Memory as a report shows it: planned beside measured. Knows candidates as plain values.

Runs of a sweep that trained side by side share one process, whose peak is no single one's: they
have one planned and one measured peak together, and each what it is planned to take alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from decal.markup import Child, Markup, join, tag
from decal.report.candidate import Candidate
from decal.report.html import section, table
from decal.report.tables import size

OVER = 0.2
"""Measured over planned, as a share, from which a report says so."""


def peak(one: Candidate) -> str | None:
    """What a run took; None where others trained in the same process."""
    measured = one.number("peak_memory_bytes")
    return None if measured is None or one.together > 1 else size(round(measured))


def alone(one: Candidate) -> str | None:
    """What a run that trained beside others is planned to take alone."""
    planned = _planned(one, "alone_bytes")
    return None if planned is None or one.together < 2 else size(round(planned))


def section_of(candidates: Sequence[Candidate], several: bool) -> Markup:
    """Planned beside measured; runs that have not both are left out."""
    pairs: dict[tuple[str, float, float], None] = {}
    bars: list[tuple[str, float]] = []
    for one in candidates:
        planned, measured = _planned(one, "peak_bytes"), one.number("peak_memory_bytes")
        if planned is None or measured is None:
            continue
        count, own = one.together, _planned(one, "alone_bytes")
        if count > 1:
            pairs[(f"{count} together,", planned, measured)] = None
            bars += [(f"{one.name} alone, planned", own)] if own else []
        else:
            pairs[(one.name if several else "", planned, measured)] = None
    if not pairs:
        return join(())
    top = max([*(max(p, m) for _, p, m in pairs), *(own for _, own in bars)])
    rows: list[Child] = []
    notes = []
    for name, planned, measured in pairs:
        off = measured / planned - 1
        rows += [
            tag("span", f"{name} planned".strip(), class_="name"),
            _bar(planned / top, size(round(planned)), None),
            tag("span", f"{name} measured".strip(), class_="name"),
            _bar(measured / top, f"{size(round(measured))} ({off:+.0%})", "m"),
        ]
        if off > OVER:
            who = name.rstrip(",") or "the run"
            notes.append(f"{who} took {off:.0%} more memory than planned.")
    for name, own in bars:
        rows += [tag("span", name, class_="name"), _bar(own / top, size(round(own)), None)]
    return section(
        "Memory, planned and measured",
        tag("div", *rows, class_="bars"),
        *(tag("p", note, class_="note") for note in notes),
        None if several else _parts(candidates[0]),
    )


def _planned(one: Candidate, name: str) -> float | None:
    value = (one.planned or {}).get(name)
    return float(value) if isinstance(value, int | float) and value > 0 else None


def _bar(share: float, label: str, kind: str | None) -> Markup:
    width = tag("i", class_=kind, style=f"width:calc((100% - 10em)*{share:.4f})")
    return tag("div", width, tag("span", label), class_="bar")


def _parts(one: Candidate) -> Markup | None:
    parts = (one.planned or {}).get("parts")
    if not isinstance(parts, Mapping) or not parts:
        return None
    rows = [(str(name), size(v)) for name, v in parts.items() if isinstance(v, int)]
    return join((tag("h3", "The plan's parts"), table(("", "bytes"), rows)))
