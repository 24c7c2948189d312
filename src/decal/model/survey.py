"""Walks a model and says what each of its modules is, and how many parameters it really has.

Knows torch modules and the structure of transformers models, but no adapters' insides: an adapted
or replaced module counts as the base module under it, so that a model reads the same before and
after attach. Works on the meta device.

An attention module is recognized by its class name (`LlamaAttention`, `BertAttention`, …) or, for
code that names its classes otherwise, by its forward calling an attention function. The names in
the compiled forward are read for that; source text is not needed.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from typing import Any

from torch import nn

from decal.adapters import AdaptedLayer, BaseLayer, ReplacedModule, base_view
from decal.model.targets import ModuleInfo

_ATTENTION_CLASS = re.compile(r"(Attention|Attn)(V?\d+)?$")
_ATTENTION_CALLS = {
    "ALL_ATTENTION_FUNCTIONS",
    "scaled_dot_product_attention",
    "flash_attn_func",
    "flash_attn_varlen_func",
    "_flash_attention_forward",
}


def module_infos(model: nn.Module) -> dict[str, ModuleInfo]:
    """Name -> what resolution needs to know, in the model's order; adapters' insides left out."""
    head = _head(model)
    inside: list[str] = []
    infos: dict[str, ModuleInfo] = {}
    for name, module in base_modules(model):
        if is_attention(module):
            inside.append(name + ".")
        view = base_view(module)
        experts = expert_weights(module)
        infos[name] = ModuleInfo(
            kind=view.kind if view is not None else "experts" if experts else "other",
            shape=view.shape if view is not None else None,
            cls=type(module).__name__,
            is_head=module is head,
            attention=name.startswith(tuple(inside)),
            weights=tuple(experts),
        )
    return infos


def base_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """named_modules of the model as it was before any attach: names and original modules."""
    seen: set[int] = set()

    def walk(module: nn.Module, name: str) -> Iterator[tuple[str, nn.Module]]:
        module = unwrapped(module)
        if id(module) in seen:
            return
        seen.add(id(module))
        yield name, module
        for child_name, child in module.named_children():
            yield from walk(child, f"{name}.{child_name}" if name else child_name)

    yield from walk(model, "")


def is_attention(module: nn.Module) -> bool:
    """Whether the module's class is an attention module."""
    if _ATTENTION_CLASS.search(type(module).__name__):
        return True
    forward: Any = inspect.unwrap(type(module).forward)
    code = getattr(forward, "__code__", None)
    return code is not None and not _ATTENTION_CALLS.isdisjoint(code.co_names)


def expert_weights(module: nn.Module) -> dict[str, nn.Parameter]:
    """The module's own parameters that hold several matrices, one per expert, by name."""
    if isinstance(module, nn.modules.conv._ConvNd):
        return {}
    return {n: p for n, p in module.named_parameters(recurse=False) if p.ndim == 3}


def notes_on_rest(model: nn.Module) -> list[str]:
    """What an adapter on linear layers cannot reach: weights with an expert dimension."""
    classes: dict[str, int] = {}
    held = 0
    for _, module in base_modules(model):
        numel = sum(p.numel() for p in expert_weights(module).values())
        if numel:
            classes[type(module).__name__] = classes.get(type(module).__name__, 0) + 1
            held += numel
    if not held:
        return []
    share = 100 * held / parameter_counts(model)[1]
    what = ", ".join(f"{count} {cls}" for cls, count in classes.items())
    return [
        f"expert weights are no linear layers and stay frozen: {what} ({share:.0f} % of the model)"
    ]


def parameter_counts(model: nn.Module) -> tuple[int, int]:
    """(trainable, all) parameters. A quantized weight counts as what it stands for, out * in.

    Tied weights count once, adapters are included.
    """
    trainable = total = 0
    counted: set[int] = set()
    module: Any
    for module in model.modules():
        packed = module if is_packed(module) else None
        if packed is not None:
            total += packed.shape[0] * packed.shape[1]
        for parameter in module.parameters(recurse=False):
            if id(parameter) in counted or (packed is not None and parameter is not packed.bias):
                continue
            counted.add(id(parameter))
            total += parameter.numel()
            trainable += parameter.numel() * parameter.requires_grad
    return trainable, total


def base_name(model: nn.Module) -> str:
    """What to call the model in a message: its hub id or folder, else its class."""
    return getattr(model, "name_or_path", "") or type(model).__name__


def _head(model: nn.Module) -> nn.Module | None:
    """The output head: output embeddings, else a linear layer beside the model proper.

    None where the model has neither.
    """
    get = getattr(model, "get_output_embeddings", None)
    head = get() if get is not None else None
    prefix = str(getattr(model, "base_model_prefix", ""))
    if head is None and prefix:
        body = getattr(model, prefix, None)
        beside = [m for m in model.children() if m is not body and base_view(unwrapped(m))]
        head = beside[-1] if isinstance(body, nn.Module) and beside else None
    return None if head is None else unwrapped(head)


def is_packed(module: nn.Module) -> bool:
    """Whether the module is a base layer by itself: its storage is not its weight."""
    wrapper = isinstance(module, AdaptedLayer | ReplacedModule)
    return not wrapper and isinstance(module, BaseLayer)


def unwrapped(module: nn.Module) -> nn.Module:
    """The original module under an adapted or replaced one; any other module itself."""
    while isinstance(module, AdaptedLayer | ReplacedModule):
        module = module.base_layer
    return module
