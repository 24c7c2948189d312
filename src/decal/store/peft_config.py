"""adapter_config.json as peft 0.21 writes it: all 41 keys, and which of them decal understands.

Reading is strict, because peft itself only warns of a key it does not know, and an adapter that
is read without one of its features is a different adapter. A key is fine if decal understands it,
if it only mattered when the adapter was made, or if it has its default or an empty value.
Everything else is named and refused, together with what is wrong with the tensors (peft.py raises
once for all). Keys that LoraConfig has no field for are carried along (`rest`) and written again.

peft's rules for names are repeated here, because every reader must choose the same modules. A
target is a whole name or its end after a dot, but modules_to_save are plain ends of names: `norm`
also saves `post_attention_layernorm`. decal means the end after a dot there too, so modules are
written by their whole names where the two could differ.

Knows no tensors and no folders.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from pydantic import ValidationError

from decal.config import LoraConfig
from decal.store.patterns import why_costly
from decal.untrusted import may_be_path

__all__ = [
    "DEFAULTS",
    "PEFT_VERSION",
    "config_fields",
    "config_problems",
    "dotted",
    "misnamed",
    "pattern_problems",
    "rest",
    "saved_by",
    "to_json",
    "unsaved",
]

PEFT_VERSION = "0.21.2"
"""The peft whose files are read and written here."""

DEFAULTS: dict[str, Any] = {
    "alora_invocation_tokens": None,
    "alpha_pattern": {},
    "arrow_config": None,
    "auto_mapping": None,
    "base_model_name_or_path": None,
    "bias": "none",
    "corda_config": None,
    "ensure_weight_tying": False,
    "eva_config": None,
    "exclude_modules": None,
    "fan_in_fan_out": False,
    "inference_mode": True,
    "init_lora_weights": True,
    "kasa_config": None,
    "layer_replication": None,
    "layers_pattern": None,
    "layers_to_transform": None,
    "loftq_config": {},
    "lora_alpha": 8,
    "lora_bias": False,
    "lora_dropout": 0.0,
    "lora_ga_config": None,
    "megatron_config": None,
    "megatron_core": "megatron.core",
    "modules_to_save": None,
    "monteclora_config": None,
    "peft_type": "LORA",
    "peft_version": PEFT_VERSION,
    "qalora_group_size": 16,
    "r": 8,
    "rank_pattern": {},
    "revision": None,
    "target_modules": None,
    "target_parameters": None,
    "task_type": None,
    "trainable_token_indices": None,
    "use_bdlora": None,
    "use_dora": False,
    "use_qalora": False,
    "use_rslora": False,
    "velora_config": None,
}

_FIELDS = {
    "alpha_pattern", "bias", "exclude_modules", "layers_pattern", "layers_to_transform",
    "lora_alpha", "lora_bias", "lora_dropout", "modules_to_save", "r", "rank_pattern",
    "target_modules", "use_rslora",
}  # fmt: skip
"""Keys that are fields of LoraConfig, apart from init_lora_weights."""
_FACTS = {
    "auto_mapping", "base_model_name_or_path", "ensure_weight_tying", "fan_in_fan_out",
    "inference_mode", "peft_type", "peft_version", "revision", "task_type",
}  # fmt: skip
"""Keys that are understood and have a place of their own, or none that matters."""
_KINDS = {"auto_mapping": dict, "base_model_name_or_path": str, "revision": str, "task_type": str}
"""Of those facts that are not just true or false."""
_ONLY_FOR_MAKING = {
    "eva_config", "loftq_config", "megatron_core", "qalora_group_size", "runtime_config",
}  # fmt: skip
_AUTOMATIC = {
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
}
"""What peft adds to modules_to_save by itself, whether the model has it or not."""
_UNIQUE_ENDS = {"embed_tokens", "lm_head", "score"}
"""Usual entries of modules_to_save that are the end of no longer name in transformers' models."""
_PLAIN_INITS = (True, False, "gaussian", "orthogonal", "eva")
"""Starting values that leave the base as it is; after training they no longer matter."""

_MEANING = {
    "alora_invocation_tokens": "aLoRA, active only after its invocation tokens",
    "arrow_config": "Arrow routing",
    "kasa_config": "KaSA",
    "layer_replication": "replicated layers",
    "megatron_config": "Megatron layers",
    "monteclora_config": "MonteCLoRA",
    "target_parameters": "adapters on bare parameters",
    "trainable_token_indices": "trained token embeddings",
    "use_bdlora": "block-diagonal LoRA",
    "use_dora": "DoRA",
    "use_qalora": "QA-LoRA",
    "velora_config": "VeLoRA",
}


