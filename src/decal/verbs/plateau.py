"""Doubling the rank until it stops paying. Pure: from evaluation losses to a decision.

A rank is better than half of it if its loss is lower by more than the noise. The noise is what two
runs of one rank differ by that have other seeds: the larger difference of the two ranks that are
compared. Or it is a share of the loss that was named, and one seed is enough.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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


def verdict(losses: Mapping[int, Sequence[float]], threshold: float | None) -> Verdict | None:
    """Of the two largest ranks.

    Args:
        losses: rank -> best evaluation loss of each seed; ranks double.
        threshold: the share of the loss that counts as better; None goes by the seeds.

    Returns:
        None before two ranks are known.
    """
    ranks = sorted(losses)
    if len(ranks) < 2:
        return None
    half, r = ranks[-2:]
    before, now = (sum(losses[k]) / len(losses[k]) for k in (half, r))
    if threshold is None:
        noise = max(max(losses[k]) - min(losses[k]) for k in (half, r))
        named = f"two seeds differ by {noise:.4f}"
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
