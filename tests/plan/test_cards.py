"""GPUs by name."""

from __future__ import annotations

import pytest

from decal.errors import ConfigError
from decal.plan.cards import CARDS, card


@pytest.mark.parametrize(
    ("asked", "name"),
    [
        ("t4", "T4"),
        ("NVIDIA T4", "T4"),
        ("4090", "RTX-4090"),
        ("RTX 3090", "RTX-3090"),
        ("geforce-rtx-4090", "RTX-4090"),
        ("a100", "A100-80"),
        ("A100-40GB", "A100-40"),
        ("h100-80gb", "H100"),
        ("H200", "H200"),
        ("l4", "L4"),
    ],
)
def test_names(asked: str, name: str) -> None:
    """Fails when a usual way to write a card is not understood."""
    assert card(asked).name == name


def test_memory_is_in_binary_units() -> None:
    """Mutation: take the driver's GiB for 10^9 bytes."""
    assert card("a100-80").bytes == 80 << 30
    assert all(entry.bytes > 1 << 32 and entry.teraflops > 1 for entry in CARDS.values())


def test_a_typo_gets_a_suggestion() -> None:
    """Fails when the nearest name is not offered."""
    with pytest.raises(ConfigError, match="no GPU") as caught:
        card("rtx-4091")
    assert caught.value.hint == "did you mean `RTX-4090`?"
    with pytest.raises(ConfigError) as caught:
        card("abacus")
    assert "--memory" in str(caught.value.hint)
