"""Cross-entropy over rows of logits, in plain torch: the specification and the fallback.

Knows tensors only: neither the head that made the logits nor how losses are averaged.

    loss = log(sum_v exp(logits[v])) - logits[target]      d loss / d logits = softmax - onehot

The gradient, if wanted, takes the place of the logits: [T, V] is the largest tensor of a step, and
nothing else needs it afterwards. A caller with weights per row scales what comes next.
"""

from __future__ import annotations

from torch import Tensor

from decal.kernels.precision import wide

IGNORED = -100
"""The target of a row that has no loss."""
_CHUNK = 1 << 22
"""Logits that are float32 at the same time."""


def softmax_loss(logits: Tensor, targets: Tensor, gradient: bool) -> Tensor:
    """The loss of every row.

    Args:
        logits: [T, V]; with `gradient` overwritten by softmax - onehot, rounded once to its dtype.
        targets: int64 [T], in [0, V) or `IGNORED`: loss 0 and gradient 0.
        gradient: whether to overwrite.

    Returns:
        float32 [T]; float64 where logits are.
    """
    losses = wide(logits.new_empty(logits.shape[0]))
    size = max(1, _CHUNK // max(1, logits.shape[1]))
    for start in range(0, logits.shape[0], size):
        rows = slice(start, start + size)
        ignored = targets[rows] == IGNORED
        at = targets[rows].masked_fill(ignored, 0)[:, None]
        log_share = wide(logits[rows]).log_softmax(1)
        losses[rows] = (-log_share.gather(1, at)[:, 0]).masked_fill(ignored, 0)
        if gradient:
            share = log_share.exp_()
            share.scatter_add_(1, at, share.new_full((), -1.0).expand_as(at))
            logits[rows] = share.masked_fill_(ignored[:, None], 0)
    return losses