def config_problems(raw: Mapping[str, Any]) -> list[str]:
    """One line for each key whose value decal cannot honour."""
    problems = []
    for key, value in sorted(raw.items()):
        if key in _FIELDS | _FACTS | _ONLY_FOR_MAKING or key == "init_lora_weights":
            continue
        if not value or value == DEFAULTS.get(key):
            continue
        meaning = _MEANING.get(key, "" if key in DEFAULTS else "a setting decal does not know")
        problems.append(f"{key}: {_short(value)}" + (f" ({meaning})" if meaning else ""))
    problems += [
        f"{key}: {_short(raw[key])} (not {'text' if kind is str else 'a table'})"
        for key, kind in _KINDS.items()
        if raw.get(key) is not None and not isinstance(raw[key], kind)
    ]
    base = raw.get("base_model_name_or_path")
    if isinstance(base, str) and base and not may_be_path(base):
        problems.append(f"base_model_name_or_path: {_short(base)} (neither a hub id nor a path)")
    if not any(raw.get("init_lora_weights", True) is x for x in (True, False)) and (
        raw["init_lora_weights"] not in _PLAIN_INITS
    ):
        value = raw["init_lora_weights"]
        problems.append(f"init_lora_weights: {_short(value)} (changes the base's own weights)")
    return problems


def config_fields(raw: Mapping[str, Any], modules: Iterable[str]) -> LoraConfig | list[str]:
    """The LoRA settings in a raw adapter_config.json, or what is wrong with them.

    Missing keys have peft's defaults (r 8, lora_alpha 8, no dropout), not decal's. `modules` are
    the paths that have tensors: they become the target modules where the file names none.
    """
    given = {key: raw[key] for key in sorted(_FIELDS & raw.keys())}
    fields = {**{key: DEFAULTS[key] for key in _FIELDS}, **given}
    targets = fields["target_modules"]
    if isinstance(targets, str) and targets.lower() == "all-linear":
        targets = "all-linear"
    fields["target_modules"] = sorted(modules) if targets is None else targets
    problems = [f"{key}: null" for key in ("r", "lora_alpha") if fields[key] is None]
    for key in ("target_modules", "exclude_modules", "layers_pattern", "modules_to_save"):
        value = fields[key]
        if value is None or (isinstance(value, str) and key != "modules_to_save"):
            continue
        if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
            problems.append(f"{key}: {_short(value)} (neither a string nor a list of strings)")
        elif key in ("target_modules", "exclude_modules"):
            fields[key] = sorted(set(value))
        elif key == "modules_to_save":
            fields[key] = list(dict.fromkeys(value))
    for key in ("exclude_modules", "layers_pattern", "layers_to_transform"):
        if fields[key] in ([], ""):
            fields[key] = None
    init = raw.get("init_lora_weights", True)
    fields["init_lora_weights"] = init if init in (True, False, "gaussian") else True
    try:
        if not problems:
            return LoraConfig.model_validate(fields, strict=True)
    except ValidationError as error:
        problems = [f"{'.'.join(map(str, e['loc']))}: {e['msg'].lower()}" for e in error.errors()]
    return problems


def pattern_problems(config: LoraConfig, modules: Iterable[str]) -> list[str]:
    """One line for each setting with a pattern that could take forever on these modules.

    Raises re.error for a broken expression.
    """
    names = tuple(modules)
    targets, excluded = config.target_modules, config.exclude_modules
    layers = config.layers_pattern
    given = {
        "target_modules": [targets] if isinstance(targets, str) else [],
        "exclude_modules": [excluded] if isinstance(excluded, str) else [],
        "layers_pattern": [layers] if isinstance(layers, str) else layers or (),
        "rank_pattern": config.rank_pattern,
        "alpha_pattern": config.alpha_pattern,
        "modules_to_save": config.modules_to_save,
    }
    found = []
    for key, patterns in given.items():
        for pattern in patterns:
            # Only targets and exclusions are matched as they are, the others behind a beginning.
            whole = key in ("target_modules", "exclude_modules")
            reason = why_costly(pattern if whole else rf"(.*\.)?({pattern})", names)
            if reason:
                found.append(f"{key}: {_short(pattern)} ({reason})")
    return found


def rest(raw: Mapping[str, Any]) -> dict[str, Any]:
    """The keys that say something and have no other place in memory, to be written again."""
    kept = {
        key: value
        for key, value in raw.items()
        if key not in _FIELDS | _FACTS and (key not in DEFAULTS or value != DEFAULTS[key])
    }
    if kept.get("init_lora_weights") in (False, "gaussian"):
        del kept["init_lora_weights"]
    return kept


def misnamed(module: str, config: LoraConfig) -> str | None:
    """Why the settings do not choose `module`, which has factors; None if they do.

    A string is a regular expression for the whole path (`all-linear` takes everything), a list
    holds whole paths or their endings. Raises re.error for a broken expression.
    """
    if not _named(module, config.target_modules):
        return "is not named by target_modules"
    if config.exclude_modules and _named(module, config.exclude_modules):
        return "is named by exclude_modules"
    saved = any(re.match(rf"(^|.*\.){m}($|\..*)", module) for m in config.modules_to_save)
    if saved:
        return "is named by modules_to_save, it is trained whole"
    layers = config.layers_to_transform
    if layers is None or isinstance(config.target_modules, str):
        return None
    number = _layer_number(module, config.layers_pattern)
    chosen = (layers,) if isinstance(layers, int) else layers
    return None if number in chosen else "is in no layer of layers_to_transform"


