"""Cross-entropy over rows of logits, in plain torch: the specification and the fallback.

Knows tensors only: neither the head that made the logits nor how losses are averaged.

    loss = log(sum_v exp(logits[v])) - logits[target]      d loss / d logits = softmax - onehot

The gradient, if wanted, takes the place of the logits: [T, V] is the largest tensor of a step, and
nothing else needs it afterwards. A caller with weights per row scales what comes next.

The loss is how far the target's logit is below the largest, less the logarithm of the largest one's
share, which is never small: one exponential serves loss and gradient.
"""

from __future__ import annotations

from torch import Tensor

from decal.kernels.precision import chunks, wide

IGNORED = -100
"""The target of a row that has no loss."""


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
    for rows in chunks(logits):
        ignored = targets[rows] == IGNORED
        at = targets[rows].masked_fill(ignored, 0)[:, None]
        values = wide(logits[rows])
        share = values.softmax(1)
        below = values.amax(1) - values.gather(1, at)[:, 0]
        losses[rows] = (below - share.amax(1).log_()).masked_fill_(ignored, 0)
        if gradient:
            share.scatter_add_(1, at, share.new_full((), -1.0).expand_as(at))
            logits[rows] = share.index_fill_(0, ignored.nonzero()[:, 0], 0.0)
    return losses
