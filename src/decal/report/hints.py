"""What a curve calls for: the rules of thumb of the tutorials, applied where they apply.

    rising    the evaluation loss ended more than 2 % above its lowest
    diverged  the smoothed training loss ended more than half above its lowest
    spikes    single steps far above their neighbours, again and again
    flat      the training loss fell by less than 3 %
    falling   the evaluation loss still fell by more than 2 % in the last third

Pure functions of (steps, values); the thresholds are constants here, and stand in docs/report.md.
They are rules of thumb: each says what it saw, with its numbers, before what to try.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from decal.report.candidate import Candidate
from decal.report.plots import Points, smoothed

RISE = 0.02
DIVERGED = 0.5
FLAT = 0.03
FALLING = 0.02
FEW = 12
"""Steps below which a training curve says nothing."""
WINDOW = 5
"""Steps on each side whose median is a step's usual loss."""
SPIKE = 8.0
"""Robust standard deviations above the usual loss."""
SPIKE_SHARE = 0.3
"""And this share of the usual loss; both must hold."""
SPIKES = 2


@dataclass(frozen=True, kw_only=True)
class Hint:
    """One thing that a curve shows."""

    kind: str
    seen: str
    """What the curve does, with numbers."""
    advice: str
    """What to try."""


def hints(candidate: Candidate) -> list[Hint]:
    """All hints for one run, the most urgent first."""
    train, evaluations = candidate.curve("loss"), candidate.curve("eval_loss")
    found = [
        rising(evaluations, candidate.number("kept_step")),
        diverged(train) or spikes(train),
        flat(train),
        falling(evaluations) if candidate.finished else None,
        skipped(candidate),
    ]
    return [hint for hint in found if hint is not None]


def rising(evaluations: Points, kept: float | None = None) -> Hint | None:
    """Overfitting: the evaluation loss has passed its lowest point. `kept` is the step kept."""
    steps, values = evaluations
    if len(values) < 3:
        return None
    low = min(range(len(values)), key=values.__getitem__)
    if low == len(values) - 1 or values[-1] <= values[low] * (1 + RISE):
        return None
    rest = (
        f" The weights that were kept are those of step {kept:,.0f}." if kept == steps[low] else ""
    )
    return Hint(
        kind="rising",
        seen=f"The evaluation loss was lowest at step {steps[low]:,.0f} ({values[low]:.4g}) and"
        f" rose to {values[-1]:.4g}: the adapter learns the training rows by heart.",
        advice=f"More dropout, fewer epochs, or a lower r.{rest}",
    )


def diverged(train: Points) -> Hint | None:
    """The training loss went up and stayed up."""
    steps, values = train
    if len(values) < FEW:
        return None
    calm = smoothed(values, 0.1)
    low = min(range(len(calm)), key=calm.__getitem__)
    if calm[-1] <= calm[low] * (1 + DIVERGED):
        return None
    return Hint(
        kind="diverged",
        seen=f"The training loss fell to {calm[low]:.4g} by step {steps[low]:,.0f} and ended at"
        f" {calm[-1]:.4g}.",
        advice="A lower lr, a longer warm-up, or a lower lora_alpha.",
    )


def spikes(train: Points) -> Hint | None:
    """Single steps whose loss is far above that of the steps around them."""
    steps, values = train
    if len(values) < FEW:
        return None
    usual = [
        statistics.median(values[max(0, i - WINDOW) : i + WINDOW + 1]) for i in range(len(values))
    ]
    above = [value - median for value, median in zip(values, usual, strict=True)]
    scale = 1.4826 * statistics.median(abs(a) for a in above)
    first = len(values) // 10  # the loss falls fastest there
    found = [
        i
        for i in range(first, len(values))
        if above[i] > SPIKE * scale and above[i] > SPIKE_SHARE * abs(usual[i])
    ]
    if len(found) < SPIKES:
        return None
    worst = max(found, key=lambda i: above[i])
    return Hint(
        kind="spikes",
        seen=f"The training loss jumped at {len(found)} steps, at step {steps[worst]:,.0f} from"
        f" about {usual[worst]:.4g} to {values[worst]:.4g}.",
        advice="A lower lora_alpha or lr; rows that are unlike the others do it too.",
    )


def flat(train: Points) -> Hint | None:
    """The loss hardly moved."""
    _, values = train
    if len(values) < FEW:
        return None
    part = max(3, len(values) // 10)
    first, last = _mean(values[:part]), _mean(values[-part:])
    if first <= 0 or last < (1 - FLAT) * first or last > (1 + FLAT) * first:
        return None
    return Hint(
        kind="flat",
        seen=f"The training loss hardly moved: {first:.4g} over the first {part} steps,"
        f" {last:.4g} over the last.",
        advice="A higher lr, or more target modules (all-linear).",
    )


def falling(evaluations: Points) -> Hint | None:
    """The run ended too early."""
    steps, values = evaluations
    if len(values) < 3 or values[-1] > min(values):
        return None
    begin = next(i for i, step in enumerate(steps) if step >= steps[-1] * 2 / 3 - 1e-9)
    begin = min(begin, len(values) - 2)
    if values[-1] > (1 - FALLING) * values[begin]:
        return None
    return Hint(
        kind="falling",
        seen=f"The evaluation loss was still falling at the end: {values[begin]:.4g} at step"
        f" {steps[begin]:,.0f}, {values[-1]:.4g} at step {steps[-1]:,.0f}.",
        advice="More steps or epochs, or a higher lr.",
    )


def skipped(candidate: Candidate) -> Hint | None:
    """Updates that float16 lost."""
    count, steps = candidate.number("skipped"), candidate.number("steps")
    if not count or not steps or count < 0.01 * steps:
        return None
    return Hint(
        kind="skipped",
        seen=f"{count:,.0f} of {steps:,.0f} updates were skipped because float16 overflowed.",
        advice="base.dtype: bfloat16 where the hardware has it, or a lower lr.",
    )


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
