"""A training in plain numbers: what the formulas of this folder are told.

Knows shapes and settings; computes nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

from decal.plan.structure import ITEMSIZE, Structure, Trained
from decal.quant.base import Recipe


@dataclass(frozen=True, kw_only=True)
class Load:
    """What of the rows decides memory: the largest micro-batch."""

    tokens: int
    """Of the largest micro-batch."""
    trained: int
    """Its trained tokens."""
    several: bool
    """Whether a step has more than one micro-batch."""


@dataclass(frozen=True, kw_only=True)
class Setup:
    """A training in plain numbers."""

    structure: Structure
    trained: Trained
    load: Load
    recipe: Recipe | None = None
    dtype: str = "bfloat16"
    checkpointing: bool = False
    dropout: bool = True
    optimizer: str = "adamw"
    device: str = "cpu"
    fused: bool = True
    """Whether the fused steps may run: on a CPU, on flattened rows."""
    native: bool = True
    """Whether compiled kernels compute the products."""
    mapped: bool = True
    """Whether the weights lie in their files in the compute dtype, and are mapped from there."""
    process: int = 0
    """Bytes that the process holds without any of this."""

    @property
    def itemsize(self) -> int:
        """Bytes of a number in the compute dtype."""
        return ITEMSIZE[self.dtype]

    @property
    def compiled(self) -> bool:
        """Whether products run without a dequantized copy of the weight: bf16 and the library."""
        return self.native and self.device == "cpu" and self.dtype == "bfloat16"
