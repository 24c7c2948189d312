"""The objective protocol: from logits and a batch to a loss sum. Knows no models.

An objective is a module with these names; `OBJECTIVES` lists it. Losses are summed over what
counts (tokens or rows), and divided by the caller.
"""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from decal.data.batch import Batch


class Objective(Protocol):
    """What training and evaluation ask of an objective."""

    @property
    def POOLS(self) -> bool:  # noqa: N802 a constant of the module
        """Whether the model gives one row of logits per sample, from padded batches."""
        ...

    def trained_positions(self, batch: Batch) -> Tensor:
        """Ascending int64 [N]: where logits are needed.

        Indices into the flattened batch; samples where the objective pools.
        """

    def targets(self, batch: Batch) -> Tensor:
        """int64 [N]: what the logits at `trained_positions` must say."""

    def loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Differentiable sum over the N positions, fp32 scalar, of logits [N, V]."""
