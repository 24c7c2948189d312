"""Amounts of memory as people write them, and as they read them. Knows nothing else."""

from __future__ import annotations

import re

from decal.errors import ConfigError

UNITS = {
    "B": 1,
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "TB": 10**12,
    "KIB": 1 << 10,
    "MIB": 1 << 20,
    "GIB": 1 << 30,
    "TIB": 1 << 40,
    "K": 1 << 10,
    "M": 1 << 20,
    "G": 1 << 30,
    "T": 1 << 40,
}
"""Bytes of a unit. A letter alone is the binary unit, as memory is sold; GB is 10^9 bytes."""


def parse_memory(text: str) -> int:
    """Bytes of `15GB` (10^9), `15GiB` or `24G` (2^30); a number alone is GB.

    Raises:
        ConfigError: no positive amount, or no such unit.
    """
    found = re.fullmatch(r"([\d_]*\.?\d+)\s*([A-Za-z]*)", text.strip().replace(",", ""))
    unit = UNITS.get((found[2] or "GB").upper()) if found else None
    if found is None or unit is None or float(found[1].replace("_", "")) <= 0:
        raise ConfigError(
            f"`{text}` is no amount of memory", hint="write 15GB (10^9 bytes), 15GiB or 24G (2^30)"
        )
    return int(float(found[1].replace("_", "")) * unit)


def gigabytes(count: float) -> str:
    """`5.70`: 10^9 bytes with as many digits as a plan is worth."""
    size = count / 1e9
    return f"{size:,.2f}" if size < 99.995 else f"{size:,.1f}"


def memory_line(planned: int, measured: int | None) -> str:
    """`memory: planned 1.21 GB, measured 1.18 GB (-2.5 %)`."""
    text = f"memory: planned {planned / 1e9:.2f} GB"
    if measured is None or planned <= 0:
        return text
    off = 100 * (measured / planned - 1)
    return f"{text}, measured {measured / 1e9:.2f} GB ({off:+.1f} %)"
