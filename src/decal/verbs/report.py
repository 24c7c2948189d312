"""`decal report`: what one run or several came to, as one HTML page and a few pictures.

Everything is read from the folders: metrics, info, settings, and the adapters' factors. A model is
loaded only where samples are asked for.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from decal.errors import OutputError
from decal.report.advice import Advice, recommend, scores, shown
from decal.report.candidate import Candidate
from decal.report.figures import losses_figure, quality_figure, spectrum_figure
from decal.report.hints import hints
from decal.report.html import MARK
from decal.report.page import Report, render
from decal.report.plots import as_png, loss_png
from decal.store.files import write_bytes, write_text, writing
from decal.verbs.candidates import Found, candidates
from decal.verbs.compare import Observe
from decal.verbs.samples import make_samples, read_samples
from decal.verbs.spectrum import BaseNorms

NAME = "report.html"
_HEAD = 4096
"""Bytes in which a report says that it is one."""


def report(
    folders: str | Path | Sequence[str | Path],
    out: str | Path | None = None,
    *,
    samples: int = 0,
    force: bool = False,
    observe: Observe | None = None,
) -> Path:
    """Writes the report of run folders, or of a sweep folder, and pictures beside it.

    Args:
        folders: run folders, sweep folders, or one of them. A run may be unfinished.
        out: the HTML file; left out, report.html in the one folder, or in the working directory
            where there are several. An earlier report is replaced.
        samples: answer so many evaluation rows with the base and each candidate first; this loads
            the model, and leaves samples.json for later reports.
        force: replace `out` although it is no report.
        observe: called with what is worked on, steps done and steps in total.

    Returns:
        The path of the HTML file.

    Raises:
        DecalError: a folder that holds no run.
        OutputError: `out` is there and is no report, or a run's files are damaged.
        StorageError: damaged metrics, or the disk refused.
    """
    return write_report(*gather(folders, out, samples=samples, force=force, observe=observe))


def gather(
    folders: str | Path | Sequence[str | Path],
    out: str | Path | None = None,
    *,
    samples: int = 0,
    force: bool = False,
    observe: Observe | None = None,
) -> tuple[Report, Path]:
    """What a report shows, and where it goes; arguments and errors are those of `report`."""
    paths = [folders] if isinstance(folders, str | Path) else list(folders)
    place = Path(out) if out is not None else _default(paths)
    refuse_other(place, force)
    found = candidates(paths, BaseNorms(observe))
    if samples:
        make_samples(found, samples, observe)
    ordered = _ordered(found.candidates)
    several = len(ordered) > 1
    tried = [one.r for one in ordered if one.r is not None]
    advice = recommend(scores(ordered), tried) if several else Advice(text="")
    return (
        Report(
            title=_title(paths, found),
            candidates=ordered,
            advice=advice,
            hints={one.name: hints(one) for one in ordered},
            samples=read_samples(found),
            grid=found.grid,
        ),
        place,
    )


def write_report(report: Report, out: Path) -> Path:
    """Writes page and pictures; the page last, so that it never names what is not there."""
    with writing(out.parent):
        out.parent.mkdir(parents=True, exist_ok=True)
    for name, draw in _pictures(report).items():
        picture = _beside(out, name)
        # A run draws its own curve when it ends.
        if (
            name != "loss.png"
            or report.several
            or not (report.candidates[0].finished and picture.exists())
        ):
            write_bytes(picture, draw())
    write_text(out, render(report))
    return out


def facts(report: Report, out: Path) -> dict[str, Any]:
    """The report in plain JSON."""
    return {
        "report": str(out),
        "candidates": [_facts(one) for one in report.candidates],
        "advice": shown(report.advice) if report.several else None,
        "hints": {
            name: [{"kind": h.kind, "seen": h.seen, "advice": h.advice} for h in found]
            for name, found in report.hints.items()
            if found
        },
        "samples": len(report.samples),
    }


def refuse_other(out: Path, force: bool) -> None:
    """Raises OutputError unless `out` is free or an earlier report, or `force` is set."""
    if out.is_dir():
        raise OutputError(f"`{out}` is a folder", hint=f"name a file: -o {out / NAME}")
    if force or not out.exists():
        return
    with writing(out), out.open("rb") as file:
        head = file.read(_HEAD)
    if MARK.encode() not in head:
        raise OutputError(
            f"`{out}` exists and is no report of decal's",
            hint="name another file with -o, or replace it with --force",
        )


def _default(paths: Sequence[str | Path]) -> Path:
    return Path(paths[0]).expanduser() / NAME if len(paths) == 1 else Path(NAME)


def _beside(out: Path, name: str) -> Path:
    """Pictures in a run's or sweep's own folder have plain names, elsewhere the page's before."""
    own = (out.parent / "run.yaml").exists() or (out.parent / "sweep.json").exists()
    return out.with_name(name if own and out.name == NAME else f"{out.stem}-{name}")


def _title(paths: Sequence[str | Path], found: Found) -> str:
    if len(paths) == 1:
        return Path(paths[0]).expanduser().resolve().name
    return f"{len(found.candidates)} runs"


def _ordered(found: Sequence[Candidate]) -> list[Candidate]:
    """By rank where all have one, then by size, so that colours and rows rise with it."""
    ranked = all(one.r is not None for one in found)
    return sorted(found, key=lambda one: (one.r if ranked else 0, one.trainable or math.inf))


def _pictures(report: Report) -> dict[str, Callable[[], bytes]]:
    """Name -> what draws the PNG."""
    found: dict[str, Callable[[], bytes]] = {}
    first, bold = report.candidates[0], report.advice.names
    if report.several:
        figures = {
            "loss.png": losses_figure(report.candidates, names=bold)
            or losses_figure(report.candidates, "loss", names=bold),
            "quality.png": quality_figure(report.candidates, report.advice),
        }
        found |= {name: partial(as_png, figure) for name, figure in figures.items() if figure}
    elif first.rows:
        found["loss.png"] = partial(loss_png, first.rows, report.title)
    shown = [
        one for one in report.candidates if one.learned and (not report.several or one.name in bold)
    ]
    if shown:
        figure = spectrum_figure(shown[-1].learned or {}, title=shown[-1].name)
        found["spectrum.png"] = partial(as_png, figure)
    return found


def _facts(one: Candidate) -> dict[str, Any]:
    return {
        "name": one.name,
        "status": one.status,
        "why": one.why,
        "r": one.r,
        "trainable_params": one.trainable,
        "total_params": one.total,
        "adapter_bytes": one.nbytes,
        "best_step": one.best and one.best[0],
        "best_eval_loss": one.best and one.best[1],
        "result": dict(one.result),
        "planned": one.planned and dict(one.planned),
        "rank_for_99": one.learned and one.learned["rank"],
        "rank_for_99_everywhere": one.learned and one.learned["rank_everywhere"],
    }
