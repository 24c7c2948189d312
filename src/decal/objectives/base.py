"""The objective protocol: from logits and a batch to a loss sum. Knows no models.

An objective is a module with these three functions; `OBJECTIVES` names it.
"""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from decal.data.batch import Batch


class Objective(Protocol):
    """What training and evaluation ask of an objective."""

    def trained_positions(self, batch: Batch) -> Tensor:
        """Indices into the flattened batch at which logits are needed."""

    def loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Differentiable sum over the trained tokens, fp32 scalar."""

    def loss_per_sample(self, logits: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """Loss sum and trained tokens of every sample, without gradient."""
