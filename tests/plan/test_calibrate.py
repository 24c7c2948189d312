"""Rates of products."""

from __future__ import annotations

import torch

from decal.plan.calibrate import rates
from decal.quant.base import Recipe


def test_every_format_gets_a_rate() -> None:
    """Mutations: measure one format for all; count half of the operations; odd widths fail."""
    formats = {"none": None, "nf4": Recipe(format="nf4"), "int8": Recipe(format="int8")}
    found = rates(formats, (200, 72), torch.bfloat16, seconds=0.02)
    assert set(found) == set(formats)
    assert all(1e6 < rate < 1e16 for rate in found.values())
