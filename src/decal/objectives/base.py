"""The objective protocol: from logits, or what a head projects to them, to a loss sum. No models.

An objective is a module with these names; `OBJECTIVES` lists it. Losses are summed over what
counts (tokens or rows), and divided by the caller.
"""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from decal.data.batch import Batch
from decal.kernels.stored import Stored


class ProjectedLoss(Protocol):
    """`Objective.loss` of the logits hidden W^T + bias, without making them as a whole."""

    def __call__(
        self, hidden: Tensor, head: Stored, bias: Tensor | None, targets: Tensor
    ) -> Tensor:
        """Hidden [N, H], frozen W [V, H] and bias [V] -> as `Objective.loss`."""


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

    @property
    def projected_loss(self) -> ProjectedLoss | None:
        """The same from hidden states; None where logits are few and need no such care."""
        ...
