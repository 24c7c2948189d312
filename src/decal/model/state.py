"""What is attached to a model, and its parameters by the names of the base.

The one record of it is `model.decal_adapters`; the tensors are in the wrappers. An adapter has two
parts: low-rank factors on target modules (`adapter_state`), and parameters of the base that it
holds whole (`full_state`): those of modules_to_save, and trained biases.

Knows no settings' meaning and no files.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn

from decal.adapters import (
    AdaptedLayer,
    Lora,
    LowRank,
    ReplacedModule,
    Replacement,
    Routing,
    RoutingState,
)
from decal.config import LoraConfig
from decal.errors import AdapterError, TrainingError, first_of, nearest
from decal.kernels import native
from decal.model.survey import base_modules, parameter_counts, unwrapped


@dataclass
class Attached:
    """What attach put on a model, and what detach must put back."""

    requires_grad: dict[str, bool]
    training: dict[str, bool]
    state: RoutingState = field(default_factory=RoutingState)
    configs: dict[str, LoraConfig] = field(default_factory=dict)
    metadata: dict[str, dict[str, str]] = field(default_factory=dict)
    """By name: the facts that came with a trained adapter."""
    hooks: list[Any] = field(default_factory=list)
    """Handles of the hooks that attach put on the model."""
    fused: dict[str, str] = field(default_factory=dict)
    """Decoder layer of a known family -> why it does not run fused; empty text where it does."""
    loaded: bool = False
    """Whether the `load_state_dict` that is running has loaded an adapter."""


def attached_to(model: nn.Module) -> Attached | None:
    """The record of what is attached; None where nothing is."""
    found = model.__dict__.get("decal_adapters")
    return found if isinstance(found, Attached) else None


def require(model: nn.Module) -> Attached:
    """As `attached_to`, but AdapterError where nothing is attached."""
    attached = attached_to(model)
    if attached is None:
        raise AdapterError("the model has no adapters", hint="attach one first")
    return attached


def known(attached: Attached, name: str) -> str:
    """`name` itself; AdapterError if no adapter is called so."""
    if name not in attached.configs:
        close = nearest(name, list(attached.configs))
        raise AdapterError(
            f"the model has no adapter `{name}`",
            hint=f"did you mean `{close}`?"
            if close
            else f"it has {', '.join(f'`{n}`' for n in attached.configs)}",
        )
    return name


def adapters_of(model: nn.Module) -> dict[str, LoraConfig]:
    """Name -> settings of the attached adapters, in the order they came; empty for none."""
    attached = attached_to(model)
    return {} if attached is None else dict(attached.configs)


def adapted_layers(model: nn.Module) -> dict[str, AdaptedLayer]:
    """Name -> wrapper of every adapted layer, by the names of the base model, in its order."""
    inner = {id(m.base_layer): m for m in model.modules() if isinstance(m, AdaptedLayer)}
    return {name: inner[id(m)] for name, m in base_modules(model) if id(m) in inner}


def replaced_modules(model: nn.Module) -> dict[str, ReplacedModule]:
    """Name -> wrapper of every module that an adapter holds parameters of, as `adapted_layers`."""
    inner = {id(unwrapped(m)): m for m in model.modules() if isinstance(m, ReplacedModule)}
    return {name: inner[id(m)] for name, m in base_modules(model) if id(m) in inner}


def lora_of(layer: AdaptedLayer, name: str) -> Lora:
    """The adapter of this name on one layer."""
    return cast(Lora, layer.adapters[name])


def activate(model: nn.Module, routing: Routing) -> None:
    """Makes `routing` the model's default; its adapters are trainable, the others rest."""
    require(model).state.routing = routing
    train_only(model, routing.names)


def train_only(model: nn.Module, names: frozenset[str]) -> None:
    """Sets which adapters' parameters require grad."""
    for wrapper in (*adapted_layers(model).values(), *replaced_modules(model).values()):
        for name, adapter in wrapper.adapters.items():
            adapter.requires_grad_(name in names)


def adapter_state(model: nn.Module, name: str = "default") -> dict[str, LowRank]:
    """Module name -> the adapter's factors (the parameters themselves), in the model's order."""
    known(require(model), name)
    layers = adapted_layers(model).items()
    return {m: lora_of(layer, name).low_rank() for m, layer in layers if name in layer.adapters}


