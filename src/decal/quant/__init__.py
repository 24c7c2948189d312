"""The registry of quantization formats: one file per format, one line here."""

from __future__ import annotations

from decal.errors import QuantError, nearest
from decal.quant.base import Packed, QuantFormat, Recipe
from decal.quant.fp4 import FP4
from decal.quant.int8 import INT8
from decal.quant.nf4 import NF4

FORMATS: dict[str, QuantFormat] = {"nf4": NF4, "fp4": FP4, "int8": INT8}

__all__ = ["FORMATS", "Packed", "QuantFormat", "Recipe", "describe", "quant_format"]


def quant_format(name: str) -> QuantFormat:
    """The format called `name`; QuantError with the nearest name if there is none."""
    if name in FORMATS:
        return FORMATS[name]
    guess = nearest(name, list(FORMATS))
    raise QuantError(
        f"quantization format `{name}` is unknown; known: {', '.join(sorted(FORMATS))}",
        hint=f"did you mean `{guess}`?" if guess else None,
    )


def describe(recipe: Recipe) -> str:
    """The recipe in a few words, without what means nothing to its format."""
    if not quant_format(recipe.format).blocks:
        return recipe.format
    double = " with double quantization" if recipe.double else ""
    size = f" in blocks of {recipe.block_size}" if recipe.block_size != 64 else ""
    return recipe.format + double + size