def _named(module: str, names: str | Sequence[str]) -> bool:
    if isinstance(names, str):
        return names == "all-linear" or re.fullmatch(names, module) is not None
    return any(module == name or module.endswith("." + name) for name in names)


def _layer_number(module: str, pattern: str | Sequence[str] | None) -> int | None:
    """The first number after the list of layers in a module's path, by peft's rule."""
    if not pattern:
        found = re.match(r".*?\.[^.]*\.(\d+)\.", module)
        return int(found[1]) if found else None
    for name in [pattern] if isinstance(pattern, str) else pattern:
        if found := re.match(rf"(?:^|.*?\.){name}\.(\d+)\.", module):
            return int(found[1])
    return None


def saved_by(parameter: str, modules_to_save: Iterable[str]) -> str | None:
    """The module that modules_to_save names, by peft's rule, and that holds the parameter."""
    names = tuple(modules_to_save)
    return next((m for m in _holders(parameter) if names and m.endswith(names)), None)


def _holders(parameter: str) -> list[str]:
    """The modules that a parameter is in, outermost first."""
    parts = parameter.split(".")
    return [".".join(parts[:n]) for n in range(1, len(parts))]


def dotted(modules_to_save: Sequence[str], parameters: Iterable[str]) -> tuple[str, ...]:
    """modules_to_save such that ends after a dot reach all that peft's rule reaches."""
    names = list(modules_to_save)
    for parameter in parameters:
        module = saved_by(parameter, modules_to_save)
        if module and not any(_named(m, names) for m in _holders(parameter)):
            names.append(module)
    return tuple(names)


def _whole_names(modules_to_save: Sequence[str], parameters: Iterable[str]) -> list[str]:
    """modules_to_save such that peft's rule reaches no more than ends after a dot do."""
    names = {name: [name] for name in modules_to_save}
    for name in set(names) - _UNIQUE_ENDS:
        inside = [m for p in parameters for m in _holders(p) if _named(m, [name])]
        names[name] = sorted(set(inside)) or [name]
    return list(dict.fromkeys(whole for found in names.values() for whole in found))


def unsaved(
    modules_to_save: Sequence[str], parameters: Iterable[str], task_type: str | None
) -> tuple[list[str], list[str]]:
    """Entries of modules_to_save of which there is no tensor: (wrongly so, peft's own additions).

    For a classifier peft names the heads of all architectures; only those of this one have tensors.
    """
    names = list(parameters)
    without = [s for s in modules_to_save if not any(saved_by(name, [s]) for name in names)]
    automatic = _AUTOMATIC.get(task_type or "", ())
    return [s for s in without if s not in automatic], [s for s in without if s in automatic]


def to_json(
    config: LoraConfig,
    modules: Iterable[str],
    parameters: Sequence[str],
    others: Mapping[str, Any],
) -> dict[str, Any]:
    """All 41 keys in sorted order, and what `others` has beyond them.

    `modules` have factors, `parameters` are trained whole.

    `all-linear` and `attention` are decal's words for a choice that was made on the whole model;
    in the file stand the modules that were chosen, so that every reader chooses the same. So it is
    for a regular expression with layers_to_transform, which peft takes with lists only.
    """
    targets = config.target_modules
    layers = config.layers_to_transform
    if targets in ("all-linear", "attention") or (isinstance(targets, str) and layers is not None):
        targets = tuple(modules)
    init = config.init_lora_weights
    if config.lora_bias and init:
        init = True  # peft refuses another start beside lora_bias; after training it says nothing
    elif init is True:
        init = others.get("init_lora_weights", True)
    values = {
        **DEFAULTS,
        **others,
        "alpha_pattern": {k: _number(v) for k, v in config.alpha_pattern.items()},
        "bias": config.bias,
        "exclude_modules": _names(config.exclude_modules),
        "init_lora_weights": init,
        "layers_pattern": _names(config.layers_pattern) if layers is not None else None,
        "layers_to_transform": layers if layers is None or isinstance(layers, int) else [*layers],
        "lora_alpha": _number(config.lora_alpha),
        "lora_bias": config.lora_bias,
        "lora_dropout": config.lora_dropout,
        "modules_to_save": _whole_names(config.modules_to_save, parameters) or None,
        "r": config.r,
        "rank_pattern": dict(config.rank_pattern),
        "target_modules": targets if isinstance(targets, str) else sorted(targets),
        "use_rslora": config.use_rslora,
    }
    return dict(sorted(values.items()))


def _number(value: float) -> float:
    return int(value) if value == int(value) else value


def _names(value: str | Sequence[str] | None) -> str | list[str] | None:
    return value if value is None or isinstance(value, str) else list(value)


def _short(value: Any) -> str:
    text = "true" if value is True else repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
