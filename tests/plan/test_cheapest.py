"""The cheapest change that fits."""

from __future__ import annotations

from collections.abc import Mapping

import pytest

from decal.plan.cheapest import Now, candidates, cheapest

NOW = Now(micro_batch_tokens=4096, longest=1000, checkpointing=False, formats=("int8", "nf4"), r=16)


def cost(changes: Mapping[str, str]) -> int:
    """Weights 40, 20 or 10, rows 40 or less, rank 16."""
    weights = {"int8": 20, "nf4": 10}.get(changes.get("quant", ""), 40)
    rows = int(changes.get("train.micro_batch_tokens", "4096")) // 100
    rows //= 4 if "train.gradient_checkpointing" in changes else 1
    return weights + rows + int(changes.get("adapter.r", "16"))


@pytest.mark.parametrize(
    ("room", "changes"),
    [
        (80, {"train.micro_batch_tokens": "2048"}),
        (67, {"train.micro_batch_tokens": "1024"}),
        (65, {"train.gradient_checkpointing": "true", "train.micro_batch_tokens": "2048"}),
        (47, {"quant": "int8", "train.micro_batch_tokens": "1024"}),
        (30, {"quant": "nf4", "train.gradient_checkpointing": "true"}),
        (24, {"quant": "nf4", "train.gradient_checkpointing": "true", "adapter.r": "8"}),
    ],
)
def test_what_costs_least_comes_first(room: int, changes: dict[str, str]) -> None:
    """Mutations: quantize before micro-batches shrink; recompute before; lower the rank first."""
    found = cheapest(NOW, cost, room)
    assert found is not None
    assert cost(found) <= room
    assert set(found) <= {*changes, "train.micro_batch_tokens"}


def test_nothing_may_help() -> None:
    """Mutation: the last candidate whatever it needs."""
    assert cheapest(NOW, lambda changes: 10**9, 10) is None


def test_candidates_get_smaller_and_keep_the_longest_sample() -> None:
    """Mutations: micro-batches below the longest sample; a rank below 4; a change of nothing."""
    found = list(candidates(NOW))
    assert {} not in found
    plain = [c for c in found if "data.max_length" not in c]
    assert all(int(c.get("train.micro_batch_tokens", "1000")) >= 1000 for c in plain)
    assert min(int(c["adapter.r"]) for c in found if "adapter.r" in c) == 4


def test_full_fine_tuning_has_no_rank_to_lower() -> None:
    """Mutation: change a rank or a format that the run does not have."""
    now = Now(micro_batch_tokens=512, longest=512, checkpointing=True, formats=(), r=None)
    assert all(set(c) <= {"data.max_length", "train.micro_batch_tokens"} for c in candidates(now))
