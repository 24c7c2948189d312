"""Supervised fine-tuning: cross entropy of the trained tokens, in chunks. Knows no models.

For a trained token with logits z and target y the loss is

    l(z, y) = log sum_v exp(z_v) - z_y          dl/dz_v = softmax(z)_v - [v = y]

Losses are never averaged here: the caller adds them up and divides by the trained tokens of the
whole optimizer step, so that micro-batches weigh as much as they hold.

Memory decides how this is written. With 4,096 trained tokens and 152,000 words, logits are 1.2 GB
in bf16; a plain `cross_entropy` on fp32 copies makes three more tensors of twice that size. Here
logits exist at trained positions only (`trained_positions`), fp32 values live for one chunk of
tokens at a time, forward keeps nothing, and backward recomputes the softmax chunk by chunk and
writes the gradient over the logits. So the peak is the logits once, in their own dtype, and the two
fused softmax kernels read them twice in all.

The price: logits are consumed by backward. Whoever else needs them for its own backward gets
autograd's in-place error, not a wrong gradient. Leaf tensors are left alone, and get a copy.

Where the head is a plain frozen projection z = h W^T + b, logits need not exist as a whole
(`projected_losses`). The gradient of a hidden state h, up to the factor that backward brings, is

    dl/dh = (softmax(z) - onehot(y)) W

and z is at hand when its loss is computed. So each chunk of tokens is projected, scored, turned
into softmax - onehot in place and multiplied with W again; what is kept for backward is dl/dh, of
the size of the hidden states. Evaluation skips the second half.

Rejected: the gradient in forward also for logits that others made, which makes evaluation pay for
it; checkpointed chunks, which run the log-softmax twice through autograd; chunks over words, which
read the hidden states once for each and need a second pass for the softmax.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from decal.data.batch import IGNORE, Batch
from decal.errors import DataError
from decal.kernels import ops
from decal.kernels.stored import Stored

POOLS = False
CHUNK_ELEMENTS = {"cpu": 2**22, "other": 2**25}
"""Logits per chunk: 16 MB of fp32 suit a CPU's caches and allocator, 128 MB keep a GPU busy."""
CHUNK_BYTES = 2**25 - 2**16
"""Of projected logits at a time, in one room for all chunks. glibc maps blocks of 32 MB for
themselves: their pages are cleared anew, which takes longer than reading the head once more."""
CHUNK_TOKENS = 256
"""But as many at least, so that reading the head costs little beside multiplying with it."""
APART = 32
"""Logits between rows: vocabularies are often multiples of 1,024, and rows that lie a multiple of
4 KB apart share few places of a cache."""


def trained_positions(batch: Batch) -> Tensor:
    """Positions whose logits are needed, ascending int64 [N] with N = batch.trained.

    They index the flattened batch: in a flat one the positions of the one row, for transformers'
    `logits_to_keep`; in a padded one `sample * S + position`. So `batch.targets.flatten()` at these
    indices are the targets that `losses` wants.

    Raises:
        DataError: no token of the batch is trained.
    """
    if batch.trained == 0:
        raise DataError(f"no token is trained in a batch of rows {_rows(batch)}")
    return (batch.targets.flatten() != IGNORE).nonzero().squeeze(1)


def targets(batch: Batch) -> Tensor:
    """int64 [N]: the tokens that the trained positions must predict."""
    return batch.targets.flatten()[trained_positions(batch)]


