"""Batch and logits -> loss sum and trained tokens. One file each."""

from __future__ import annotations

from decal.objectives import classify, sft
from decal.objectives.base import Objective

__all__ = ["OBJECTIVES", "Objective"]

OBJECTIVES: dict[str, Objective] = {"sft": sft, "classify": classify}
