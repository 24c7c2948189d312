"""The PEFT adapter folder: adapter_config.json and adapter_model.safetensors, read and written.

Layout. For every adapted module with path m in the model (`model.layers.0.self_attn.q_proj`), the
file holds `base_model.model.<m>.lora_A.weight` [r, in] and `base_model.model.<m>.lora_B.weight`
[out, r]; the prefix is that of peft's two wrappers, the adapter's name is not stored. The delta is
scaling * B @ A, transposed where the base stores [in, out] (GPT-2's Conv1D), which is the base's
matter and not the adapter's. decal's own facts stand in the safetensors metadata, because peft
ignores strings there and warns of keys it does not know in the JSON.

Both directions are strict. Reading refuses what it would otherwise lose: a tensor that is no
factor of a pair, a rank that is not the config's, a module that target_modules does not name, a
variant that is not plain LoRA. Writing reads the new folder again and compares before it is put in
place.

Knows no model: whether the modules exist is asked where the adapter meets one.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from decal.config import LoraConfig
from decal.errors import AdapterError, StorageError, VerificationError
from decal.store.files import (
    atomic_folder,
    fsync_folder,
    read_json,
    scratch_folder,
    write_json,
)
from decal.store.peft_config import config_fields, config_problems, matches, to_json
from decal.store.tensorfile import TensorFile, load_tensors, read_header, save_tensors

__all__ = [
    "CONFIG_NAME",
    "WEIGHTS_NAME",
    "LoraTensors",
    "PeftAdapter",
    "read_adapter",
    "write_adapter",
]

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
_PREFIX = "base_model.model."
_SUFFIXES = {".lora_A.weight": "A", ".lora_B.weight": "B"}
_FLOATS = ("F32", "BF16", "F16")
_BASE_COPY = "a copy of the base's own weight (save again with save_embedding_layers=False)"
_SHOWN = 12
"""Lines of an error; kinds of problems, each with its count."""
_UNKNOWN = "neither lora_A.weight nor lora_B.weight of a module"
_FOREIGN = {
    "lora_magnitude_vector": "a DoRA magnitude",
    "lora_embedding_A": "LoRA on an embedding",
    "lora_embedding_B": "LoRA on an embedding",
    "trainable_tokens_delta": "trained token embeddings",
}
_Misfit = tuple[str, str]
"""A tensor or module, and what is wrong with it."""
_MERGE = "merge it with peft (merge_and_unload) and use the merged model as the base"
_AGAIN = "the file was cut off or changed; copy or download the adapter again"


class LoraTensors(NamedTuple):
    """The factors of one module, float32 on the CPU."""

    A: Tensor
    """[r, in]"""
    B: Tensor
    """[out, r]"""
    bias: Tensor | None = None
    """[out], B's own (`lora_bias`), scaled like B A; None without it."""


@dataclass(frozen=True, kw_only=True)
class PeftAdapter:
    """One adapter in memory: what a PEFT folder holds."""

    config: LoraConfig
    tensors: dict[str, LoraTensors]
    """Module path in the model -> its factors."""
    embeddings: frozenset[str] = frozenset()
    """Which of these modules are embeddings: in = vocabulary, out = dimensions."""
    full: dict[str, Tensor] = field(default_factory=dict)
    """Parameter name in the base model -> its trained value: modules_to_save and biases."""
    base_copies: dict[str, Tensor] = field(default_factory=dict)
    """Parameter name in the base model -> the base's weight as peft stored it beside the adapter
    of an embedding or a head; the base must hold the same. Never written."""
    metadata: dict[str, str] = field(default_factory=dict)
    """decal's own facts, keys `decal.*`."""
    base_model_name_or_path: str | None = None
    revision: str | None = None
    task_type: str | None = "CAUSAL_LM"
    fan_in_fan_out: bool = False
    """What the file says; the base alone decides how its weights lie."""
    auto_mapping: dict[str, Any] | None = None


def read_adapter(path: str | Path) -> PeftAdapter:
    """Reads a PEFT folder.

    16-bit factors are widened to float32. Keys that are missing in the JSON have peft's defaults.

    Raises:
        AdapterError: a file is missing or damaged, or the adapter is not plain LoRA; every setting
            and tensor that does not fit is counted in one error.
    """
    folder = Path(path)
    raw = _read_config(folder)
    file = read_header(_weights_file(folder), AdapterError, hint=_AGAIN)
    pairs, tensor_problems = _pairs(file, raw.get("r", 8))
    config = config_fields(raw, pairs)
    setting_problems = config_problems(raw)
    if isinstance(config, list):
        setting_problems += config
    else:
        tensor_problems += _unnamed(pairs, config)
    _refuse(folder, setting_problems, tensor_problems)
    assert isinstance(config, LoraConfig)
    return PeftAdapter(
        config=config,
        tensors=_load(file, pairs),
        metadata={k: v for k, v in file.metadata.items() if k != "format"},
        base_model_name_or_path=raw.get("base_model_name_or_path"),
        revision=raw.get("revision"),
        task_type=raw.get("task_type"),
        fan_in_fan_out=bool(raw.get("fan_in_fan_out", False)),
        auto_mapping=raw.get("auto_mapping"),
    )


