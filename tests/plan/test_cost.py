"""Operations of a token, by hand."""

from __future__ import annotations

import pytest

from decal.plan.cost import operations, seconds_per_token
from decal.plan.structure import Trained
from tests.plan.tiny import SHAPES, VOCABULARY, H, setup

LINEARS = 2 * sum(out * columns for out, columns, _ in SHAPES.values())
FACTORS = 2 * 8 * sum(out + columns for out, columns, _ in SHAPES.values())


def test_a_frozen_base_takes_no_gradients_of_weights() -> None:
    """Mutations: 6 for 4; count the embedding; forget a layer; the adapter's input gradient."""
    found = operations(setup(), 128)
    assert found.linears == 4 * LINEARS
    assert found.adapters == 6 * FACTORS
    assert found.head == 4 * H * VOCABULARY
    assert found.recomputed == 0


def test_every_weight_takes_half_as_much_again() -> None:
    """Mutation: the frozen count for full fine-tuning."""
    found = operations(setup(trained=Trained(parameters=1, whole=True)), 128)
    assert found.linears == 6 * LINEARS
    assert found.head == 6 * H * VOCABULARY


def test_the_head_counts_at_trained_tokens() -> None:
    """Mutation: project prompts too."""
    whole, part = (operations(setup(), 128, share).head for share in (1.0, 0.25))
    assert part == whole / 4


def test_attention_sees_what_came_before() -> None:
    """Half of a sequence on average, or a window. Mutations: the whole square; no window."""
    per_pair = 14 * 2 * 4 * 16
    assert operations(setup(), 128).attention == per_pair * 129 / 2
    windowed = setup()
    object.__setattr__(windowed.structure, "window", 16)
    seen = sum(min(i + 1, 16) for i in range(128)) / 128
    assert operations(windowed, 128).attention == pytest.approx(per_pair * seen)


def test_checkpointing_runs_forward_again() -> None:
    """Mutations: nothing; the backward too."""
    found = operations(setup(checkpointing=True), 128)
    forward = 2 * LINEARS + 2 * FACTORS + found.attention * 2 / 7
    assert found.recomputed == pytest.approx(forward)
    assert found.total > operations(setup(), 128).total


def test_time_follows_the_rate() -> None:
    """Mutation: multiply by the rate."""
    assert seconds_per_token(1e9, 1e11) == pytest.approx(2 * seconds_per_token(1e9, 2e11))
    assert seconds_per_token(1e9, 1e11) > 0.01
