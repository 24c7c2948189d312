"""What transformers' own layers keep for backward, counted on a skeleton without memory.

Every architecture keeps other tensors, and nowhere is it written which. So a pass runs on the meta
device, where tensors have shapes and no data, and whatever autograd saves is counted: once per
storage, parameters and buffers apart. What three layers keep beyond one is that of two. Attention
is a stand-in that keeps what the kernels of a real pass keep, q, k, v, its output and a number per
row and head; torch's own on this device would write out all scores.

Works on skeletons only. Knows no formats: a frozen packed weight keeps what a frozen one does.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function
from transformers import AttentionInterface

from decal.model import switches

_NAME = "decal-counted"
_TOKENS = 32


def bytes_per_token(skeleton: Any) -> float | None:
    """Bytes that a decoder layer keeps for a token, as the model stands: frozen, adapted, dtype.

    The mean of the second and third layer, where there are as many. None for an architecture
    without a list of layers, or whose forward pass needs data.
    """
    layers = layers_of(skeleton)
    if layers is None or not skeleton._can_set_attn_implementation():
        return None
    training, attention = skeleton.training, skeleton.config._attn_implementation
    try:
        with switches.without_dropout(skeleton):
            skeleton.train()
            skeleton.set_attn_implementation(_NAME)
            few, many = min(1, len(layers) - 1), min(3, len(layers))
            found = []
            for count in (few, many):
                with _cut(layers, count):
                    found.append(_saved(skeleton))
    except Exception:  # whatever an architecture raises that asks a tensor for its values
        return None
    finally:
        skeleton.train(training)
        skeleton.set_attn_implementation(attention)
    return (found[1] - found[0]) / (many - few) / _TOKENS


def layers_of(model: nn.Module) -> nn.ModuleList | None:
    """The model's decoder layers: its longest list of modules."""
    lists = [m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m)]
    return max(lists, key=len) if lists else None


@contextmanager
def _cut(layers: nn.ModuleList, count: int) -> Iterator[None]:
    """Inside the block the list has its first `count` modules only."""
    every = dict(layers._modules)
    layers._modules = {key: every[key] for key in list(every)[:count]}
    try:
        yield
    finally:
        layers._modules = every


def _saved(skeleton: Any) -> int:
    own = {_storage(t) for t in (*skeleton.parameters(), *skeleton.buffers())}
    found: dict[int, Any] = {}

    def pack(tensor: Tensor) -> Tensor:
        key = _storage(tensor)
        if key not in own:
            found[key] = tensor.untyped_storage()  # held, so that the key is not used again
        return tensor

    hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t)
    with torch.device("meta"), torch.enable_grad(), hooks:
        ids = torch.zeros(1, _TOKENS, dtype=torch.int64)
        # Given whole: made from anything smaller, it would be looked at.
        seen = torch.ones(1, 1, _TOKENS, _TOKENS, dtype=torch.bool)
        kept = skeleton(input_ids=ids, attention_mask=seen, use_cache=False).logits
    del kept
    return sum(storage.nbytes() for storage in found.values())


def _storage(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


class _Attended(Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:  # type: ignore[override]
        out = q.new_empty(q.shape[0], q.shape[2], q.shape[1], v.shape[3])
        ctx.save_for_backward(q, k, v, out, q.new_empty(q.shape[:3], dtype=torch.float32))
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, None, None]:  # type: ignore[override]
        return None, None, None


def _attend(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any
) -> tuple[Tensor, None]:
    return _Attended.apply(query, key, value), None


AttentionInterface.register(_NAME, _attend)