def write_adapter(
    path: str | Path,
    adapter: PeftAdapter,
    *,
    exist: Literal["refuse", "replace", "into"] = "refuse",
) -> None:
    """Writes a PEFT folder that peft, vLLM and the others read.

    The folder is written beside `path`, read again and compared to the bit, then renamed. If
    `path` is there and not empty it is refused; with `exist="replace"` the new folder takes its
    place; with `exist="into"` the two files are put beside what is there (as `save_pretrained`
    does).

    Raises:
        AdapterError: there are no tensors, or a pair does not fit the config.
        OutputError: `path` is taken.
        StorageError: the disk refused.
        VerificationError: what was read again is not what was written.
    """
    out = Path(path)
    if not adapter.tensors:
        raise AdapterError(f"adapter `{out}` has no tensors, there is nothing to write")
    if exist == "into" and out.is_dir():
        with scratch_folder(out / "adapter") as folder:
            _write_folder(folder, adapter)
            for name in (WEIGHTS_NAME, CONFIG_NAME):
                os.replace(folder / name, out / name)
            fsync_folder(out)
        return
    with atomic_folder(out, force=exist == "replace", marker=CONFIG_NAME) as folder:
        _write_folder(folder, adapter)


def _write_folder(folder: Path, adapter: PeftAdapter) -> None:
    tensors: dict[str, Tensor] = {}
    for module, (A, B, _) in adapter.tensors.items():
        tensors[f"{_PREFIX}{module}.lora_A.weight"] = A.detach().to("cpu", torch.float32)
        tensors[f"{_PREFIX}{module}.lora_B.weight"] = B.detach().to("cpu", torch.float32)
    others = {
        "auto_mapping": adapter.auto_mapping,
        "base_model_name_or_path": adapter.base_model_name_or_path,
        "fan_in_fan_out": adapter.fan_in_fan_out,
        "revision": adapter.revision,
        "task_type": adapter.task_type,
    }
    write_json(folder / CONFIG_NAME, to_json(adapter.config, sorted(adapter.tensors), others))
    save_tensors(folder / WEIGHTS_NAME, tensors, {"format": "pt", **adapter.metadata})
    _verify(folder, adapter, tensors)


def _verify(folder: Path, adapter: PeftAdapter, meant: Mapping[str, Tensor]) -> None:
    found = read_adapter(folder)
    differing = [
        module
        for module, pair in found.tensors.items()
        if not (
            torch.equal(pair.A, meant[f"{_PREFIX}{module}.lora_A.weight"])
            and torch.equal(pair.B, meant[f"{_PREFIX}{module}.lora_B.weight"])
        )
    ]
    if differing or found.tensors.keys() != adapter.tensors.keys():
        raise VerificationError(
            f"{len(differing)} of {len(meant) // 2} modules read back differ from what was written",
            details=differing[:1],
            hint="the disk or its driver is faulty; write to another disk",
        )
    if found.config.scaling != adapter.config.scaling or found.metadata != adapter.metadata:
        raise VerificationError(f"{CONFIG_NAME} read back differs from what was written")


def _read_config(folder: Path) -> dict[str, Any]:
    if not folder.is_dir():
        what = "is a file" if folder.exists() else "does not exist"
        raise AdapterError(
            f"adapter `{folder}` {what}", hint=f"give the folder that holds {CONFIG_NAME}"
        )
    if not (folder / CONFIG_NAME).exists():
        raise AdapterError(f"adapter `{folder}` has no {CONFIG_NAME}", hint=_elsewhere(folder))
    raw = read_json(folder / CONFIG_NAME, AdapterError, hint=_AGAIN)
    kind = raw.get("peft_type")
    if kind != "LORA":
        raise AdapterError(
            f"adapter `{folder}` is of peft_type {kind!r}, decal reads LORA",
            hint=_MERGE,
        )
    return raw


def _elsewhere(folder: Path) -> str:
    inner = sorted(f.parent for f in folder.glob(f"*/{CONFIG_NAME}"))
    if inner:
        return f"there is one in `{inner[0]}`"
    if (folder / "config.json").exists():
        return "this is a full model, not an adapter"
    return f"give the folder that holds {CONFIG_NAME}"


