"""Attention on flattened batches, and the probe that proves it does not leak.

A flattened batch holds several samples one after the other in one row. Attention must not look
across their borders. transformers lets a project register its own attention function; ours gets
`cu_seq_lens` as a keyword argument of the forward pass and works sequence by sequence. Restarted
position ids alone are not enough: most architectures then build a mask that leaks.

Outside a flattened forward the registered function is transformers' own SDPA with its own mask, so
that `generate` and padded batches run as they always do. Soft caps and sinks, which SDPA does not
know (it refuses them, or older versions pass over them in silence), are computed here.

Architectures that do not ask for a registered function (BLOOM, Falcon, state spaces, remote code)
and classifiers, which pool a sample's positions, are not flattened.

Rejected: a block-diagonal mask for SDPA. It is T x T for T tokens of the whole micro-batch, and the
work grows with T squared instead of with the squares of the samples' lengths.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from decal.data.batch import Batch
from decal.errors import BaseModelError
from decal.kernels.ops import attention_flat, attention_masked
from decal.model.heads import labels_of

NAME = "decal_flat"

_FLAT: ContextVar[bool] = ContextVar("decal_flat", default=False)


def _attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """query [1, Hq, T, D], key and value [1, Hk, T, D] -> [1, T, Hq, D]."""
    cu_seq_lens = kwargs.get("cu_seq_lens_q")
    scale = kwargs.get("scaling") or query.shape[-1] ** -0.5
    softcap, sinks = kwargs.get("softcap"), kwargs.get("s_aux")
    if cu_seq_lens is None:
        if softcap is None and sinks is None:
            return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
        visible = _visible(query, key) if attention_mask is None else attention_mask
        out = attention_masked(query, key, value, visible, scale, softcap, sinks)
        return out.transpose(1, 2), None
    if kwargs.get("dropout"):
        raise BaseModelError(
            f"`{type(module).__name__}` asks for dropout inside attention",
            hint="set the base's attention_dropout to 0; adapters have their own lora_dropout",
        )
    out = attention_flat(
        query[0].transpose(0, 1),
        key[0].transpose(0, 1),
        value[0].transpose(0, 1),
        cu_seq_lens,
        scale=scale,
        window=kwargs.get("sliding_window"),
        softcap=softcap,
        sinks=sinks,
    )
    return out.unsqueeze(0), None


def _visible(query: Tensor, key: Tensor) -> Tensor:
    """bool [1, 1, S, L]: causal, where transformers needs no mask to say so."""
    length, held = query.shape[2], key.shape[2]
    return torch.ones(1, 1, length, held, dtype=torch.bool, device=query.device).tril(held - length)


def _mask(*args: Any, **kwargs: Any) -> Tensor | None:
    return None if _FLAT.get() else sdpa_mask(*args, **kwargs)


AttentionInterface.register(NAME, _attend)
AttentionMaskInterface.register(NAME, _mask)


@contextmanager
def flat_attention(model: PreTrainedModel) -> Iterator[None]:
    """Switches `model` to attention that honours `cu_seq_lens`, and back at the end."""
    before = model.config._attn_implementation
    model.set_attn_implementation(NAME)
    try:
        yield
    finally:
        model.set_attn_implementation(before)


def honour_soft_caps(model: PreTrainedModel) -> None:
    """Takes a model with soft-capped scores off SDPA, where older transformers drop the cap."""
    capped = getattr(model.config.get_text_config(), "attn_logit_softcapping", None)
    if capped and model.config._attn_implementation == "sdpa":
        model.set_attn_implementation("eager")


def forward(model: PreTrainedModel, batch: Batch, keep: Tensor | None = None) -> Tensor:
    """Logits of a micro-batch.

    Args:
        model: a causal language model of transformers; for flat batches inside `flat_attention`.
        batch: flat ([1, T]) or padded ([n, S]).
        keep: int64 [N], ascending indices into the flattened batch whose logits are wanted. The
            head runs on these alone where the architecture can (for padded batches on the columns
            that hold any of them).

    Returns:
        [N, V] with `keep`, else [1, T, V] or [n, S, V], in the compute dtype.
    """
    kwargs: dict[str, Any] = {
        "input_ids": batch.input_ids,
        "use_cache": False,
    }
    width = batch.input_ids.shape[1]
    columns = row = None
    if keep is not None:
        columns, row = (keep % width).unique(), keep // width
        if _keeps_logits(model):
            kwargs["logits_to_keep"] = columns
    if batch.layout == "padded":
        # The architecture numbers the positions itself; not every one begins at 0.
        logits = model(attention_mask=batch.attention, **kwargs).logits
    else:
        kwargs["position_ids"] = batch.positions
        kwargs |= {"cu_seq_lens_q": batch.cu_seq_lens, "cu_seq_lens_k": batch.cu_seq_lens}
        kwargs |= {"max_length_q": batch.max_length, "max_length_k": batch.max_length}
        token = _FLAT.set(True)
        try:
            logits = model(**kwargs).logits
        finally:
            _FLAT.reset(token)
    if keep is None or columns is None:
        return logits
    if "logits_to_keep" not in kwargs:
        return logits[row, keep % width]
    if batch.layout == "flat":
        return logits[0]
    return logits[row, torch.searchsorted(columns, keep % width)]


def head_rows(batch: Batch, keep: Tensor) -> Tensor:
    """int64: rows of the flattened batch that reach the head in `forward` with `keep`."""
    if batch.layout == "flat":
        return keep
    n, width = batch.input_ids.shape
    firsts = torch.arange(n, device=keep.device)[:, None] * width
    return (firsts + (keep % width).unique()).flatten()


def _keeps_logits(model: PreTrainedModel) -> bool:
    return "logits_to_keep" in inspect.signature(type(model).forward).parameters


def leak(model: PreTrainedModel) -> float:
    """How far flattening moves the logits of two samples from those that each has alone.

    The samples run flattened through our attention, and alone through the model's own: a mask that
    ours cannot see (chunks, linear biases) shows as well as a leak does. Returns the largest
    difference relative to the largest logit's size; infinity for an architecture that refuses
    flattened samples. Rounding gives about 1e-2 in bfloat16 and 1e-5 in float32; a leak gives 0.1
    and more.

    Raises:
        BaseModelError: the model cannot even compute the logits of a single sample.
    """
    config = model.config.get_text_config()
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(0)
    lengths = (9, 13)
    ids = torch.randint(0, config.vocab_size, (1, sum(lengths)), generator=generator).to(device)
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            parts = ids.split(lengths, dim=1)
            alone = [model(input_ids=part, use_cache=False).logits for part in parts]
            with flat_attention(model):
                together = _flat_logits(model, _batch(ids, lengths))
    except (AttributeError, TypeError) as error:
        raise BaseModelError(
            f"{type(model).__name__} cannot compute logits: {error}",
            hint="it may read the weights of its layers itself: name them in"
            " adapter.exclude_modules and quant.skip_modules",
        ) from error
    finally:
        model.train(was_training)
    if together is None:
        return float("inf")
    apart = torch.cat(alone, dim=1)
    return float((together - apart).abs().max().double() / apart.abs().max())


def _flat_logits(model: PreTrainedModel, batch: Batch) -> Tensor | None:
    """None where the architecture raises, as linear attention without its kernels does."""
    try:
        return forward(model, batch)
    except (ValueError, TypeError, NotImplementedError):
        return None


@dataclass(frozen=True)
class Flattening:
    """Whether flattened batches give a model the logits that its samples have alone."""

    works: bool
    leak: float | None = None
    """What the probe measured, see `leak`; None where the architecture rules flattening out."""


def flattening(model: PreTrainedModel) -> Flattening:
    """Probes `model`, unless its kind alone says that flattened batches cannot work."""
    if labels_of(model) is not None or not model._can_set_attn_implementation():
        return Flattening(False)
    if getattr(model.config.get_text_config(), "attention_chunk_size", None):
        return Flattening(False)  # in the mask alone, and wider than the probe's samples
    dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())
    found = leak(model)
    return Flattening(found < {torch.float64: 1e-6, torch.float32: 1e-3}.get(dtype, 5e-2), found)


def flattens(model: PreTrainedModel) -> bool:
    """Whether flattened batches give `model` the logits that its samples have alone."""
    return flattening(model).works


def _batch(ids: Tensor, lengths: tuple[int, ...]) -> Batch:
    ends = torch.tensor((0, *lengths)).cumsum(0)
    positions = torch.cat([torch.arange(n) for n in lengths])[None].to(ids.device)
    return Batch(
        layout="flat",
        input_ids=ids,
        targets=torch.full_like(ids, -100),
        positions=positions,
        attention=None,
        cu_seq_lens=ends.to(dtype=torch.int32, device=ids.device),
        max_length=max(lengths),
        sample_ids=torch.zeros_like(ids),
        rows=tuple(range(len(lengths))),
        trained=0,
        tokens=ids.numel(),
    )
