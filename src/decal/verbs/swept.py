"""What a sweep came to: its candidates, and how they show themselves. Trains nothing."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from decal.errors import OutputError
from decal.markup import grid, join, tag
from decal.report.figures import quality_figure
from decal.verbs.report import NAME as REPORT
from decal.verbs.report import gather


@dataclass(frozen=True, kw_only=True)
class Tried:
    """What became of one candidate."""

    name: str
    settings: dict[str, Any]
    """Its own, by dotted key."""
    status: str
    """done | stopped | failed"""
    why: str | None
    run: Path
    result: dict[str, Any]
    """As in the run's info.json; empty for one that failed."""


@dataclass(frozen=True, kw_only=True)
class SweepResult:
    """A finished sweep."""

    sweep: Path
    tried: tuple[Tried, ...]
    verdict: str | None
    """Of `until_plateau`: where doubling ended, and why."""
    advice: str
    """What the report recommends, in a sentence; empty where there is nothing to compare."""

    @property
    def failed(self) -> list[Tried]:
        """Candidates that ended with an error."""
        return [each for each in self.tried if each.status == "failed"]

    def rows(self) -> list[dict[str, Any]]:
        """A row for each candidate, for printing; columns that are empty are left out."""
        rows = [
            {
                "candidate": each.name,
                "status": each.status,
                "parameters": each.result.get("trainable_params"),
                "best eval loss": each.result.get("best_eval_loss"),
                "final loss": each.result.get("loss"),
                "accuracy": each.result.get("eval_accuracy"),
                "steps": each.result.get("steps"),
            }
            for each in self.tried
        ]
        filled = {key for row in rows for key, value in row.items() if value is not None}
        return [{key: row[key] for key in row if key in filled} for row in rows]

    def lines(self) -> list[str]:
        """What there is to say beyond the rows."""
        found = [f"{each.name}: {each.why}" for each in self.tried if each.why]
        if self.verdict is not None:
            found.append(self.verdict)
        if self.advice:
            found.append(self.advice)
        report = self.sweep / REPORT
        return [*found, f"report  {report}"] if report.exists() else found

    def to_dict(self) -> dict[str, Any]:
        """All of it, for programs."""
        tried = [{**vars(each), "run": str(each.run)} for each in self.tried]
        return {
            "sweep": str(self.sweep),
            "candidates": tried,
            "verdict": self.verdict,
            "advice": self.advice,
        }

    def plot(self) -> Figure:
        """Best evaluation loss against trainable parameters, as a matplotlib figure."""
        page, _ = gather(self.sweep)
        found = quality_figure(page.candidates, page.advice)
        if found is None:
            raise OutputError(f"no candidate of `{self.sweep}` came to an evaluation")
        return found

    def _repr_html_(self) -> str:
        """The sweep in a notebook: a row for each candidate, and what to take."""
        rows = self.rows()
        cells = [[_cell(value) for value in row.values()] for row in rows]
        said = [tag("div", line) for line in self.lines()]
        return join((grid(list(rows[0]), cells), *said))


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return "" if value is None else f"{value:,}" if isinstance(value, int) else str(value)
