"""A model as plain numbers for `plan/`: from a skeleton, or from a model that is loaded.

Adapters on it are not seen: an adapted layer counts as the layer under it, a packed one as what it
stands for.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM

from decal.config import LoraConfig
from decal.errors import QuantError
from decal.model import hf, saved
from decal.model.blocks import FAMILIES
from decal.model.inject import attach, detach
from decal.model.quantizer import quantizable_modules
from decal.model.survey import base_modules, expert_weights, is_packed
from decal.model.targets import input_group
from decal.model.unquantized import refuse_fused
from decal.plan.structure import Layer, Linear, Structure, Weight

COUNTED = {"lora": "every weight frozen", "full": "none"}
"""What is counted by `with_kept`, and what is frozen in it."""


def structure_of(model: Any, name: str, skip: Sequence[str] = ()) -> Structure:
    """Its parameters, its layers and the numbers that decide what a pass keeps.

    Args:
        model: a causal language model or classifier of transformers, on any device.
        name: what to call it.
        skip: `quant.skip_modules`.
    """
    config = model.config.get_text_config()
    heads = int(getattr(config, "num_attention_heads", None) or 1)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    return Structure(
        name=name,
        weights=tuple(_weights(model, skip)),
        layers=tuple(_layers(model)),
        hidden=int(config.hidden_size),
        heads=heads,
        key_heads=int(getattr(config, "num_key_value_heads", None) or heads),
        head_dim=int(head_dim),
        vocabulary=int(config.vocab_size),
        head_norms=any(leaf == "q_norm" for leaf in _leaves(model)),
        window=_window(config),
        unpackable=_unpackable(model, skip),
    )


def with_kept(structure: Structure, skeleton: Any, dtype: str, *what: str) -> Structure:
    """With what transformers' own layers keep for backward, for `what` of `COUNTED`.

    The skeleton is cast to `dtype`, and is left with nothing attached and every weight free.
    """
    skeleton.to(hf.DTYPES[dtype])
    kept = dict(structure.kept)
    for way in what:
        if way == "lora":
            attach(skeleton, LoraConfig(r=1, lora_dropout=0.0))
        else:
            skeleton.requires_grad_(True)
        found = saved.bytes_per_token(skeleton)
        if way == "lora":
            detach(skeleton)
        kept[way] = _guess(structure, dtype) if found is None else found
    return replace(structure, kept=kept)


def _guess(structure: Structure, dtype: str) -> float:
    """What the layers of Llama would keep, for an architecture that a skeleton cannot run."""
    inner = max((lin.columns for layer in structure.layers for lin in layer.linears), default=0)
    size = hf.DTYPES[dtype].itemsize
    return 8.0 * structure.hidden + size * (6 * structure.hidden + 4 * max(inner, 1))


def _weights(model: Any, skip: Sequence[str]) -> list[Weight]:
    quantizable = set(quantizable_modules(model, skip))
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    found: list[Weight] = []
    seen: set[int] = set()
    module: Any
    for name, module in base_modules(model):
        if is_packed(module):
            found.append(Weight(name=f"{name}.weight", shape=module.shape, packs=True))
        experts = expert_weights(module)
        for leaf, parameter in module.named_parameters(recurse=False):
            if id(parameter) in seen or (is_packed(module) and parameter is not module.bias):
                continue
            seen.add(id(parameter))
            shape = tuple(parameter.shape)
            packs = leaf == "weight" and name in quantizable
            if packs and type(module).__name__ == "Conv1D":
                shape = shape[::-1]
            looked_up = isinstance(module, nn.Embedding) or module is embedding
            used = 0.0 if looked_up else _met(model, shape) if leaf in experts else 1.0
            found.append(
                Weight(
                    name=f"{name}.{leaf}" if name else leaf,
                    shape=shape,
                    packs=packs,
                    used=used,
                    head=module is head,
                )
            )
    return found


def _met(model: Any, shape: tuple[int, ...]) -> float:
    """Share of a tensor of experts that one token is multiplied with."""
    config = model.config.get_text_config()
    chosen = getattr(config, "num_experts_per_tok", None)
    return min(1.0, chosen / shape[0]) if chosen else 1.0


def _layers(model: Any) -> list[Layer]:
    layers = saved.layers_of(model)
    if layers is None:
        return []
    names = {id(m): n for n, m in base_modules(model)}
    found = []
    for layer in layers:
        linears = []
        for inner, module in base_modules(layer):
            shape = _linear_shape(module)
            if shape is not None:
                full = names.get(id(module), inner)
                linears.append(
                    Linear(name=full, out=shape[0], columns=shape[1], group=input_group(full))
                )
        fused = type(layer).__name__ in FAMILIES
        found.append(Layer(linears=tuple(linears), fused=fused))
    return found


def _linear_shape(module: Any) -> tuple[int, int] | None:
    if is_packed(module):
        return int(module.shape[0]), int(module.shape[1])
    weight = module._parameters.get("weight")
    if weight is None or weight.dim() != 2 or isinstance(module, nn.Embedding):
        return None
    rows, columns = weight.shape
    return (columns, rows) if type(module).__name__ == "Conv1D" else (rows, columns)


def _leaves(model: nn.Module) -> set[str]:
    return {name.rpartition(".")[2] for name, _ in model.named_modules()}


def _window(config: Any) -> int | None:
    """The window that every layer has; None where any sees all."""
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None)
    used = getattr(config, "use_sliding_window", True)
    everywhere = kinds is None or all(kind == "sliding_attention" for kind in kinds)
    return int(window) if window and used and everywhere else None


def _unpackable(model: Any, skip: Sequence[str]) -> str | None:
    try:
        refuse_fused(model, skip)
    except QuantError as error:
        return error.message
    return None


def as_meta(config: Any, auto: Any = AutoModelForCausalLM) -> Any:
    """A skeleton of a configuration: names and shapes, no weights."""
    with hf.Quiet(), torch.device("meta"):
        model = auto.from_config(config)
    model.tie_weights()
    return model.eval()
