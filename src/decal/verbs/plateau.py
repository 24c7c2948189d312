"""Doubling the rank until it stops paying. Pure: from evaluation losses to a decision.

A rank is better than half of it if its loss is lower by more than the noise. The noise is how far
apart the gains of two seeds are. Gains, not losses: each seed may hold out rows of its own, and
what these rows are worth is the same for both ranks. Or the noise is a share of the loss that was
named, and one seed is enough.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

FIRST, LARGEST = 4, 256
SEEDS = 2


@dataclass(frozen=True)
class Verdict:
    """Whether the last doubling paid."""

    r: int
    """The smallest rank that is as good as the largest that was tried, to noise."""
    over: bool
    """Whether doubling should end."""
    why: str


def verdict(losses: Mapping[int, Mapping[int, float]], threshold: float | None) -> Verdict | None:
    """Of the two largest ranks.

    Args:
        losses: rank -> seed -> best evaluation loss; ranks double.
        threshold: the share of the loss that counts as better; None goes by the seeds.

    Returns:
        None before two ranks are known, or without the two seeds that it goes by.
    """
    ranks = sorted(losses)
    if len(ranks) < 2:
        return None
    half, r = ranks[-2:]
    seeds = sorted(losses[half].keys() & losses[r].keys())
    if len(seeds) < (SEEDS if threshold is None else 1):
        return None
    before, now = (sum(losses[k][seed] for seed in seeds) / len(seeds) for k in (half, r))
    if threshold is None:
        gains = [losses[half][seed] - losses[r][seed] for seed in seeds]
        noise = max(gains) - min(gains)
        named = f"two seeds differ in this by {noise:.4f}"
    else:
        noise = threshold * before
        named = f"{threshold:.1%} of it are {noise:.4f}"
    gain = before - now
    paid = gain > noise
    why = (
        f"r = {r} has an eval loss of {now:.4f} after {before:.4f} with r = {half}, "
        f"{abs(gain):.4f} {'less' if gain > 0 else 'more'}; {named}"
    )
    return Verdict(r if paid else half, not paid or 2 * r > LARGEST, why)
