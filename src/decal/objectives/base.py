"""The objective protocol: from logits, or what a head projects to them, to losses. No models.

An objective is a module with these names; `OBJECTIVES` lists it. Every token or row that counts has
a loss; callers add up those of a micro-batch, or of each adapter's part of it, and divide.
"""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from decal.data.batch import Batch
from decal.kernels.stored import Stored


class ProjectedLosses(Protocol):
    """`Objective.losses` of the logits hidden W^T + bias, without making them as a whole."""

    def __call__(
        self, hidden: Tensor, head: Stored, bias: Tensor | None, targets: Tensor
    ) -> Tensor:
        """Hidden [N, H], frozen W [V, H] and bias [V] -> as `Objective.losses`."""


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

    def losses(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Differentiable fp32 [N] of logits [N, V]: the loss of every position."""

    @property
    def projected_losses(self) -> ProjectedLosses | None:
        """The same from hidden states; None where logits are few and need no such care."""
        ...
