"""adapter_config.json as peft 0.21 writes it: all 41 keys, and which of them decal understands.

Reading is strict, because peft itself only warns of a key it does not know, and an adapter that
is read without one of its features is a different adapter. A key is fine if decal understands it,
if it only mattered when the adapter was made, or if it has its default or an empty value.
Everything else is named and refused, together with what is wrong with the tensors (peft.py raises
once for all).

Knows no tensors and no folders.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from pydantic import ValidationError

from decal.config import LoraConfig

__all__ = ["DEFAULTS", "PEFT_VERSION", "config_fields", "config_problems", "matches", "to_json"]

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

_UNDERSTOOD = {
    "auto_mapping", "base_model_name_or_path", "exclude_modules", "fan_in_fan_out",
    "init_lora_weights", "layers_pattern", "layers_to_transform", "lora_alpha", "lora_dropout",
    "peft_type", "r", "revision", "target_modules", "task_type", "use_rslora",
}  # fmt: skip
_ONLY_FOR_MAKING = {
    "eva_config", "inference_mode", "loftq_config", "megatron_core", "peft_version",
    "qalora_group_size", "runtime_config",
}  # fmt: skip
_NARROWING = ("exclude_modules", "layers_to_transform")
"""Keys that take modules out of target_modules again."""
_PLAIN_INITS = (True, False, "gaussian", "orthogonal", "eva")
"""Starting values that leave the base as it is; after training they no longer matter."""

_MEANING = {
    "alora_invocation_tokens": "aLoRA, active only after its invocation tokens",
    "alpha_pattern": "an alpha per module",
    "arrow_config": "Arrow routing",
    "bias": "trained biases",
    "kasa_config": "KaSA",
    "layer_replication": "replicated layers",
    "lora_bias": "a bias on B",
    "megatron_config": "Megatron layers",
    "modules_to_save": "fully trained modules",
    "monteclora_config": "MonteCLoRA",
    "rank_pattern": "a rank per module",
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
        if key in _UNDERSTOOD or key in _ONLY_FOR_MAKING:
            continue
        if not value or value == DEFAULTS.get(key):
            continue
        meaning = _MEANING.get(key, "" if key in DEFAULTS else "a setting decal does not know")
        problems.append(f"{key}: {_short(value)}" + (f" ({meaning})" if meaning else ""))
    if not any(raw.get("init_lora_weights", True) is x for x in (True, False)) and (
        raw["init_lora_weights"] not in _PLAIN_INITS
    ):
        value = raw["init_lora_weights"]
        problems.append(f"init_lora_weights: {_short(value)} (changes the base's own weights)")
    return problems


def config_fields(raw: Mapping[str, Any], modules: Iterable[str]) -> LoraConfig | list[str]:
    """The LoRA settings in a raw adapter_config.json, or what is wrong with them.

    Missing keys have peft's defaults (r 8, lora_alpha 8, no dropout), not decal's. `modules` are
    the paths that have tensors: they become the target modules where the file gives none or
    narrows them with keys that have no counterpart here.
    """
    modules = sorted(modules)
    targets = raw.get("target_modules")
    if isinstance(targets, str) and targets.lower() == "all-linear":
        targets = "all-linear"
    if targets is None or any(raw.get(key) for key in _NARROWING):
        targets = modules
    if not isinstance(targets, str):
        if not isinstance(targets, list) or not all(isinstance(t, str) for t in targets):
            return [f"target_modules: {_short(targets)} (neither a string nor a list of strings)"]
        targets = tuple(sorted(targets))
    init = raw.get("init_lora_weights", True)
    fields = {
        "r": raw.get("r", 8),
        "lora_alpha": raw.get("lora_alpha", 8),
        "lora_dropout": raw.get("lora_dropout", 0.0),
        "use_rslora": raw.get("use_rslora", False),
        "target_modules": targets,
        "init_lora_weights": init if init in (True, False, "gaussian") else True,
    }
    problems = [f"{key}: null" for key in ("r", "lora_alpha") if fields[key] is None]
    try:
        if not problems:
            return LoraConfig.model_validate(fields, strict=True)
    except ValidationError as error:
        problems = [f"{'.'.join(map(str, e['loc']))}: {e['msg'].lower()}" for e in error.errors()]
    return problems


def matches(module: str, target_modules: str | tuple[str, ...]) -> bool:
    """Whether target_modules names `module`, by peft's rule.

    A string is a regular expression for the whole path (`all-linear` takes everything), a list
    holds whole paths or their endings. Raises re.error for a broken expression.
    """
    if isinstance(target_modules, str):
        return target_modules == "all-linear" or re.fullmatch(target_modules, module) is not None
    return any(module == t or module.endswith("." + t) for t in target_modules)


def to_json(
    config: LoraConfig, modules: Iterable[str], others: Mapping[str, Any]
) -> dict[str, Any]:
    """All 41 keys in sorted order.

    `all-linear` and `attention` are decal's words for a choice that was made on the whole model;
    in the file stand the modules that were chosen, so that every reader chooses the same.
    """
    targets = config.target_modules
    if targets in ("all-linear", "attention"):
        targets = tuple(modules)
    alpha = config.lora_alpha
    values = {
        **DEFAULTS,
        **others,
        "init_lora_weights": config.init_lora_weights,
        "lora_alpha": int(alpha) if alpha == int(alpha) else alpha,
        "lora_dropout": config.lora_dropout,
        "r": config.r,
        "target_modules": targets if isinstance(targets, str) else sorted(targets),
        "use_rslora": config.use_rslora,
    }
    return dict(sorted(values.items()))


def _short(value: Any) -> str:
    text = "true" if value is True else repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
