"""A run as the report sees it: plain values, whether it ended, was stopped, or was killed.

What a run did not leave is None, and is left out wherever it would be shown. Knows no folders.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from decal.report.plots import Points, points

Row = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """One run beside others."""

    name: str
    status: str = "done"
    """done | stopped (by a sweep, because others were better) | failed | unfinished | waiting"""
    why: str | None = None
    """Of `status`, in a sentence."""
    rows: Sequence[Row] = ()
    """Of metrics.jsonl."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Dotted names of run.yaml, every one; empty where it cannot be read."""
    steps: int | None = None
    """Optimizer steps that were meant."""
    result: Mapping[str, Any] = field(default_factory=dict)
    """Of info.json; empty until the run has ended."""
    planned: Mapping[str, Any] | None = None
    """`peak_bytes` and `parts` of info.json."""
    trainable: int | None = None
    total: int | None = None
    """Parameters of the model."""
    nbytes: int | None = None
    """Of what was trained, as files."""
    learned: Mapping[str, Any] | None = None
    """What `decal.verbs.spectrum` returns."""
    data: str | None = None
    """Digest of the rows, those of evaluation included."""
    base: str | None = None
    """Fingerprint of the base."""
    about: Mapping[str, Any] = field(default_factory=dict)
    """Versions and the machine."""
    faults: Sequence[str] = ()
    """What could not be read, in sentences."""

    @property
    def finished(self) -> bool:
        return self.status == "done" and bool(self.result)

    def curve(self, name: str) -> Points:
        """(steps, values) of `loss`, `eval_loss`, ..."""
        return points(self.rows, name)

    @property
    def best(self) -> tuple[int, float] | None:
        """(step, loss) of the lowest evaluation."""
        steps, values = self.curve("eval_loss")
        if not values:
            return None
        low = min(range(len(values)), key=values.__getitem__)
        return int(steps[low]), values[low]

    @property
    def last_step(self) -> int:
        return max((row["step"] for row in self.rows if row.get("step") is not None), default=0)

    @property
    def r(self) -> int | None:
        return _whole(self.settings.get("adapter.r")) if self.method == "lora" else None

    @property
    def method(self) -> str:
        """lora | full | from: training went on with an adapter."""
        if self.settings.get("adapter.from"):
            return "from"
        return str(self.settings.get("adapter.method", "lora"))

    @property
    def together(self) -> int:
        """How many runs trained side by side in its process."""
        value = (self.planned or {}).get("together")
        return value if isinstance(value, int) else 1

    @property
    def seconds(self) -> float | None:
        """What it took: wall time, or of runs side by side its part of their steps."""
        tokens, speed = self.number("tokens"), self.number("tokens_per_second")
        if self.together > 1 and tokens and speed:
            return tokens / speed
        return self.number("seconds")

    def number(self, name: str) -> float | None:
        """A number of the result; None where there is none, or one that is not finite."""
        value = self.result.get(name)
        known = isinstance(value, int | float) and not isinstance(value, bool)
        return float(value) if known and math.isfinite(value) else None  # type: ignore[arg-type]


def _whole(value: object) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def differing(candidates: Sequence[Candidate]) -> list[str]:
    """The settings that are not the same in all candidates, `output` apart."""
    names = dict.fromkeys(name for one in candidates for name in one.settings)
    return [
        name
        for name in names
        if name != "output" and len({repr(one.settings.get(name)) for one in candidates}) > 1
    ]