def full_state(model: nn.Module, name: str = "default") -> dict[str, nn.Parameter]:
    """Parameter name in the base model -> the adapter's own parameter in its place.

    Those of modules_to_save, and trained biases, in the model's order.
    """
    known(require(model), name)
    adapted, replaced = adapted_layers(model), replaced_modules(model)
    found: dict[str, nn.Parameter] = {}
    for module, _ in base_modules(model):
        if module in adapted and name in adapted[module].adapters:
            bias = lora_of(adapted[module], name).bias
            if bias is not None:
                found[f"{module}.bias"] = bias
        if module in replaced and name in replaced[module].adapters:
            own = cast(Replacement, replaced[module].adapters[name])
            for inner, parameter in own.named_parameters(remove_duplicate=False):
                found[f"{module}.{inner}" if module else inner] = parameter
    return found


def load_state(
    model: nn.Module,
    name: str,
    tensors: Mapping[str, Any],
    full: Mapping[str, Tensor] | None = None,
) -> None:
    """Copies factors (A, B, and B's bias or None) and whole parameters into an attached adapter.

    Modules, parameters and shapes must be the adapter's own.

    Raises:
        AdapterError: something is missing, left over, or of another shape; nothing is changed.
    """
    slots = _parameters(adapter_state(model, name))
    given = _parameters({m: (*parts, None)[:3] for m, parts in tensors.items()})
    slots |= {(parameter, ""): own for parameter, own in full_state(model, name).items()}
    given |= {(parameter, ""): tensor for parameter, tensor in (full or {}).items()}
    problems = {m: "the model's adapter has no such module" for m, _ in given.keys() - slots}
    problems |= {m: "no tensors for it" for m, _ in slots.keys() - given}
    for key in slots.keys() & given.keys():
        if slots[key].shape != given[key].shape:
            wanted, has = list(slots[key].shape), list(given[key].shape)
            problems[key[0]] = f"{key[1]}{' ' * bool(key[1])}is {has}, not {wanted}"
    if problems:
        lines = sorted(f"{module}: {text}" for module, text in problems.items())
        count = len({m for m, _ in slots.keys() | given.keys()})
        raise AdapterError(
            f"{len(problems)} of {count} modules do not fit adapter `{name}`",
            details=[first_of(lines)],
        )
    with torch.no_grad():
        for key, slot in slots.items():
            slot.copy_(given[key])


def _parameters(state: Mapping[str, Any]) -> dict[tuple[str, str], Tensor]:
    """(module, part of it) -> tensor; of `LowRank`s or (A, B, bias or None)."""
    found: dict[tuple[str, str], Tensor] = {}
    for module, parts in state.items():
        bias = parts.bias if isinstance(parts, LowRank) else parts[2]
        named = {"lora_A": parts[0], "lora_B": parts[1], "lora_B's bias": bias}
        found |= {(module, part): t for part, t in named.items() if t is not None}
    return found


def trainable_parameters(model: nn.Module) -> tuple[int, int]:
    """(trainable, all) parameters; quantized weights count as what they stand for."""
    return parameter_counts(model)


def trainable_line(model: nn.Module) -> str:
    """`trainable params: … || all params: … || trainable%: …`, the line people know.

    Raises:
        TrainingError: nothing is trainable.
    """
    trainable, total = parameter_counts(model)
    if not trainable:
        raise TrainingError("0 parameters are trainable", hint="attach an adapter first")
    share = 100 * trainable / total
    return f"trainable params: {trainable:,} || all params: {total:,} || trainable%: {share:.4f}"


def fused_line(model: nn.Module) -> str | None:
    """`30 of 30 decoder layers run fused (avx512bf16)`; None for a model without known ones."""
    attached = attached_to(model)
    if attached is None or not attached.fused:
        return None
    kept = [f"{path}: {reason}" for path, reason in attached.fused.items() if reason]
    count = len(attached.fused) - len(kept)
    line = f"{count} of {len(attached.fused)} decoder layers run fused"
    line += f" ({native.isa() or 'torch'})" if count else ""
    return f"{line}; {first_of(kept)}" if kept else line
