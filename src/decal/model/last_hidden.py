"""What reaches the head of a causal language model, for losses that need no logits as a whole.

With a vocabulary of 152,000 words the logits of 1,000 tokens are 310 MB, and their gradient as
much. A loss that knows the head (`Objective.projected_losses`) makes them a chunk at a time. For
this the head must be a plain frozen projection, and its output the logits: nothing scaled, capped
or masked after it.

The hidden states come from the model's own forward pass, in which the head answers with its input.
So whatever the architecture does before the head (a last norm, a projection, a scale) is done, and
only the rows that `attention.forward` keeps are computed.

That nothing is done after the head is proven by trial, once for a model (`plain_head`): in two
passes of a few tokens the head answers with random numbers, and the model must return these very
numbers, bit by bit. They are large, so that a cap shows however small the model's own logits are,
and have the head's width in one pass, its input's in the other.

Rejected: the base model's `last_hidden_state`. Where the head gets something else (scaled hidden
states, a part of them), no comparison of logits tells that from rounding in bfloat16: capping at 30
moves logits of 3 by less. Rejected as well: names of settings that scale or cap; each family has
its own.

Knows no objectives.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from decal.adapters.layer import watched
from decal.adapters.views import LinearView
from decal.data.batch import Batch
from decal.kernels.stored import Stored
from decal.model import attention
from decal.quant.linear import QuantLinear

_LARGE = 1e4
"""Of the planted numbers; float16 holds four times their deviation and more."""


@dataclass(frozen=True)
class PlainHead:
    """A head that is x W^T + b with W and b frozen, and whose output the model returns."""

    layer: nn.Linear | QuantLinear
    weight: Stored
    """[V, H]"""
    bias: Tensor | None
    """[V]"""


def plain_head(model: PreTrainedModel) -> PlainHead | None:
    """The model's head if it is plain, else None. Runs the model on three tokens, twice.

    Holds for as long as no adapter is attached, nothing unfrozen and the model not moved.
    """
    head: Any = model.get_output_embeddings()
    if not _projects(head) or not _returned(model, head):
        return None
    return PlainHead(head, _stored(head), head.bias)


def forward(model: PreTrainedModel, head: PlainHead, batch: Batch, keep: Tensor) -> Tensor:
    """Hidden states [N, H] from which `head` makes the logits of `attention.forward`.

    Args:
        model: the model that `head` belongs to; for flat batches inside `flat_attention`.
        batch: flat ([1, T]) or padded ([n, S]).
        keep: int64 [N], ascending indices into the flattened batch.
    """
    with _answering(head.layer, lambda x: x):
        return attention.forward(model, batch, keep)


def _projects(head: Any) -> bool:
    """Whether calling the layer is nothing but a product with a frozen weight, always the same."""
    if type(head) is not nn.Linear and type(head) is not QuantLinear:
        return False
    if watched(head) or any(p.requires_grad for p in head.parameters()):
        return False
    # LLM.int8 quantizes activations as well where nothing is trained.
    return _stored(head).format != "rows8"


def _stored(head: nn.Linear | QuantLinear) -> Stored:
    return head.stored() if isinstance(head, QuantLinear) else LinearView(head).stored()


@torch.no_grad()
def _returned(model: PreTrainedModel, head: nn.Linear | QuantLinear) -> bool:
    """Whether the model returns what its head answers, untouched and as its logits."""
    was_training = model.training
    model.eval()
    try:
        return all(_passes(model, head, n) for n in (head.out_features, head.in_features))
    except Exception:  # whatever the model's own code raises for logits of another width
        return False
    finally:
        model.train(was_training)


def _passes(model: PreTrainedModel, head: nn.Module, width: int) -> bool:
    """Whether numbers that the head answers with, [1, 3, width], come out as the logits."""
    ids = torch.arange(3, device=model.device)[None]
    planted = _LARGE * torch.randn(1, 3, width, generator=torch.Generator().manual_seed(0))
    answers: list[Tensor] = []

    def answer(x: Tensor) -> Tensor:
        answers.append(planted.to(x))
        return answers[-1]

    with _answering(head, answer):
        mask = torch.ones_like(ids)
        logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
    [answered] = answers
    return logits.dtype == answered.dtype and torch.equal(logits, answered)


@contextmanager
def _answering(head: nn.Module, answer: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Inside the block the head gives `answer(x)` instead of computing."""
    own: dict[str, Any] = head.__dict__
    own["forward"] = answer
    try:
        yield
    finally:
        del own["forward"]
