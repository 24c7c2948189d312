"""Orders: fixed for ever, different per seed and stream."""

from __future__ import annotations

from decal.data.order import EVAL_STREAM, permutation


def test_order_is_pinned() -> None:
    """The literal order: fails if the generator, the key or the sort is exchanged."""
    assert permutation(10, seed=7, stream=2).tolist() == [6, 7, 8, 4, 0, 1, 5, 3, 9, 2]


def test_order_is_a_permutation_and_depends_on_seed_and_stream() -> None:
    """Mutation: key by the seed only."""
    orders = [permutation(97, s, e).tolist() for s, e in ((0, 0), (0, 1), (1, 0), (0, EVAL_STREAM))]
    assert all(sorted(order) == list(range(97)) for order in orders)
    assert len({tuple(order) for order in orders}) == 4
