"""Successive halving (Jamieson & Talwalkar 2016): candidates that lose early end early.

With n candidates the worse half of those that are left is ended at a share of 1/2^m, …, 1/4, 1/2 of
the steps, where m halvings lead from n to two. The last two always train to their end. A candidate
is judged by its first evaluation at or after such a step, so that no evaluation is added and each
one's training is what it would be alone, only shorter.

Decisions follow from the evaluation curves alone. A candidate that waits for others keeps nothing
busy, and a sweep that was killed decides the same again when it goes on.

Knows no files and no models.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from math import ceil

from decal.train.checkpoint import Progress

LAST = 2
"""So many are never ended."""

Curve = list[tuple[int, float]]


def halvings(count: int) -> list[int]:
    """How many are left after each halving: 8 -> [4, 2], 5 -> [3, 2], 2 -> []."""
    left = []
    while count > LAST:
        count = max(LAST, ceil(count / 2))
        left.append(count)
    return left


class Halving:
    """A judge of `train_together`.

    Args:
        names: the candidates.
        steps: optimizer steps of each one's whole training.
        known: curves of candidates whose training is over already, from an earlier sitting.
    """

    def __init__(
        self,
        names: Collection[str],
        steps: Mapping[str, int],
        known: Mapping[str, Curve] | None = None,
    ):
        self._alive = list(names)
        self._steps = dict(steps)
        self._curves: dict[str, Curve] = dict(known or {})
        self._over = set(self._curves)
        self._failed: set[str] = set()
        self._left = halvings(len(self._alive))
        self._round = 0
        self.ended: dict[str, str] = {}
        """Why each loser was ended, in a sentence."""

    def verdicts(self, waiting: Mapping[str, Progress]) -> dict[str, str | None]:
        """See `together.Judge`."""
        for name, progress in waiting.items():
            self._curves[name] = list(progress.eval_curve)
        while self._round < len(self._left) and self._decide():
            self._round += 1
        return {
            name: self.ended.get(name)
            for name in waiting
            if name in self.ended or self._loss(name) is None
        }

    def over(self, name: str, curve: Sequence[tuple[int, float]] | None) -> None:
        """What stopped early is judged by its last evaluation, what failed is out from then on."""
        self._over.add(name)
        if curve is None:
            self._failed.add(name)
        else:
            self._curves[name] = list(curve)

    def _decide(self) -> bool:
        """Ends the losers of this round, if all that are left have come to it."""
        found = {name: self._loss(name) for name in self._alive}
        losses = {name: loss for name, loss in found.items() if loss is not None}
        if not found.keys() - losses.keys() <= self._out():
            return False
        keep = self._left[self._round]
        ranked = sorted(losses, key=lambda name: (losses[name], self._alive.index(name)))
        for place, name in enumerate(ranked[keep:], keep + 1):
            if name not in self._over:
                self.ended[name] = (
                    f"halved out at an eval loss of {losses[name]:.4f}, place {place} of"
                    f" {len(ranked)}; the {keep} that went on had {losses[ranked[keep - 1]]:.4f}"
                    " or less"
                )
        self._alive = [name for name in self._alive if name in ranked[:keep]]
        return True

    def _out(self) -> set[str]:
        """Those that are over and will never come to an evaluation that counts."""
        return self._failed | {name for name in self._over if not self._curves.get(name)}

    def _loss(self, name: str) -> float | None:
        """What a candidate is judged by in this round; None before it has come to it."""
        if self._round == len(self._left):
            return None
        share = 2 ** (len(self._left) - self._round)
        at = ceil(self._steps[name] / share)
        curve = self._curves.get(name, [])
        reached = [loss for step, loss in curve if step >= at]
        if not reached and name in self._over - self._failed:
            reached = [loss for _, loss in curve[-1:]]
        return reached[0] if reached else None
