"""Well-known GPUs by name: how much memory they have, and how fast they multiply on paper.

The memory is what the card has, in GiB as its driver counts, under the name that people use for it.
The driver and a process' CUDA context take their share of it before any tensor is made; RESERVED is
a round figure for that, as the cards are not here to be measured. Peaks are the makers' figures for
dense 16-bit tensor cores (bf16, for T4 and V100 fp16).

Knows no models.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from decal.errors import ConfigError, nearest

GIB = 1 << 30
RESERVED = GIB // 2
"""Bytes for driver and CUDA context."""


@dataclass(frozen=True)
class Card:
    """One GPU."""

    name: str
    gib: float
    """Memory in GiB."""
    teraflops: float
    """Published peak of dense 16-bit tensor operations, 1e12 per second."""

    @property
    def bytes(self) -> int:
        """All of its memory."""
        return int(self.gib * GIB)


_CARDS = (
    Card("T4", 15, 65.0),
    Card("V100-16", 16, 125.0),
    Card("V100-32", 32, 125.0),
    Card("P100", 16, 18.7),
    Card("RTX-3060", 12, 51.2),
    Card("RTX-3080", 10, 59.5),
    Card("RTX-3090", 24, 71.0),
    Card("RTX-4060", 8, 60.5),
    Card("RTX-4070", 12, 116.6),
    Card("RTX-4080", 16, 194.9),
    Card("RTX-4090", 24, 165.2),
    Card("RTX-5090", 32, 209.5),
    Card("A10G", 22.5, 70.0),
    Card("A10", 22.5, 125.0),
    Card("L4", 22.5, 121.0),
    Card("A6000", 48, 154.8),
    Card("L40S", 45, 362.0),
    Card("A100-40", 40, 312.0),
    Card("A100-80", 80, 312.0),
    Card("H100", 80, 989.0),
    Card("H200", 141, 989.0),
    Card("B200", 180, 2250.0),
    Card("MI300X", 192, 1307.0),
)
CARDS: dict[str, Card] = {card.name.lower(): card for card in _CARDS}
"""By name in small letters."""
_ALIASES = {"a100": "a100-80", "v100": "v100-16", "rtx-a6000": "a6000"}


def card(name: str) -> Card:
    """The card called `name`: `t4`, `4090`, `RTX 3090`, `a100-40gb`; ConfigError for any other."""
    short = re.sub(r"[\s_]+", "-", name.strip().lower())
    short = re.sub(r"^(nvidia|tesla|geforce)-|gb$", "", short)
    for tried in (short, _ALIASES.get(short, ""), f"rtx-{short}", re.sub(r"-\d+$", "", short)):
        if tried in CARDS:
            return CARDS[tried]
    guess = nearest(short, list(CARDS)) or nearest(f"rtx-{short}", list(CARDS))
    names = ", ".join(known.name for known in _CARDS)
    hint = f"did you mean `{CARDS[guess].name}`?" if guess else f"use --memory, or one of {names}"
    raise ConfigError(f"device `{name}` is no GPU whose memory decal knows", hint=hint)
