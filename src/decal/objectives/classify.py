"""Sequence classification: cross entropy of one label per sample. Knows no models.

For a sample with logits z and label y the loss is log sum_c exp(z_c) - z_y, summed over samples
and divided by the caller, like that of sft.

`scores` judges predictions. Macro-F1 is the plain mean of the classes' F1 = 2 tp / (2 tp + fp + fn)
over the classes that occur among labels or predictions, so that a rare class counts as much as a
frequent one, and one that nobody mentions not at all.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from decal.data.batch import Batch
from decal.errors import DataError

POOLS = True
projected_losses = None
"""Logits are few: one row per sample, one number per class."""


def trained_positions(batch: Batch) -> Tensor:
    """int64 [n]: every sample. Raises DataError if the batch has no labels."""
    labels = targets(batch)
    return torch.arange(len(labels), device=labels.device)


def targets(batch: Batch) -> Tensor:
    """int64 [n]: the samples' labels. Raises DataError if the batch has none."""
    if batch.labels is None:
        raise DataError(
            "the rows have no labels to classify", hint="use `objective: sft`, or rows with labels"
        )
    return batch.labels


def losses(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross entropy of every sample, [n] in fp32 (fp64 for fp64 logits).

    Args:
        logits: [n, classes], any floating dtype.
        targets: int64 [n].
    """
    wide = torch.promote_types(logits.dtype, torch.float32)
    return torch.nn.functional.cross_entropy(logits.to(wide), targets, reduction="none")


def scores(predicted: Sequence[int], labels: Sequence[int]) -> dict[str, float]:
    """`accuracy` and `macro_f1` of predicted classes; both lists have one entry per sample."""
    pairs = list(zip(predicted, labels, strict=True))
    found = []
    for c in {*predicted, *labels}:
        hits = sum(p == y == c for p, y in pairs)
        wrong = sum((p == c) != (y == c) for p, y in pairs)
        found.append(2 * hits / (2 * hits + wrong))
    return {
        "accuracy": sum(p == y for p, y in pairs) / len(pairs),
        "macro_f1": sum(found) / len(found),
    }
