"""Putting the fused steps in the place of a decoder layer's forward, after proof, and back.

The module stays: its name, parameters, hooks and `__call__`. Only `forward` is shadowed on the
object, and every pass decides anew. The fused steps run for a flattened batch on a CPU, under our
attention, where each projection is frozen with at most one plain adapter acting on all rows;
anything else (a cache, padding, mixed rows, biases that are trained, autocast, hooks on a part, a
compiler) runs the layer's own forward, as if nothing were here.

Proof comes first, for every distinct kind of layer (`proof.py`). What does not agree keeps its own
forward, and the record says so.

Under gradient checkpointing the routing is looked up before the recomputed part begins.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from decal.adapters import RoutingState, current_routing
from decal.model import attention
from decal.model.blocks import FAMILIES
from decal.model.blocks.llama import Block, Plan, run
from decal.model.blocks.proof import ROOM, prove

_CALLS_CHECKPOINT = "__call__" in vars(GradientCheckpointingLayer)
"""Older transformers checkpoint around forward; newer ones inside it, where ours stands."""


def forward(layer: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
    """Stands in for a decoder layer's forward: fused where the pass allows it."""
    plan = None if args else _plan(layer, hidden_states, kwargs)
    if plan is None:
        return type(layer).forward(layer, hidden_states, *args, **kwargs)
    if not _CALLS_CHECKPOINT and layer.gradient_checkpointing and layer.training:
        return layer._gradient_checkpointing_func(partial(run, plan), hidden_states)
    return run(plan, hidden_states)


def _plan(layer: Any, x: Tensor, kwargs: dict[str, Any]) -> Plan | None:
    block: Block = layer.decal_block
    if (
        kwargs.get("cu_seq_lens_q") is None
        or kwargs.get("past_key_values") is not None
        or kwargs.get("output_attentions")
        or block.attention.config._attn_implementation != attention.NAME
        or x.device.type != "cpu"
        or x.dtype not in ROOM
        or x.dim() != 3
        or x.shape[0] != 1
        or torch.compiler.is_compiling()
        or (layer.training and block.attention.attention_dropout)
    ):
        return None
    return block.plan(current_routing() or block.state.routing, x.view(x.shape[1:]), kwargs)


def fuse(model: nn.Module, state: RoutingState, name: str) -> dict[str, str]:
    """Shadows the forward of every decoder layer for which the fused steps are proven.

    Args:
        model: with adapter `name` attached; what an earlier call did is undone first.
        state: the model's default routing.

    Returns:
        Decoder layer -> why it keeps its own forward; empty text where it is fused. Only layers of
        a known family are named.
    """
    release(model)
    found: dict[str, str] = {}
    blocks: dict[str, tuple[nn.Module, Block]] = {}
    for path, layer in model.named_modules():
        family = FAMILIES.get(type(layer).__name__)
        if family is None:
            continue
        if "forward" in layer.__dict__:
            found[path] = "its forward has been replaced"
            continue
        try:
            blocks[path] = layer, Block(layer, family, state)
            found[path] = ""
        except ValueError as error:
            found[path] = str(error)
    if not blocks:
        return found
    proven: dict[Any, str] = {}
    with attention.flat_attention(model):  # type: ignore[arg-type]
        for path, (layer, block) in blocks.items():
            kind = block.kind(name)
            if kind not in proven:
                proven[kind] = prove(layer, block, name)
            found[path] = proven[kind]
    for path, (layer, block) in blocks.items():
        if not found[path]:
            _shadow(layer, block)
    return found


def release(model: nn.Module) -> None:
    """Gives every decoder layer its own forward back."""
    for module in model.modules():
        if module.__dict__.pop("decal_block", None) is not None:
            own = module.__dict__.get("forward")
            if getattr(own, "func", None) is forward:
                del module.__dict__["forward"]


def _shadow(layer: nn.Module, block: Block) -> None:
    layer.__dict__["decal_block"] = block
    # Copies and pickles of a partial hold the layer's own copy.
    layer.__dict__["forward"] = partial(forward, layer)
