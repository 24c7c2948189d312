"""Which of several candidates to take: the smallest that is as good as the best, to within noise.

    best         the lowest evaluation loss that a setting reached, mean over its seeds
    noise        the largest difference between seeds of one setting, where several were run;
                 else `THRESHOLD` of the best loss
    recommended  the fewest trainable parameters among settings with loss <= best + noise

The same setting is the knee: beyond it more parameters bring nothing above the noise. Rejected: the
point of the largest curvature or distance from a chord (Kneedle). It moves when a candidate is
added at either end, and it knows no noise.

Pure functions; what is not comparable gets a reason instead of a recommendation.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from decal.report.candidate import Candidate

THRESHOLD = 0.01
"""Share of the best loss that counts as noise where no two seeds of a setting were run."""


@dataclass(frozen=True, kw_only=True)
class Score:
    """One finished candidate."""

    name: str
    parameters: int
    loss: float
    """Best evaluation loss."""
    setting: str
    """Everything that was set, the seed apart: the same for all seeds of a setting."""
    r: int | None = None
    rows: str | None = None
    """Digest of base and data; losses on others say nothing about each other."""


@dataclass(frozen=True, kw_only=True)
class Advice:
    """What to take, or why there is nothing to say."""

    text: str
    """One or two sentences."""
    names: tuple[str, ...] = ()
    """The recommended candidate, every seed of it; empty without a recommendation."""
    best: float | None = None
    noise: float | None = None
    """In units of the loss."""
    source: str = ""
    """Where the noise comes from."""
    more: str | None = None
    """What to try next, where the largest candidate is not large enough."""


@dataclass(frozen=True)
class _Group:
    scores: list[Score]

    @property
    def loss(self) -> float:
        return math.fsum(score.loss for score in self.scores) / len(self.scores)

    @property
    def spread(self) -> float:
        losses = [score.loss for score in self.scores]
        return max(losses) - min(losses)

    @property
    def parameters(self) -> int:
        return self.scores[0].parameters

    @property
    def r(self) -> int | None:
        return self.scores[0].r

    @property
    def name(self) -> str:
        return " and ".join(score.name for score in self.scores)


def scores(candidates: Sequence[Candidate]) -> list[Score]:
    """The candidates that ended, were evaluated, and whose size is known."""
    found = []
    for one in candidates:
        if one.finished and one.best is not None and one.trainable:
            setting = {k: v for k, v in one.settings.items() if k not in ("train.seed", "output")}
            digests = [one.base, one.data]
            found.append(
                Score(
                    name=one.name,
                    parameters=one.trainable,
                    loss=one.best[1],
                    setting=json.dumps(setting, sort_keys=True, default=str),
                    r=one.r,
                    rows=json.dumps(digests) if all(digests) else None,
                )
            )
    return found


def recommend(found: Sequence[Score], tried: Sequence[int] = ()) -> Advice:
    """The recommendation among these scores, with its reason.

    `tried` are the ranks of all candidates, those that have not ended too.
    """
    groups = _grouped(found)
    if len(groups) < 2:
        return Advice(text="One setting alone has nothing to be compared with.")
    reason = _incomparable(groups)
    if reason is not None:
        return Advice(text=reason)
    best = min(groups, key=lambda group: group.loss)
    noise, source = _noise(groups, best.loss)
    good = [group for group in groups if group.loss <= best.loss + noise]
    chosen = min(good, key=lambda group: (group.parameters, group.loss))
    return Advice(
        text=_reason(groups, chosen, best, noise),
        names=tuple(score.name for score in chosen.scores),
        best=best.loss,
        noise=noise,
        source=source,
        more=_more(groups, chosen, tried),
    )


def _grouped(found: Sequence[Score]) -> list[_Group]:
    groups: dict[tuple[str, int], list[Score]] = {}
    for score in found:
        groups.setdefault((score.setting, score.parameters), []).append(score)
    return [_Group(members) for members in groups.values()]


def _incomparable(groups: Sequence[_Group]) -> str | None:
    """Losses are compared on the same rows only; seeds choose rows, so a setting may have several.

    Rows are known by their digest; where a run left none it is taken as comparable.
    """
    rows = {frozenset(s.rows for s in group.scores if s.rows) for group in groups} - {frozenset()}
    if len(rows) < 2:
        return None
    return (
        "No recommendation: the candidates were not evaluated on the same rows of the same base,"
        " so their losses cannot be compared."
    )


def _noise(groups: Sequence[_Group], best: float) -> tuple[float, str]:
    seeds = [group for group in groups if len(group.scores) > 1]
    if seeds:
        widest = max(seeds, key=lambda group: group.spread)
        return widest.spread, f"the largest difference between seeds of one setting ({widest.name})"
    return THRESHOLD * abs(
        best
    ), f"{100 * THRESHOLD:g} % of the best loss: no setting ran with two seeds"


def _reason(groups: Sequence[_Group], chosen: _Group, best: _Group, noise: float) -> str:
    size = f"{chosen.parameters:,} trainable parameters"
    within = sum(group.loss <= best.loss + noise for group in groups)
    if chosen is not best:
        larger = "" if within < len(groups) else "; all candidates are that close"
        return (
            f"Take {chosen.name}: with {size} it is the smallest whose evaluation loss,"
            f" {chosen.loss:.4g}, is within the noise ({noise:.2g}) of the best, {best.loss:.4g} of"
            f" {best.name}{larger}."
        )
    smaller = [group for group in groups if group.parameters < chosen.parameters]
    if not smaller:
        return (
            f"Take {chosen.name}: with {size} it is the smallest, and has the lowest evaluation"
            f" loss, {best.loss:.4g}."
        )
    return (
        f"Take {chosen.name}: it has the lowest evaluation loss, {best.loss:.4g} with {size}, and"
        f" every smaller candidate is worse by more than the noise ({noise:.2g})."
    )


def _more(groups: Sequence[_Group], chosen: _Group, tried: Sequence[int]) -> str | None:
    """What to run next where the chosen candidate is at an end of the ranks that were tried."""
    ranks = sorted({group.r for group in groups if group.r is not None})
    if len(ranks) < 2 or chosen.r is None:
        return None
    r = chosen.r
    if r == ranks[-1] and not any(other > r for other in tried):
        return (
            f"r={r} is the largest rank that was tried, and still better than the others by more"
            f" than the noise: go on doubling, to r={2 * r}."
        )
    if r == ranks[0] and r > 1 and not any(other < r for other in tried):
        return f"r={r} is the smallest rank that was tried: r={r // 2} may do as well."
    return None


def shown(advice: Advice) -> Mapping[str, Any]:
    """The advice as plain JSON."""
    return {
        "recommended": list(advice.names),
        "text": advice.text,
        "best_eval_loss": advice.best,
        "noise": advice.noise,
        "noise_from": advice.source or None,
        "more": advice.more,
    }