def _weights_file(folder: Path) -> Path:
    file = folder / WEIGHTS_NAME
    if file.exists():
        return file
    if (folder / "adapter_model.bin").exists():
        raise AdapterError(
            f"adapter `{folder}` has only adapter_model.bin, a pickle that can run code",
            hint="load it with peft and save it again: save_pretrained writes safetensors",
        )
    raise AdapterError(f"adapter `{folder}` has no {WEIGHTS_NAME}", hint=_AGAIN)


def _pairs(file: TensorFile, rank: Any) -> tuple[dict[str, dict[str, str]], list[_Misfit]]:
    """Module -> {"A": key, "B": key} of the complete pairs, and why every other tensor is none."""
    found: dict[str, dict[str, str]] = {}
    problems: list[_Misfit] = []
    for key, entry in sorted(file.entries.items()):
        suffix = next((s for s in _SUFFIXES if key.endswith(s)), None)
        module = key.removeprefix(_PREFIX).removesuffix(suffix or "")
        if not key.startswith(_PREFIX) or module.startswith(_PREFIX):
            problems.append((key, f"does not have the prefix `{_PREFIX}` once"))
        elif suffix is None or not module:
            problems.append((key, _foreign(key)))
        elif len(entry.spec.shape) != 2 or entry.spec.dtype not in _FLOATS:
            problems.append((key, f"{entry.spec.dtype} {list(entry.spec.shape)} is no factor"))
        else:
            found.setdefault(module, {})[_SUFFIXES[suffix]] = key
    pairs = {}
    for module, keys in found.items():
        if len(keys) < 2:
            other = "B" if "A" in keys else "A"
            problems.append((module, f"has lora_{next(iter(keys))} but no lora_{other}"))
            continue
        a, b = (file.entries[keys[x]].spec.shape for x in "AB")
        if a[0] == b[1] == rank:
            pairs[module] = keys
        else:
            ranks = f"A has rank {a[0]}, B has {b[1]}, the config has r={rank}"
            problems.append((module, ranks))
    if not file.entries:
        problems.append((WEIGHTS_NAME, "holds no tensors"))
    return pairs, problems


def _foreign(key: str) -> str:
    if key.endswith(".base_layer.weight"):
        return _BASE_COPY
    return _FOREIGN.get(key.rpartition(".")[2], _UNKNOWN)


def _unnamed(pairs: Mapping[str, object], config: LoraConfig) -> list[_Misfit]:
    try:
        return [
            (module, "is not named by target_modules")
            for module in pairs
            if not matches(module, config.target_modules)
        ]
    except re.error as error:
        return [("target_modules", f"{config.target_modules!r} is no regular expression: {error}")]


def _refuse(folder: Path, settings: list[str], tensors: list[_Misfit]) -> None:
    if not settings and not tensors:
        return
    counts = " and ".join(filter(None, [_count(settings, "setting"), _count(tensors, "tensor")]))
    verb = "does" if len(settings) + len(tensors) == 1 else "do"
    reasons: dict[str, list[str]] = {}
    for subject, reason in tensors:
        reasons.setdefault(reason, []).append(subject)
    details = list(settings)
    for reason, subjects in reasons.items():
        more = f"  (and {len(subjects) - 1} more)" if subjects[1:] else ""
        details.append(f"{subjects[0]}: {reason}{more}")
    features = bool(settings) or not reasons.keys().isdisjoint({_BASE_COPY, *_FOREIGN.values()})
    raise AdapterError(
        f"adapter `{folder}` is not plain LoRA: {counts} {verb} not fit",
        details=details[:_SHOWN],
        hint=_MERGE if features else _AGAIN,
    )


def _count(problems: Sequence[object], noun: str) -> str:
    return f"{len(problems)} {noun}{'' if len(problems) == 1 else 's'}" if problems else ""


def _load(file: TensorFile, pairs: Mapping[str, Mapping[str, str]]) -> dict[str, LoraTensors]:
    try:
        stored = load_tensors(file)
    except OSError as error:
        raise StorageError(f"`{file.path}` cannot be read: {error.strerror or error}") from error
    tensors = {
        module: LoraTensors(stored[keys["A"]].float(), stored[keys["B"]].float())
        for module, keys in sorted(pairs.items())
    }
    bad = [m for m, pair in tensors.items() if not all(bool(t.isfinite().all()) for t in pair[:2])]
    if bad:
        raise AdapterError(
            f"adapter `{file.path.parent}` holds NaN or infinity in {len(bad)} of "
            f"{len(tensors)} modules",
            details=bad[:1],
            hint="its training diverged; use an earlier checkpoint",
        )
    return tensors
