"""Dropout bits: the same for the same counters, and as good as independent for all others.

Bounds are in standard deviations of independent Bernoulli bits; the largest of n normal values lies
within sqrt(2 ln n) + 1 with near certainty, plus the skew of products of rare events.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from decal.kernels import ops
from decal.kernels.reference_dropout import row_words

T, F = 1024, 1024
IDS = torch.arange(T) // 48
POSITIONS = torch.arange(T) % 48
BASE = {"seed": 3, "epoch": 1, "adapter": 77, "input": -5, "sample_ids": IDS}


PINNED = [[0xB2D85190, 0x690CB1FC, 0xD1B738F5], [0x341F7D21, 0x9692AEA3, 0xA72A3D67]]


def keep(p: float, features: int = F, **changed: object) -> Tensor:
    arguments = {**BASE, "positions": POSITIONS, **changed}
    return ops.dropout_keep(features=features, p=p, **arguments)  # type: ignore[arg-type]


def normal(kept: Tensor, p: float) -> Tensor:
    """Mean 0 and variance 1 where bits are kept with probability 1 - p."""
    return (kept.float() - (1 - p)) / math.sqrt(p * (1 - p))


def test_a_bit_depends_on_its_own_counters_only() -> None:
    """Rows taken out, reordered or fewer features give the same bits. Fails if anything of the call
    (row index, T, F, chunk) enters the hash."""
    whole = keep(0.3)
    some = torch.randperm(T)[:77]
    assert torch.equal(keep(0.3, sample_ids=IDS[some], positions=POSITIONS[some]), whole[some])
    assert torch.equal(keep(0.3, features=37), whole[:, :37])


def test_bits_are_pinned() -> None:
    """A resumed run must draw the same bits in every version. Fails if any constant changes."""
    kept = ops.dropout_keep(1, 2, 3, 4, torch.tensor([5, -6]), torch.tensor([7, 1 << 40]), 96, 0.5)
    words = (kept.long().view(2, 3, 32) << torch.arange(32)).sum(-1)
    assert words.tolist() == PINNED


def test_no_dropout_keeps_all() -> None:
    """Fails if the threshold is off by its sign."""
    assert bool(keep(0.0).all())


@pytest.mark.parametrize("p", [0.05, 0.1, 0.5])
def test_the_share_is_right_everywhere(p: float) -> None:
    """In all, in each row and in each column. Fails if the row's multiplier is not odd or small, or
    p counts twice."""
    x = normal(keep(p), p)
    assert abs(x.mean().item()) * math.sqrt(T * F) < 4
    assert x.mean(1).abs().max().item() * math.sqrt(F) < 5
    assert x.mean(0).abs().max().item() * math.sqrt(T) < 5


@pytest.mark.parametrize("side", [0, 1], ids=["features", "rows"])
def test_pairs_are_uncorrelated(side: int) -> None:
    """All pairs of features over rows, and of rows over features. Fails with one multiplier for
    all rows and no shift."""
    x = normal(keep(0.5), 0.5)
    x = x.T if side == 0 else x
    gram = (x @ x.T) / math.sqrt(x.shape[1])
    gram.fill_diagonal_(0)
    assert gram.abs().max().item() < math.sqrt(2 * math.log(T * T / 2)) + 1
    assert abs(gram.std().item() - 1) < 0.02


def test_rare_drops_coincide_no_more_than_chance() -> None:
    """At p = 0.05 the number of features dropped in both of two rows is Poisson with mean 2.56; its
    variance over all pairs must be that of independent bits. Fails with one multiplier for all
    rows and no shift."""
    dropped = (~keep(0.05)).float()
    both = (dropped @ dropped.T)[torch.triu_indices(T, T, 1).unbind()]
    mean = F * 0.05**2
    assert abs(both.mean().item() / mean - 1) < 0.02
    assert abs(both.var().item() / (mean * (1 - 0.05**2)) - 1) < 0.03
    assert both.max().item() < 21


CHANGES: dict[str, Callable[[], dict[str, object]]] = {
    "seed": lambda: {"seed": 4},
    "epoch": lambda: {"epoch": 2},
    "adapter": lambda: {"adapter": 78},
    "input": lambda: {"input": -4},
    "sample": lambda: {"sample_ids": IDS + 1},
    "position": lambda: {"positions": POSITIONS + 1},
    "seed and epoch exchanged": lambda: {"seed": 1, "epoch": 3},
    "sample and position exchanged": lambda: {"sample_ids": POSITIONS + 50, "positions": IDS},
}


@pytest.mark.parametrize("what", CHANGES)
def test_each_counter_gives_new_bits(what: str) -> None:
    """Against the same place, and against every other feature of the same row. Fails if the counter
    is left out of the hash, or added to another one."""
    x, y = normal(keep(0.5), 0.5), normal(keep(0.5, **CHANGES[what]()), 0.5)
    assert abs((x * y).mean().item()) * math.sqrt(T * F) < 4
    cross = (x.T @ y) / math.sqrt(T)
    assert cross.abs().max().item() < math.sqrt(2 * math.log(F * F)) + 1


def test_squares_of_bits_are_independent() -> None:
    """Four bits at the corners of a rectangle: where rows and features mix only by addition, their
    parities agree. Fails with one multiplier for all rows and no shift."""
    x = normal(keep(0.5), 0.5)
    for lag in (1, 2, 48, 512):
        rows = x[lag:] * x[:-lag]
        for apart in (1, 2, 512):
            corners = rows[:, apart:] * rows[:, :-apart]
            assert abs(corners.mean().item()) * math.sqrt(corners.numel()) < 4.5


def test_rows_with_equal_multipliers_do_not_repeat_each_other() -> None:
    """Among 2^18 rows some sixteen pairs share the second stage's multiplier. Fails without the
    xor-shift: the bits of such a pair would be each other's, shifted."""
    positions = torch.arange(1 << 18)
    ids = torch.zeros_like(positions)
    multipliers = (row_words((3, 77, -5, 1), ids, positions) >> 32) | 1
    ordered, at = multipliers.sort()
    twin = (ordered[1:] == ordered[:-1]).nonzero().view(-1)
    assert twin.numel() >= 4
    first, second = (
        normal(keep(0.5, 4096, sample_ids=ids[rows], positions=positions[rows]), 0.5)
        for rows in (at[twin], at[twin + 1])
    )
    assert (first * second).mean(1).abs().max().item() * math.sqrt(4096) < 5
