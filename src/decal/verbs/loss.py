"""The losses of a micro-batch: the one place where a model meets an objective.

Training, evaluation and measuring all come through here, so that what is reported is what was
trained. Knows no runs, no dropout and no switching of adapters: the caller routes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from decal.data.batch import Batch
from decal.kernels import ops
from decal.model import attention, heads, last_hidden
from decal.objectives import Objective

_ROWS = 64
"""Logits of so many tokens exist at a time where their likeliest is all that is wanted."""


def head_of(model: Any, objective: Objective) -> last_hidden.PlainHead | None:
    """What `batch_losses` needs to know of a model, found once; None where it needs logits."""
    return None if objective.projected_losses is None else last_hidden.plain_head(model)


def batch_losses(
    model: Any, batch: Batch, objective: Objective, head: last_hidden.PlainHead | None
) -> Tensor:
    """Of everything that the objective counts, differentiable, in the order of the batch.

    Args:
        model: for flat batches inside `attention.flat_attention`.
        batch: on the model's device.
        head: from `head_of` for this model as it stands, or None for losses of whole logits.

    Returns:
        float32 [batch.trained]; float64 for a model that computes in it.

    Raises:
        DataError: the batch holds nothing to learn.
    """
    keep, targets = objective.trained_positions(batch), objective.targets(batch)
    if head is not None and objective.projected_losses is not None:
        hidden = last_hidden.forward(model, head, batch, keep)
        return objective.projected_losses(hidden, head.weight, head.bias, targets)
    if objective.POOLS:
        return objective.losses(heads.forward(model, batch), targets)
    return objective.losses(attention.forward(model, batch, keep), targets)


@torch.no_grad()
def likeliest(
    model: Any, batch: Batch, objective: Objective, head: last_hidden.PlainHead | None
) -> Tensor:
    """int64 [N]: what the model holds most likely, wherever `batch_losses` has a loss."""
    keep = objective.trained_positions(batch)
    if objective.POOLS:
        return heads.forward(model, batch).argmax(-1)
    if head is None:
        return attention.forward(model, batch, keep).argmax(-1)
    hidden = last_hidden.forward(model, head, batch, keep)
    parts = hidden.split(_ROWS)
    return torch.cat([ops.project(part, head.weight, head.bias).argmax(-1) for part in parts])
