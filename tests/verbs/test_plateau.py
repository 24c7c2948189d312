"""Where doubling the rank ends."""

from __future__ import annotations

import pytest

from decal.verbs.plateau import LARGEST, verdict


def test_two_ranks_are_needed() -> None:
    assert verdict({}, None) is None
    assert verdict({4: {0: 1.0, 1: 1.1}}, None) is None


@pytest.mark.parametrize(("gain", "r", "over"), [(0.2, 8, False), (0.05, 4, True), (-0.3, 4, True)])
def test_gains_beyond_the_noise_go_on(gain: float, r: int, over: bool) -> None:
    """The seeds' gains are 0.1 apart. Fails when a gain within the noise counts, or a loss."""
    losses = {4: {0: 1.0, 1: 1.5}, 8: {0: 1.0 - gain - 0.05, 1: 1.5 - gain + 0.05}}
    found = verdict(losses, None)
    assert found is not None
    assert (found.r, found.over) == (r, over)
    assert "two seeds differ in this by 0.1000" in found.why


def test_rows_of_other_seeds_are_no_noise() -> None:
    """One seed's rows are harder by 1.0 at both ranks. Fails when losses of two seeds are compared
    with each other."""
    found = verdict({4: {0: 1.0, 1: 2.0}, 8: {0: 0.9, 1: 1.89}}, None)
    assert found is not None
    assert not found.over


def test_a_share_needs_one_seed() -> None:
    """Fails when the share is taken of the wrong loss, or two seeds are asked for."""
    found = verdict({4: {0: 2.0}, 8: {0: 1.97}}, 0.01)
    assert found is not None
    assert (found.r, found.over) == (8, False)
    assert found.why == (
        "r = 8 has an eval loss of 1.9700 after 2.0000 with r = 4, 0.0300 less;"
        " 1.0% of it are 0.0200"
    )
    found = verdict({4: {0: 2.0}, 8: {0: 1.99}}, 0.01)
    assert found is not None
    assert (found.r, found.over) == (4, True)


def test_one_seed_alone_has_no_noise() -> None:
    """Fails when a rank of which one seed failed is compared as if the noise were zero."""
    assert verdict({4: {0: 1.0, 1: 1.1}, 8: {1: 0.5}}, None) is None


def test_the_largest_rank_ends_it() -> None:
    """Fails when doubling has no end while it pays."""
    found = verdict({LARGEST // 2: {0: 2.0}, LARGEST: {0: 1.0}}, 0.01)
    assert found is not None
    assert (found.r, found.over) == (LARGEST, True)


def test_the_two_largest_are_compared() -> None:
    """Fails when a later doubling is measured against the first rank."""
    found = verdict({4: {0: 3.0}, 16: {0: 1.0}, 8: {0: 1.0}}, 0.01)
    assert found is not None
    assert (found.r, found.over) == (8, True)
