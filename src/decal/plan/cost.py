"""Operations of a training, and the time they take at measured rates.

A product of T rows with a weight of n numbers is 2 T n operations. With the base frozen a token
costs, for n the numbers of the linear layers that it meets,

    linears      2 n forward, 2 n for the gradient of the input; no gradient of the weight: 4 n
                 (a weight that is trained takes 2 n more)
    adapters     6 r (in + out)        forward, input and factors, two products each
    attention    14 per visible position, head and its dimension: two products forward, five in
                 backward, which computes the scores again; the visible half of a sequence counts
    head         4 H V at a trained token, 6 H V where it is trained
    checkpoint   every layer's forward once more

Embeddings are looked up and cost nothing. Of a mixture's experts those count that a token meets.
What is no product (norms, SwiGLU, dropout) takes time and no operations; rates are
measured on products with a stored weight alone, and OTHER is what a step takes beyond them.

Knows shapes; the rates come from calibrate.py or from a card's published peak.
"""

from __future__ import annotations

from dataclasses import dataclass

from decal.plan.setup import Setup

OTHER = 1.38
"""Time of a step over that of its operations at the rate of its linears. docs/performance.md, first
table: linears reach 69 % of the processor's peak, whole steps 50 %."""
UTILIZATION = 0.35
"""Share of a card's published peak that fine-tuning reaches; an assumption, and shown as one."""


@dataclass(frozen=True, kw_only=True)
class Operations:
    """Operations of one token, forward and backward."""

    linears: float
    adapters: float
    attention: float
    head: float
    recomputed: float = 0.0

    @property
    def total(self) -> float:
        """All of them."""
        return self.linears + self.adapters + self.attention + self.head + self.recomputed


def operations(setup: Setup, length: int, trained_share: float = 1.0) -> Operations:
    """Operations per token of rows that are `length` tokens long."""
    s, whole = setup.structure, setup.trained.whole
    met = sum(w.numbers * w.used for w in s.weights if w.used and not w.head and len(w.shape) > 1)
    head = s.hidden * s.vocabulary * trained_share
    ranks = setup.trained.ranks
    factors = sum(
        ranks[linear.name] * (linear.out + linear.columns)
        for layer in s.layers
        for linear in layer.linears
        if linear.name in ranks
    )
    seen = length if s.window is None else min(length, s.window)
    pairs = (seen + 1) / 2 if seen == length else seen - seen * (seen - 1) / (2 * length)
    attending = sum(layer.attends for layer in s.layers)
    attention = 14.0 * attending * s.heads * s.head_dim * pairs
    again = 2.0 * met + 2.0 * factors + attention * 2 / 7
    return Operations(
        linears=(6.0 if whole else 4.0) * met,
        adapters=6.0 * factors,
        attention=attention,
        head=(6.0 if whole else 4.0) * head,
        recomputed=again if setup.checkpointing else 0.0,
    )


def seconds_per_token(per_token: float, rate: float) -> float:
    """Time of a token at `rate` operations per second of the products."""
    return OTHER * per_token / rate
