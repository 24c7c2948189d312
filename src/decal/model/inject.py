"""attach, detach, use, disabled: adapters on a model that stays the model it was.

Attaching puts an `AdaptedLayer` in the place of each target; the original module lives inside,
the same object. What attaching changed on the model besides (requires_grad, training mode) is
remembered in `model.decal_adapters` and put back when the last adapter leaves.

Nothing is taken on trust. attach ends by walking the model again: every module that was asked for
has the adapter, no other has, and the parameters are the number in the table. Loading is a
bijection between the adapter's tensors and the model's slots; whatever is left over on either side
is an error.

Knows no files: adapters arrive as settings or as tensors in memory.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import TracebackType
from typing import Protocol, cast

import torch
from torch import Tensor, nn

from decal.adapters import (
    METHODS,
    AdaptedLayer,
    Adapter,
    LowRank,
    Routing,
    RoutingState,
    Slot,
    current_routing,
    routed,
)
from decal.config import LoraConfig
from decal.errors import AdapterError, TrainingError, nearest
from decal.model.survey import (
    base_modules,
    base_name,
    module_infos,
    notes_on_rest,
    parameter_counts,
)
from decal.model.targets import TargetTable, input_group, resolve, table


class AdapterLike(Protocol):
    """Settings and trained tensors in memory, as `decal.Adapter` holds them."""

    @property
    def config(self) -> LoraConfig: ...

    @property
    def tensors(self) -> Mapping[str, tuple[Tensor, Tensor]]:
        """Module name -> (A [r, in], B [out, r])."""
        ...

    @property
    def source(self) -> str:
        """What to call it in a message."""
        ...

    @property
    def base(self) -> str | None: ...


@dataclass
class _Attached:
    """What attach put on a model, and what detach must put back."""

    requires_grad: dict[str, bool]
    training: dict[str, bool]
    state: RoutingState = field(default_factory=RoutingState)
    configs: dict[str, LoraConfig] = field(default_factory=dict)


class Use:
    """What `use` returns: as a context manager it brings back what was in use before."""

    def __init__(self, model: nn.Module, before: Routing):
        self._model, self._before = model, before

    def __enter__(self) -> Use:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        _activate(self._model, self._before)


def attach(
    model: nn.Module,
    config: LoraConfig | AdapterLike,
    name: str = "default",
    *,
    seed: int = 0,
) -> TargetTable:
    """Puts a new or a trained adapter on `model` and takes it into use.

    The base is frozen, the new adapter is trainable, other adapters stay attached but rest.

    Args:
        model: any model with linear layers; quantized and meta-device ones too.
        config: settings for a new adapter, or an `Adapter` with tensors.
        name: what to call it; unique on this model.
        seed: starting values of a new adapter.

    Returns:
        What `target_modules` came to.

    Raises:
        AdapterError: the name is taken, or the tensors do not fit the model.
        TargetError: a pattern matches nothing, or what cannot be adapted.
    """
    settings = config if isinstance(config, LoraConfig) else config.config
    trained = None if isinstance(config, LoraConfig) else config
    attached = _attached(model)
    _check_name(name, attached)
    infos = module_infos(model)
    names = resolve(infos, settings.target_modules)
    if trained is not None:
        shapes = {n: infos[n].shape or (0, 0) for n in names}
        _check_fit(trained, shapes, settings.r, base_name(model))
    found = table(infos, names, settings.target_modules, settings.r, notes_on_rest(model))
    if attached is None:
        attached = _freeze(model)
    before = attached.state.routing
    attached.configs[name] = settings
    try:
        _put_on(model, names, name, settings, seed)
        if trained is not None:
            load_state(model, name, trained.tensors)
        _activate(model, Routing(((name, 1.0),)))
        _check_attached(model, name, found)
    except BaseException:  # out of memory half way, say: the model must not stay half adapted
        attached.state.routing = before
        detach(model, name)
        raise
    return found


def detach(model: nn.Module, name: str | None = None) -> None:
    """Takes one adapter, or all of them, off the model.

    With the last one the model is again what it was before the first attach: the same module
    objects and bytes, requires_grad and training mode. If the adapter in use leaves and others
    stay, the one attached last is taken into use.

    Raises:
        AdapterError: there is no such adapter.
    """
    attached = _require(model)
    leaving = list(attached.configs) if name is None else [_known(attached, name)]
    layers = adapted_layers(model)
    for gone in leaving:
        del attached.configs[gone]
        for layer in layers.values():
            if gone in layer.adapters:
                del layer.adapters[gone]
    empty: dict[nn.Module, nn.Module] = {
        layer: layer.base_layer for layer in layers.values() if not layer.adapters
    }
    _replace(model, empty)
    if attached.configs:
        kept = tuple(w for w in attached.state.routing.weights if w[0] in attached.configs)
        _activate(model, Routing(kept or ((list(attached.configs)[-1], 1.0),)))
        return
    for key, parameter in model.named_parameters():
        parameter.requires_grad_(attached.requires_grad.get(key, parameter.requires_grad))
    for key, module in model.named_modules():
        module.training = attached.training.get(key, module.training)
    del model.decal_adapters, model.save_pretrained


def use(model: nn.Module, which: str | Mapping[str, float]) -> Use:
    """Takes one adapter or a weighted set into use, at once; the adapters in use are trainable.

    `use(model, {"a": 0.7, "b": 0.3})` adds 0.7 times a's delta and 0.3 times b's. The returned
    object is a context manager that brings back what was in use before.

    Raises:
        AdapterError: unknown names, weights that are no finite numbers, or an adapter in a weighted
            set that is no low-rank one.
    """
    attached = _require(model)
    wanted = {which: 1.0} if isinstance(which, str) else dict(which)
    for name, weight in wanted.items():
        _known(attached, name)
        if not math.isfinite(weight):
            raise AdapterError(f"adapter `{name}` has the weight {weight}")
    if not wanted:
        raise AdapterError("no adapter named", hint="`disabled(model)` runs the base alone")
    if list(wanted.values()) != [1.0]:
        for module, layer in adapted_layers(model).items():
            for name in wanted.keys() & layer.adapters.keys():
                if _adapter(layer, name).low_rank() is None:
                    raise AdapterError(
                        f"adapter `{name}` is not low-rank on {module} and cannot be weighted"
                    )
    before = attached.state.routing
    _activate(model, Routing(tuple((n, float(w)) for n, w in wanted.items())))
    return Use(model, before)


@contextmanager
def disabled(model: nn.Module) -> Iterator[None]:
    """Inside the block the model computes what its base computes."""
    state = _require(model).state
    before = state.routing
    state.routing = Routing()
    try:
        # A routing that is set for the running pass would win over the model's own.
        with routed(None if current_routing() is None else Routing()):
            yield
    finally:
        state.routing = before


def active_routing(model: nn.Module) -> Routing:
    """What the next forward pass of the model will use."""
    return current_routing() or _require(model).state.routing


def adapters_of(model: nn.Module) -> dict[str, LoraConfig]:
    """Name -> settings of the attached adapters, in the order they came; empty for none."""
    attached = _attached(model)
    return {} if attached is None else dict(attached.configs)


def adapted_layers(model: nn.Module) -> dict[str, AdaptedLayer]:
    """Name -> wrapper of every adapted layer, by the names of the base model, in its order."""
    inner = {id(m.base_layer): m for m in model.modules() if isinstance(m, AdaptedLayer)}
    return {name: inner[id(m)] for name, m in base_modules(model) if id(m) in inner}


def adapter_state(model: nn.Module, name: str = "default") -> dict[str, LowRank]:
    """Module name -> the adapter's factors (the parameters themselves), in the model's order."""
    _known(_require(model), name)
    layers = adapted_layers(model).items()
    parts = {m: _adapter(layer, name).low_rank() for m, layer in layers if name in layer.adapters}
    return {m: factors for m, factors in parts.items() if factors is not None}


def load_state(
    model: nn.Module, name: str, tensors: Mapping[str, tuple[Tensor, Tensor] | LowRank]
) -> None:
    """Copies factors (A, B, …) into an attached adapter; modules and shapes must be its own.

    Raises:
        AdapterError: something is missing, left over, or of another shape; nothing is changed.
    """
    slots = adapter_state(model, name)
    problems = [f"{m}: the model's adapter has no such module" for m in tensors.keys() - slots]
    problems += [f"{m}: no tensors for it" for m in slots.keys() - tensors]
    for module in slots.keys() & tensors.keys():
        for letter, own, given in zip("AB", slots[module][:2], tensors[module][:2], strict=True):
            if own.shape != given.shape:
                problems.append(
                    f"{module}: lora_{letter} is {list(given.shape)}, not {list(own.shape)}"
                )
    if problems:
        raise AdapterError(
            f"{len(problems)} of {len(slots.keys() | tensors.keys())} modules do not fit adapter "
            f"`{name}`",
            details=[_first(sorted(problems))],
        )
    with torch.no_grad():
        for module, slot in slots.items():
            slot.A.copy_(tensors[module][0])
            slot.B.copy_(tensors[module][1])


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


def _adapter(layer: AdaptedLayer, name: str) -> Adapter:
    return cast(Adapter, layer.adapters[name])


def _attached(model: nn.Module) -> _Attached | None:
    found = model.__dict__.get("decal_adapters")
    return found if isinstance(found, _Attached) else None


def _require(model: nn.Module) -> _Attached:
    attached = _attached(model)
    if attached is None:
        raise AdapterError("the model has no adapters", hint="attach one first")
    return attached


def _known(attached: _Attached, name: str) -> str:
    if name not in attached.configs:
        close = nearest(name, list(attached.configs))
        raise AdapterError(
            f"the model has no adapter `{name}`",
            hint=f"did you mean `{close}`?"
            if close
            else f"it has {', '.join(f'`{n}`' for n in attached.configs)}",
        )
    return name


def _check_name(name: str, attached: _Attached | None) -> None:
    if not name or not name.replace("-", "_").isidentifier():
        raise AdapterError(
            f"`{name}` cannot name an adapter", hint="use letters, digits, `_` and `-`"
        )
    if hasattr(nn.ModuleDict, name):  # torch keeps modules by name, beside its own methods
        raise AdapterError(
            f"`{name}` cannot name an adapter, it is a word of torch's", hint="choose another name"
        )
    if attached is not None and name in attached.configs:
        raise AdapterError(
            f"the model has an adapter `{name}` already",
            hint=f'detach(model, "{name}") first, or choose another name',
        )


def _freeze(model: nn.Module) -> _Attached:
    attached = _Attached(
        requires_grad={n: p.requires_grad for n, p in model.named_parameters()},
        training={n: m.training for n, m in model.named_modules()},
    )
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    model.decal_adapters = attached  # type: ignore[assignment]
    model.save_pretrained = _refuse_to_save  # type: ignore[assignment]
    return attached


def _refuse_to_save(*_: object, **__: object) -> None:
    """transformers would write `….base_layer.weight`, which loads as a base with random layers."""
    raise AdapterError(
        "a model with adapters cannot be saved as a whole: its tensors have other names than the"
        " base's, and would be random when it is loaded",
        hint="save the adapter alone (save_adapter), or merge or detach it first",
    )


def _put_on(model: nn.Module, names: list[str], name: str, settings: LoraConfig, seed: int) -> None:
    for module, layer in _wrap(model, names, cast(_Attached, _attached(model)).state).items():
        weight = next(layer.base_layer.parameters())
        slot = Slot(
            module=module,
            group=input_group(module),
            adapter=name,
            shape=layer.base.shape,
            device=weight.device,
        )
        layer.adapters[name] = METHODS[settings.method].create(settings, slot, seed)
        layer.adapters[name].train(layer.training)


def _wrap(
    model: nn.Module, names: tuple[str, ...] | list[str], state: RoutingState
) -> dict[str, AdaptedLayer]:
    layers = adapted_layers(model)
    originals = dict(base_modules(model))
    fresh = {n: AdaptedLayer(originals[n], state) for n in names if n not in layers}
    _replace(model, {originals[n]: layer for n, layer in fresh.items()})
    return {n: layers.get(n) or fresh[n] for n in names}


def _replace(model: nn.Module, new: Mapping[nn.Module, nn.Module]) -> None:
    """Puts new[m] wherever m stands in the tree, also where one module stands twice."""
    for parent in list(model.modules()):
        if parent in new.values():
            continue
        for attribute, child in list(parent._modules.items()):
            if child is not None and child in new:
                setattr(parent, attribute, new[child])


def _activate(model: nn.Module, routing: Routing) -> None:
    attached = _require(model)
    attached.state.routing = routing
    active = {name for name, _ in routing.weights}
    for layer in adapted_layers(model).values():
        for name, adapter in layer.adapters.items():
            adapter.requires_grad_(name in active)


def _check_fit(
    adapter: AdapterLike, slots: Mapping[str, tuple[int, int]], r: int, base: str
) -> None:
    """Tensors and slots must pair off; the whole misfit is one error."""
    unknown = [f"{m}: {_unknown(m, list(slots))}" for m in adapter.tensors if m not in slots]
    missing = [f"{m}: target_modules names it, the adapter has no tensors for it"
               for m in slots if m not in adapter.tensors]  # fmt: skip
    misshapen = []
    for module, (out, columns) in slots.items():
        if module not in adapter.tensors:
            continue
        A, B = adapter.tensors[module][:2]
        for what, has, wants in (
            ("in", A.shape[1], columns),
            ("out", B.shape[0], out),
            ("r", A.shape[0], r),
            ("r", B.shape[1], r),
        ):
            if has != wants:
                owner = "its config says" if what == "r" else "base has"
                misshapen.append(f"{module}: adapter expects {what}={has}, {owner} {what}={wants}")
                break
    kinds = (
        (misshapen, f"{len(misshapen)} of {len(adapter.tensors)} tensors have the wrong shape"),
        (unknown, f"{len(unknown)} of {len(adapter.tensors)} modules are not in the base"),
        (missing, f"{len(missing)} of {len(slots)} target modules have no tensors"),
    )
    if any(lines for lines, _ in kinds):
        raise AdapterError(
            f"adapter `{adapter.source}` does not fit base `{base}`: "
            + ", ".join(text for lines, text in kinds if lines),
            details=[_first(lines) for lines, _ in kinds if lines],
            hint=None
            if adapter.base in (None, base)
            else f"the adapter was trained on `{adapter.base}` (adapter_config.json)",
        )


def _unknown(module: str, slots: list[str]) -> str:
    close = nearest(module, slots)
    return "the base has no such target" + (f", the nearest is {close}" if close else "")


def _first(lines: list[str]) -> str:
    return lines[0] + (f"  (and {len(lines) - 1} more)" if len(lines) > 1 else "")


def _check_attached(model: nn.Module, name: str, found: TargetTable) -> None:
    """Looks again: exactly the modules asked for carry the adapter, trainable and in float32."""
    state = adapter_state(model, name)
    parameters = [p for parts in state.values() for p in parts[:2]]
    count = sum(p.numel() for p in parameters)
    if (
        tuple(state) != found.names
        or count != found.parameters
        or not all(p.requires_grad and p.dtype == torch.float32 for p in parameters)
    ):
        left = [n for n in found.names if n not in state]
        raise AdapterError(
            f"adapter `{name}` reached {len(state)} of {len(found.names)} target modules, "
            f"with {count:,} of {found.parameters:,} parameters",
            details=left[:1],
            hint="the model builds or shares its modules in a way decal does not understand",
        )
