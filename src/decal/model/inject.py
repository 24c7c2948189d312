"""attach and detach: adapters on a model that stays the model it was.

Attaching puts an `AdaptedLayer` in the place of each target, and a `ReplacedModule` where an
adapter holds parameters whole; the original module lives inside, the same object. Where both stand
on one module, the replaced one is outside. What attaching changed on the model besides
(requires_grad, training mode, save_pretrained) is remembered in `model.decal_adapters` and put back
when the last adapter leaves.

Nothing is taken on trust. attach ends by walking the model again: every module that was asked for
has the adapter, no other has, and the parameters are the number in the table. Then the model runs
on a few tokens, to see that it really computes with the adapter (`probe.py`), and decoder layers of
known families get their fused forward, after a proof of their own (`blocks/swap.py`). Loading is a
bijection between the adapter's tensors and the model's slots (`fit.py`); whatever is left over on
either side is an error.

Knows no files: adapters arrive as settings or as tensors in memory.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from functools import partial
from typing import cast

from torch import nn

from decal.adapters import (
    METHODS,
    AdaptedLayer,
    ReplacedModule,
    Replacement,
    Routing,
    RoutingState,
    Slot,
)
from decal.config import LoraConfig
from decal.errors import AdapterError
from decal.model.blocks.swap import fuse, release
from decal.model.fit import AdapterLike, check_fit
from decal.model.probe import probe
from decal.model.saving import forget_peft_keys, save_adapters, take_peft_keys
from decal.model.slots import Slots, slots_for
from decal.model.state import (
    Attached,
    activate,
    adapted_layers,
    adapter_state,
    adapters_of,
    attached_to,
    full_state,
    fused_line,
    known,
    load_state,
    lora_of,
    replaced_modules,
    require,
    trainable_line,
    trainable_parameters,
)
from decal.model.survey import base_modules
from decal.model.targets import TargetTable, input_group
from decal.model.use import active_routing, disabled, mixed, use

__all__ = [
    "active_routing",
    "adapted_layers",
    "adapter_state",
    "adapters_of",
    "attach",
    "detach",
    "disabled",
    "full_state",
    "fused_line",
    "load_state",
    "mixed",
    "replaced_modules",
    "trainable_line",
    "trainable_parameters",
    "use",
]


def attach(
    model: nn.Module,
    config: LoraConfig | AdapterLike,
    name: str = "default",
    *,
    seed: int = 0,
    allow_other_base: bool = False,
    drops_as: str | None = None,
) -> TargetTable:
    """Puts a new or a trained adapter on `model` and takes it into use.

    The base is frozen, the new adapter is trainable, other adapters stay attached but rest.

    Args:
        model: any model with linear layers; quantized and meta-device ones too.
        config: settings for a new adapter, or an `Adapter` with tensors.
        name: what to call it; unique on this model.
        seed: starting values of a new adapter.
        allow_other_base: warn where the model is not the base that the adapter was trained on,
            instead of refusing it; its tensors must fit all the same.
        drops_as: the name that its dropout masks follow from, if not its own: adapters that train
            side by side then drop what each would drop alone under that name.

    Returns:
        What `target_modules` and the other settings came to.

    Raises:
        AdapterError: the name is taken, the tensors do not fit the model, it is not the base they
            were trained on, or it computes without some of the adapted modules.
        TargetError: a setting matches nothing, or what it cannot act on.
    """
    settings = config if isinstance(config, LoraConfig) else config.config
    trained = None if isinstance(config, LoraConfig) else config
    attached = attached_to(model)
    _check_name(name, attached)
    slots = slots_for(model, settings, new=trained is None)
    if trained is not None:
        check_fit(model, trained, slots, allow_other_base=allow_other_base)
        check_base = getattr(model, "decal_check", None)  # left by whoever loaded the model
        if check_base is not None:
            check_base(model, trained, allow_other_base=allow_other_base)
    if attached is None:
        attached = _freeze(model)
    before = attached.state.routing
    attached.configs[name] = settings
    try:
        _put_on(model, slots, name, settings, (seed, drops_as or name))
        if trained is not None:
            tensors = {m: (p.A, p.B, p.bias) for m, p in trained.tensors.items()}
            load_state(model, name, tensors, trained.full)
            attached.metadata[name] = dict(trained.metadata)
        activate(model, Routing(((name, 1.0),)))
        _check_attached(model, name, slots)
        notes = probe(model, name, new=trained is None)
        attached.fused = fuse(model, attached.state, name)
    except BaseException:  # out of memory half way, say: the model must not stay half adapted
        attached.state.routing = before
        detach(model, name)
        raise
    return replace(slots.table, notes=(*slots.table.notes, *notes))


def detach(model: nn.Module, name: str | None = None) -> None:
    """Takes one adapter, or all of them, off the model.

    With the last one the model is again what it was before the first attach: the same module
    objects and bytes, requires_grad and training mode. If the adapter in use leaves and others
    stay, the one attached last is taken into use.

    Raises:
        AdapterError: there is no such adapter.
    """
    attached = require(model)
    leaving = list(attached.configs) if name is None else [known(attached, name)]
    release(model)
    for gone in leaving:
        del attached.configs[gone]
        attached.metadata.pop(gone, None)
    for wrappers in (replaced_modules(model), adapted_layers(model)):
        for wrapper in wrappers.values():
            for gone in leaving:
                if gone in wrapper.adapters:
                    del wrapper.adapters[gone]
        _replace(model, {w: w.base_layer for w in wrappers.values() if not w.adapters})
    if attached.configs:
        kept = tuple(w for w in attached.state.routing.weights if w[0] in attached.configs)
        activate(model, Routing(kept or ((list(attached.configs)[-1], 1.0),)))
        attached.fused = fuse(model, attached.state, list(attached.configs)[-1])
        return
    for key, parameter in model.named_parameters():
        parameter.requires_grad_(attached.requires_grad.get(key, parameter.requires_grad))
    for key, module in model.named_modules():
        module.training = attached.training.get(key, module.training)
    for hook in attached.hooks:
        hook.remove()
    if "_hf_peft_config_loaded" in model.__dict__:
        del model._hf_peft_config_loaded
    del model.decal_adapters, model.save_pretrained


def _check_name(name: str, attached: Attached | None) -> None:
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


def _freeze(model: nn.Module) -> Attached:
    attached = Attached(
        requires_grad={n: p.requires_grad for n, p in model.named_parameters()},
        training={n: m.training for n, m in model.named_modules()},
    )
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    model.decal_adapters = attached  # type: ignore[assignment]
    # A partial and no closure: copies and pickles of it hold the model's own copy.
    model.save_pretrained = partial(save_adapters, model)  # type: ignore[assignment]
    attached.hooks = [
        model.register_load_state_dict_pre_hook(take_peft_keys),
        model.register_load_state_dict_post_hook(forget_peft_keys),
    ]
    if getattr(model, "is_quantized", False):  # transformers' word for "can be trained"
        model._hf_peft_config_loaded = True  # type: ignore[assignment]
    return attached


def _put_on(
    model: nn.Module, slots: Slots, name: str, settings: LoraConfig, drawn: tuple[int, str]
) -> None:
    """`drawn`: the seed of the starting values, and the name of the dropout masks."""
    state = require(model).state
    masters: dict[int, nn.Parameter] = {}
    for module, layer in _wrap_layers(model, slots.names, state).items():
        bias = layer.base.bias if module in slots.biases else None
        slot = Slot(
            module=module,
            group=input_group(module),
            adapter=drawn[1],
            shape=layer.base.shape,
            device=next(layer.base_layer.parameters()).device,
            kind=layer.base.kind,
            bias=bias,
        )
        layer.adapters[name] = METHODS[settings.method].create(settings, slot, drawn[0])
        layer.adapters[name].train(layer.training)
        if bias is not None:
            masters[id(bias)] = cast(nn.Parameter, layer.adapters[name].bias)
    for module, wrapper in _wrap_modules(model, slots.whole, state).items():
        places = slots.whole[module]
        # A bias that is shared stays shared; a head that is tied to an embedding gets its own copy.
        replacement = Replacement(places, masters if [*places] == ["bias"] else None)
        wrapper.adapters[name] = replacement.train(wrapper.training)


def _wrap_layers(
    model: nn.Module, names: Iterable[str], state: RoutingState
) -> dict[str, AdaptedLayer]:
    layers = adapted_layers(model)
    originals = dict(base_modules(model))
    fresh = {n: AdaptedLayer(originals[n], state) for n in names if n not in layers}
    _replace(model, {originals[n]: layer for n, layer in fresh.items()})
    return {n: layers.get(n) or fresh[n] for n in names}


def _wrap_modules(
    model: nn.Module, names: Iterable[str], state: RoutingState
) -> dict[str, ReplacedModule]:
    wrappers, layers = replaced_modules(model), adapted_layers(model)
    originals = dict(base_modules(model))
    inner = {n: layers.get(n) or originals[n] for n in names if n not in wrappers}
    fresh = {n: ReplacedModule(module, state, n) for n, module in inner.items()}
    _replace(model, {inner[n]: wrapper for n, wrapper in fresh.items()})
    return {n: wrappers.get(n) or fresh[n] for n in names}


def _replace(model: nn.Module, new: Mapping[nn.Module, nn.Module]) -> None:
    """Puts new[m] wherever m stands in the tree, also where one module stands twice."""
    for parent in list(model.modules()):
        for attribute, child in list(parent._modules.items()):
            if child is not None and child in new and new[child] is not parent:
                setattr(parent, attribute, new[child])


def _check_attached(model: nn.Module, name: str, slots: Slots) -> None:
    """Looks again: exactly what was asked for carries the adapter, trainable and in float32."""
    layers = {m: layer for m, layer in adapted_layers(model).items() if name in layer.adapters}
    full = full_state(model, name)
    own = {id(p): p for layer in layers.values() for p in lora_of(layer, name).parameters()}
    own |= {id(p): p for p in full.values()}
    count = sum(p.numel() for p in own.values())
    if (
        tuple(layers) != slots.names
        or full.keys() != slots.full_shapes().keys()
        or count != slots.table.parameters
        or not all(p.requires_grad and p.dtype.itemsize >= 4 for p in own.values())
    ):
        left = [n for n in slots.names if n not in layers]
        left += [n for n in slots.full_shapes() if n not in full]
        raise AdapterError(
            f"adapter `{name}` reached {len(layers)} of {len(slots.names)} target modules, "
            f"with {count:,} of {slots.table.parameters:,} parameters",
            details=left[:1],
            hint="the model builds or shares its modules in a way decal does not understand",
        )
