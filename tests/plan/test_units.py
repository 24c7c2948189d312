"""Amounts of memory."""

from __future__ import annotations

import pytest

from decal.errors import ConfigError
from decal.plan.units import gigabytes, memory_line, parse_memory


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("15GB", 15 * 10**9),
        ("15GiB", 15 << 30),
        ("24G", 24 << 30),
        ("24", 24 * 10**9),
        ("1.5 TB", 1500 * 10**9),
        ("512MiB", 512 << 20),
        ("80gb", 80 * 10**9),
        ("16,000MB", 16 * 10**9),
    ],
)
def test_amounts(text: str, count: int) -> None:
    """Mutations: take G for 10^9, GiB for GB, or a number alone for bytes."""
    assert parse_memory(text) == count


@pytest.mark.parametrize("text", ["", "many", "-3GB", "0", "15 apples", "GB"])
def test_what_is_no_amount(text: str) -> None:
    """Fails when nonsense becomes a number, or another error than the user's."""
    with pytest.raises(ConfigError, match="no amount of memory") as caught:
        parse_memory(text)
    assert "15GiB" in str(caught.value.hint)


def test_how_amounts_are_shown() -> None:
    """Mutations: divide by 2^30; drop the sign; planned over measured."""
    assert gigabytes(5_702_296_448) == "5.70"
    assert gigabytes(138e9) == "138.0"
    line = memory_line(1_000_000_000, 1_050_000_000)
    assert line == "memory: planned 1.00 GB, measured 1.05 GB (+5.0 %)"
    assert memory_line(2_000_000_000, None) == "memory: planned 2.00 GB"
