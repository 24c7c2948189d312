"""Supervised fine-tuning: cross entropy of the trained tokens, in chunks. Knows no models.

For a trained token with logits z and target y the loss is

    l(z, y) = log sum_v exp(z_v) - z_y          dl/dz_v = softmax(z)_v - [v = y]

Losses are summed, never averaged: the caller divides by the trained tokens of the whole optimizer
step, so that micro-batches weigh as much as they hold.

Memory decides how this is written. With 4,096 trained tokens and 152,000 words, logits are 1.2 GB
in bf16; a plain `cross_entropy` on fp32 copies makes three more tensors of twice that size. Here
only logits at trained positions exist (`trained_positions` goes to transformers as
`logits_to_keep`), fp32 values live for one chunk of tokens at a time, forward keeps one
log-sum-exp per token, and backward writes the gradient over the logits. So the peak is the logits
once, in their own dtype.

The price: logits are consumed by backward. Whoever else needs them for its own backward gets
autograd's in-place error, not a wrong gradient. Leaf tensors are left alone, and get a copy.

Rejected: computing the gradient in forward (as fused linear losses do), which costs evaluation
twice and needs the upstream gradient to be known to be one; checkpointed chunks, which run the
log-softmax twice through autograd and keep its fp32 graph alive for a chunk.
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
    """Positions whose logits are needed, ascending int64, for `logits_to_keep`.

    Flat: the trained positions of the one row. Padded: columns in which any sample trains a token
    (transformers keeps the same columns of all rows; `trained_logits` picks from them).

    Raises:
        DataError: no token of the batch is trained.
    """
    if batch.trained == 0:
        raise DataError(f"no token is trained in a batch of rows {_rows(batch)}")
    return (batch.targets != IGNORE).any(dim=0).nonzero().squeeze(1)


def trained_logits(logits: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
    """Logits and targets of the trained tokens.

    Args:
        logits: [1, K, V] or [n, K, V], computed at the K positions of `trained_positions(batch)`.
        batch: the batch they belong to, on any device.

    Returns:
        Logits [N, V] (a view for flat batches) and int64 targets [N], N = batch.trained, sample by
        sample in the order of `batch.rows`.
    """
    targets = batch.targets[:, trained_positions(batch)].to(logits.device)
    if logits.shape[:2] != targets.shape:
        raise ValueError(f"logits {tuple(logits.shape)} are not at positions {targets.shape}")
    if batch.layout == "flat":
        return logits[0], targets[0]
    chosen = targets != IGNORE
    return logits[chosen], targets[chosen]


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
        logits: [N, V] from `trained_logits`.
        batch: the batch they belong to.

    Returns:
        fp32 sums [n] (fp64 for fp64 logits) and int64 counts [n], in the order of `batch.rows`.
    """
    targets = batch.targets.to(logits.device)
    chosen = targets != IGNORE
    losses, _ = _token_losses(logits, targets[chosen])
    row, column = chosen.nonzero(as_tuple=True)
    if batch.cu_seq_lens is not None:
        ends = batch.cu_seq_lens[1:].to(logits.device, torch.int64)
        row = torch.searchsorted(ends, column, right=True)
    sums = losses.new_zeros(len(batch.rows)).index_add_(0, row, losses)
    return sums, torch.bincount(row, minlength=len(batch.rows))


class _SummedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor) -> Tensor:
        losses, lse = _token_losses(logits, targets)
        ctx.save_for_backward(logits, targets, lse)
        ctx.may_overwrite = not logits.is_leaf
        return losses.sum()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None]:
        logits, targets, lse = ctx.saved_tensors
        gradient = logits if ctx.may_overwrite else torch.empty_like(logits)
        weight = upstream * (targets != IGNORE)
        for part in _chunks(logits):
            z = logits[part].to(lse.dtype, copy=True)
            z.sub_(lse[part, None]).exp_()
            one = z.new_full((1, 1), -1.0).expand(z.shape[0], 1)
            z.scatter_add_(1, targets[part, None].clamp(min=0), one)
            gradient[part] = z.mul_(weight[part, None])
        return gradient, None


def _token_losses(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Loss and log-sum-exp of every token, [N] each, in fp32 (or fp64)."""
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    lse = torch.empty(logits.shape[0], dtype=dtype, device=logits.device)
    for part in _chunks(logits):
        lse[part] = logits[part].to(dtype).logsumexp(1)
    picked = logits.gather(1, targets.clamp(min=0)[:, None]).squeeze(1).to(dtype)
    return (lse - picked).masked_fill(targets == IGNORE, 0.0), lse


def _chunks(logits: Tensor) -> list[slice]:
    """Slices of tokens with about CHUNK_ELEMENTS logits each, at least one token."""
    limit = CHUNK_ELEMENTS["cpu" if logits.device.type == "cpu" else "other"]
    step = max(1, limit // logits.shape[1])
    return [slice(i, i + step) for i in range(0, logits.shape[0], step)]


def _rows(batch: Batch) -> str:
    shown = ", ".join(map(str, batch.rows[:5]))
    return shown + (", …" if len(batch.rows) > 5 else "")
