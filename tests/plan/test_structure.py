"""What weights weigh, by hand."""

from __future__ import annotations

import pytest

from decal.plan.structure import stored
from decal.quant.base import Recipe
from tests.plan.tiny import SHAPES, VOCABULARY, H, structure

PACKED = 2 * sum(out * columns for out, columns, _ in SHAPES.values())
PLAIN = VOCABULARY * H + 2 * H


@pytest.mark.parametrize(
    ("recipe", "packed"),
    [
        (Recipe(format="int8"), PACKED + 4 * 2 * sum(out for out, *_ in SHAPES.values())),
        (Recipe(format="nf4", double=False), PACKED // 2 + 4 * PACKED // 64),
        (Recipe(format="fp4", double=False, block_size=128), PACKED // 2 + 4 * PACKED // 128),
    ],
)
def test_packed_weights(recipe: Recipe, packed: int) -> None:
    """Mutations: a byte for four bits; scales of 16 bits; the embedding packed; 64 for 128."""
    found = stored(structure(), recipe)
    assert (found.packed, found.plain) == (packed, 2 * PLAIN)
    assert found.total == packed + 2 * PLAIN


def test_plain_weights_have_the_compute_dtype() -> None:
    """Mutation: two bytes for float32."""
    assert stored(structure(), None, "float32").total == 4 * (PACKED + PLAIN)
    assert structure().parameters == PACKED + PLAIN
    assert structure().largest == 192 * 64