def losses(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross entropy of every token, computed in fp32 (fp64 for fp64 logits).

    Args:
        logits: [N, V], any floating dtype. Backward overwrites them unless they are a leaf.
        targets: int64 [N]; IGNORE counts nothing.

    Returns:
        [N]. Their gradient reaches `logits` in their own dtype, rounded once.

    Raises:
        DataError: there are no tokens.
    """
    if logits.shape[0] == 0:
        raise DataError("no token is trained in a batch")
    found: Tensor = _CrossEntropy.apply(logits, targets)  # type: ignore[no-untyped-call]
    return found


def projected_losses(hidden: Tensor, head: Stored, bias: Tensor | None, targets: Tensor) -> Tensor:
    """As `losses` of the logits hidden W^T + bias, a chunk of which exists at a time.

    Args:
        hidden: [N, H], any floating dtype; left as they are.
        head: W [V, H], frozen.
        bias: [V], frozen.
        targets: int64 [N]; IGNORE counts nothing.

    Returns:
        [N]. Their gradient reaches `hidden` in their dtype; between the two products it is rounded
        to it once per logit.

    Raises:
        DataError: there are no tokens.
    """
    if hidden.shape[0] == 0:
        raise DataError("no token is trained in a batch")
    wanted = hidden.requires_grad and torch.is_grad_enabled()
    found: Tensor = _ProjectedCrossEntropy.apply(  # type: ignore[no-untyped-call]
        hidden, head, bias, targets, wanted
    )
    return found


class _ProjectedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        head: Stored,
        bias: Tensor | None,
        targets: Tensor,
        wanted: bool,
    ) -> Tensor:
        words, step = head.shape[0], _step(hidden, head)
        room = hidden.new_empty(step, words + APART)
        losses, gradients = [], []
        for h, y in zip(hidden.split(step), targets.split(step), strict=True):
            logits = ops.project(h, head, bias, out=room[: h.shape[0], :words])
            losses.append(ops.softmax_loss(logits, y, wanted))
            if wanted:
                gradients.append(ops.project_back([(logits, head)]))
        if wanted:
            ctx.save_for_backward(torch.cat(gradients))
        return torch.cat(losses)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None, None, None, None]:
        (gradient,) = ctx.saved_tensors
        scaled = torch.mul(gradient, upstream[:, None], out=torch.empty_like(gradient))
        return scaled, None, None, None, None


def _step(hidden: Tensor, head: Stored) -> int:
    """Tokens of a chunk, about the same for all."""
    row = (head.shape[0] + APART) * hidden.element_size()
    most = max(CHUNK_TOKENS, CHUNK_BYTES // row)
    return math.ceil(hidden.shape[0] / math.ceil(hidden.shape[0] / most))


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor) -> Tensor:
        ctx.save_for_backward(logits, targets)
        ctx.may_overwrite = not logits.is_leaf
        return _token_losses(logits, targets)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None]:
        logits, targets = ctx.saved_tensors
        gradient = logits if ctx.may_overwrite else torch.empty_like(logits)
        weight = upstream * (targets != IGNORE)
        minus_one = weight.new_full((logits.shape[0], 1), -1.0)
        for part in _chunks(logits):
            p = torch.softmax(logits[part], 1, dtype=weight.dtype)
            p.scatter_add_(1, targets[part, None].clamp(min=0), minus_one[part])
            torch.mul(p, weight[part, None], out=gradient[part])
        return gradient, None


def _token_losses(logits: Tensor, targets: Tensor) -> Tensor:
    """Loss of every token, [N] in fp32 (or fp64)."""
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    losses = torch.empty(logits.shape[0], dtype=dtype, device=logits.device)
    for part in _chunks(logits):
        log_p = torch.log_softmax(logits[part], 1, dtype=dtype)
        losses[part] = -log_p.gather(1, targets[part, None].clamp(min=0)).squeeze(1)
    return losses.masked_fill_(targets == IGNORE, 0.0)


def _chunks(logits: Tensor) -> list[slice]:
    """Slices of tokens with about CHUNK_ELEMENTS logits each, at least one token."""
    limit = CHUNK_ELEMENTS["cpu" if logits.device.type == "cpu" else "other"]
    step = max(1, limit // logits.shape[1])
    return [slice(i, i + step) for i in range(0, logits.shape[0], step)]


def _rows(batch: Batch) -> str:
    shown = ", ".join(map(str, batch.rows[:5]))
    return shown + (", …" if len(batch.rows) > 5 else "")
