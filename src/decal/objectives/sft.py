"""Supervised fine-tuning: cross entropy of the trained tokens, in chunks. Knows no models.

For a trained token with logits z and target y the loss is

    l(z, y) = log sum_v exp(z_v) - z_y          dl/dz_v = softmax(z)_v - [v = y]

Losses are summed, never averaged: the caller divides by the trained tokens of the whole optimizer
step, so that micro-batches weigh as much as they hold.

Memory decides how this is written. With 4,096 trained tokens and 152,000 words, logits are 1.2 GB
in bf16; a plain `cross_entropy` on fp32 copies makes three more tensors of twice that size. Here
logits exist at trained positions only (`trained_positions`), fp32 values live for one chunk of
tokens at a time, forward keeps two numbers per token (the highest logit, and the log of the sum of
exponentials relative to it: their sum alone would lose the small losses of large logits), and
backward writes the gradient over the logits. So the peak is the logits once, in their own dtype.

The price: logits are consumed by backward. Whoever else needs them for its own backward gets
autograd's in-place error, not a wrong gradient. Leaf tensors are left alone, and get a copy.

Rejected: computing the gradient already in forward (as fused linear losses do), which makes
evaluation pay for it; checkpointed chunks, which run the log-softmax twice through autograd.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from decal.data.batch import IGNORE, Batch
from decal.errors import DataError

CHUNK_ELEMENTS = {"cpu": 2**21, "other": 2**25}
"""Logits per chunk: 8 MB of fp32 stay near the CPU's caches, 128 MB keep a GPU busy."""


def trained_positions(batch: Batch) -> Tensor:
    """Positions whose logits are needed, ascending int64 [N] with N = batch.trained.

    They index the flattened batch: in a flat one the positions of the one row, for transformers'
    `logits_to_keep`; in a padded one `sample * S + position`. So `batch.targets.flatten()` at these
    indices are the targets that `loss` wants.

    Raises:
        DataError: no token of the batch is trained.
    """
    if batch.trained == 0:
        raise DataError(f"no token is trained in a batch of rows {_rows(batch)}")
    return (batch.targets.flatten() != IGNORE).nonzero().squeeze(1)


def loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross entropy summed over tokens, computed and summed in fp32 (fp64 for fp64 logits).

    Args:
        logits: [N, V], any floating dtype. Backward overwrites them unless they are a leaf.
        targets: int64 [N]; IGNORE counts nothing.

    Returns:
        A scalar. Its gradient reaches `logits` in their own dtype, rounded once.

    Raises:
        DataError: there are no tokens.
    """
    if logits.shape[0] == 0:
        raise DataError("no token is trained in a batch")
    total: Tensor = _SummedCrossEntropy.apply(logits, targets)  # type: ignore[no-untyped-call]
    return total


@torch.no_grad()
def loss_per_sample(logits: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
    """Loss sums and trained tokens of every sample, for evaluation.

    Args:
        logits: [N, V] at `trained_positions(batch)`.
        batch: the batch they belong to.

    Returns:
        fp32 sums [n] (fp64 for fp64 logits) and int64 counts [n], in the order of `batch.rows`.
    """
    targets = batch.targets.to(logits.device)
    chosen = targets != IGNORE
    losses, _, _ = _token_losses(logits, targets[chosen])
    row, column = chosen.nonzero(as_tuple=True)
    if batch.cu_seq_lens is not None:
        ends = batch.cu_seq_lens[1:].to(logits.device, torch.int64)
        row = torch.searchsorted(ends, column, right=True)
    sums = losses.new_zeros(len(batch.rows)).index_add_(0, row, losses)
    return sums, torch.bincount(row, minlength=len(batch.rows))


class _SummedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor) -> Tensor:
        losses, highest, log_sum = _token_losses(logits, targets)
        ctx.save_for_backward(logits, targets, highest, log_sum)
        ctx.may_overwrite = not logits.is_leaf
        return losses.sum()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None]:
        logits, targets, highest, log_sum = ctx.saved_tensors
        gradient = logits if ctx.may_overwrite else torch.empty_like(logits)
        weight = upstream * (targets != IGNORE)
        for part in _chunks(logits):
            z = logits[part].to(log_sum.dtype, copy=True)
            z.sub_(highest[part, None]).sub_(log_sum[part, None]).exp_()
            one = z.new_full((1, 1), -1.0).expand(z.shape[0], 1)
            z.scatter_add_(1, targets[part, None].clamp(min=0), one)
            gradient[part] = z.mul_(weight[part, None])
        return gradient, None


def _token_losses(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, highest logit m, and log sum exp(z - m) of every token, [N] each, in fp32 (or fp64)."""
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    losses, highest, log_sum = torch.empty(3, len(logits), dtype=dtype, device=logits.device)
    index = targets.clamp(min=0)[:, None]
    for part in _chunks(logits):
        z = logits[part].to(dtype, copy=True)
        highest[part] = z.amax(1)
        z.sub_(highest[part, None])
        losses[part] = z.gather(1, index[part]).squeeze(1).neg_()
        log_sum[part] = z.exp_().sum(1).log_()
    losses.add_(log_sum).masked_fill_(targets == IGNORE, 0.0)
    return losses, highest, log_sum


def _chunks(logits: Tensor) -> list[slice]:
    """Slices of tokens with about CHUNK_ELEMENTS logits each, at least one token."""
    limit = CHUNK_ELEMENTS["cpu" if logits.device.type == "cpu" else "other"]
    step = max(1, limit // logits.shape[1])
    return [slice(i, i + step) for i in range(0, logits.shape[0], step)]


def _rows(batch: Batch) -> str:
    shown = ", ".join(map(str, batch.rows[:5]))
    return shown + (", …" if len(batch.rows) > 5 else "")
