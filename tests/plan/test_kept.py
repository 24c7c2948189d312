"""What is kept for backward: the formula against what autograd really saved, on the CPU."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from decal.adapters import DropoutKey, Routing, routed
from decal.config import LoraConfig
from decal.data.batch import Batch
from decal.data.pack import flat_batch
from decal.data.sample import Sample
from decal.model import attention, switches
from decal.model.inject import attach
from decal.plan.kept import kept, outside
from decal.plan.setup import Load, Setup
from decal.plan.structure import Trained
from decal.verbs.structure import as_meta, structure_of, with_kept
from tests.zoo import build

TOKENS = 96


def batch() -> Batch:
    ids = np.arange(TOKENS // 2, dtype=np.int32) % 200 + 5
    rows = [Sample(row=i, input_ids=ids, trained=np.ones(len(ids), bool)) for i in range(2)]
    return flat_batch(rows)


def saved(model: Any) -> int:
    """Bytes of all storages that a pass saves, parameters apart; copies of factors are not saved
    as tensors and do not count."""
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    found: dict[int, Any] = {}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in own:
            found[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    rows = batch()
    key = DropoutKey(0, 0, rows.sample_ids.flatten(), rows.positions.flatten())
    hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t)
    model.train()
    routing = routed(Routing((("default", 1.0),), key))
    with attention.flat_attention(model), switches.without_dropout(model), hooks, routing:
        logits = attention.forward(model, rows)
    total = sum(storage.nbytes() for storage in found.values())
    del logits
    return total


def setup(model: Any, what: str, dtype: str = "bfloat16", **more: Any) -> Setup:
    structure = structure_of(model, "tiny")
    names = [linear.name for layer in structure.layers for linear in layer.linears]
    ranks = dict.fromkeys(names, 4) if what == "lora" else {}
    skeleton = as_meta(model.config)
    return Setup(
        structure=with_kept(structure, skeleton, dtype, what),
        trained=Trained(ranks=ranks, parameters=1, whole=what == "full"),
        load=Load(tokens=TOKENS, trained=TOKENS, several=False),
        dtype=dtype,
        **more,
    )


@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3", "mistral"])
def test_fused_layers_keep_what_the_formula_says(name: str) -> None:
    """To the byte, apart from what autograd does not see: copies of factors and dropout's words.

    Mutations: forget h, the attention's output, gate or up; count k and v once; leave
    out the norms of heads in Qwen3; forget z or the words of dropout."""
    model = build(name, dtype=torch.bfloat16)
    asked = setup(model, "lora")
    attach(model, LoraConfig(r=4, lora_dropout=0.1))
    assert set(model.decal_adapters.fused.values()) == {""}, model.decal_adapters.fused
    groups = [linears for layer in asked.structure.layers for linears in layer.groups.values()]
    casts = sum(2 * p.numel() for p in model.parameters() if p.requires_grad)
    words = sum(8 * TOKENS + 4 * linears[0].columns for linears in groups)
    last_norm = 4 * TOKENS * (asked.structure.hidden + 1)
    assert saved(model) - last_norm == sum(kept(asked)) - casts - words


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("name", ["llama", "qwen2", "gpt2", "gemma", "phi3"])
def test_every_weight_trained_keeps_what_the_skeleton_says(name: str, dtype: str) -> None:
    """Layers of transformers itself, to 8 %. Mutations: count parameters; forget a dtype's width;
    count attention's scores; measure with weights frozen."""
    model = build(name, dtype=getattr(torch, dtype))
    asked = setup(model, "full", dtype)
    model.requires_grad_(True)
    hidden = asked.structure.hidden
    head = TOKENS * hidden * (8 + asked.itemsize)
    assert saved(model) == pytest.approx(sum(kept(asked)) + head, rel=0.08)


def test_checkpointing_and_ids_grow_with_the_tokens() -> None:
    """Mutation: leave the ids out of what is kept outside the layers."""
    asked = setup(build("llama", dtype=torch.bfloat16), "lora")
    assert outside(asked) > TOKENS * (32 + 4 * asked.structure.hidden)
