"""The registry of quantization formats: one file per format, one line here."""

from __future__ import annotations

from decal.errors import QuantError, nearest
from decal.quant.base import Packed, QuantFormat, Recipe
from decal.quant.nf4 import NF4

FORMATS: dict[str, QuantFormat] = {"nf4": NF4}

__all__ = ["FORMATS", "Packed", "QuantFormat", "Recipe", "quant_format"]


def quant_format(name: str) -> QuantFormat:
    """The format called `name`; QuantError with the nearest name if there is none."""
    if name in FORMATS:
        return FORMATS[name]
    guess = nearest(name, list(FORMATS))
    raise QuantError(
        f"quantization format `{name}` is unknown; known: {', '.join(sorted(FORMATS))}",
        hint=f"did you mean `{guess}`?" if guess else None,
    )
