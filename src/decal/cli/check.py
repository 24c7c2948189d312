"""decal check: what is wrong with a run, before any real time is spent on it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from decal.cli import console

if TYPE_CHECKING:
    from decal.verbs.check import Check, ShownSample

STYLES = {"ok": "green", "note": "cyan", "warning": "bold yellow", "problem": "bold red"}
INDENT, MARGIN = 11, 80
"""Where a finding's text begins, and where a terminal may end."""
CONTEXT = 400
"""Characters of a sample's untrained text that are shown on either side of what is left out."""


def check(
    run: Annotated[Path, typer.Argument(metavar="RUN.yaml", help="The settings of the run.")],
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Replace one setting: train.lr=1e-4"),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="JSON for programs.")] = False,
) -> None:
    """\b
    decal check run.yaml --set data.max_length=1024

    Looks at rows, targets, tokenizer and weights, and lets the model learn eight rows by heart.
    Takes a minute at most after loading, and writes nothing. Exit code 0: ready, 1: not ready.
    """
    from decal.runfile import load_run

    config = load_run(run, overrides or [])

    from decal.cli.waiting import Waiting
    from decal.verbs.check import check as check_run

    with Waiting(console.log()) as progress:
        found = check_run(config, observe=progress.observe)
    if as_json:
        console.show_json(found.as_dict())
    else:
        _show(found)
    if not found.ready:
        raise typer.Exit(1)


def _show(found: Check) -> None:
    from rich.text import Text

    from decal.report.tables import marked

    out = console.out()
    colour = out.is_terminal and not out.no_color
    area = ""
    for finding in found.findings:
        if finding.area != area:
            area = finding.area
            _print(Text(area, style="bold"))
        _entry(finding.level, finding.text, STYLES[finding.level])
        narrow = all(len(detail) <= MARGIN - INDENT for detail in finding.details)
        for detail in finding.details:
            _print(" " * (INDENT if narrow else 4) + detail)
        if finding.hint and finding.level != "ok":
            _entry("", f"hint: {finding.hint}", "")
    for sample in found.samples:
        how = "green" if colour else "[[brackets]]"
        what = f"class {sample.label}" if sample.label else f"what is trained in {how}"
        _print(Text(f"row {sample.row:,}, {what}", style="bold"))
        _print(marked(_shortened(sample), colour=colour))
    _verdict(found)


def _verdict(found: Check) -> None:
    from rich.text import Text

    counts = {
        level: sum(finding.level == level for finding in found.findings)
        for level in ("problem", "warning")
    }
    said = " and ".join(f"{n} {level}{'s' * (n > 1)}" for level, n in counts.items() if n)
    verdict = Text("ready", "bold green") if found.ready else Text("not ready", "bold red")
    _print(verdict + Text(f": {said or 'nothing to complain about'} ({found.seconds:.0f} s)"))


def _print(what: Any) -> None:
    console.out().print(what, markup=False, soft_wrap=True)


def _entry(label: str, text: str, style: str) -> None:
    """A label and its text, on a terminal broken between words below its first."""
    from rich.padding import Padding
    from rich.table import Table
    from rich.text import Text

    out = console.out()
    if not out.is_terminal:
        _print(f"  {label:<7}  {text}")
        return
    grid = Table.grid(padding=(0, 2, 0, 0))
    grid.add_column(width=7)
    grid.add_column()
    grid.add_row(Text(label, style), Text(text))
    out.print(Padding(grid, (0, 0, 0, 2)))


def _shortened(sample: ShownSample) -> list[tuple[str, bool]]:
    """Long stretches lose their middle: what matters is where the training begins and ends."""
    return [
        (
            text
            if len(text) <= 2 * CONTEXT
            else f"{text[:CONTEXT]} … {len(text) - 2 * CONTEXT:,} characters … {text[-CONTEXT:]}",
            trained,
        )
        for text, trained in sample.pieces
    ]
