"""The PEFT adapter folder: adapter_config.json and adapter_model.safetensors, read and written.

Which key is what stands in peft_keys.py, what the settings mean in peft_config.py. The delta of a
module is scaling * B @ A, transposed where the base stores [in, out] (embeddings, GPT-2's Conv1D),
which is the base's matter and not the adapter's. decal's own facts stand in the safetensors
metadata, because peft ignores strings there and warns of keys it does not know in the JSON.

Both directions are strict. Reading refuses what it would otherwise lose: a tensor that has no
place, a rank that is not the config's, a module that the settings do not choose, a variant that is
not plain LoRA. Writing reads the new folder again and compares before it is put in place.

peft also writes `adapter_model.bin` where it is told to, and did so always before 2023; it is read,
with a warning. Named adapters lie in sub-folders; each is read by its own folder.

Knows no model: whether the modules exist is asked where the adapter meets one.
"""

from __future__ import annotations

import math
import os
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from decal.config import LoraConfig
from decal.errors import AdapterError, DecalWarning, StorageError, VerificationError
from decal.store.files import (
    atomic_folder,
    fsync_folder,
    read_json,
    scratch_folder,
    write_json,
)
from decal.store.peft_config import config_fields, config_problems, pattern_problems, rest, to_json
from decal.store.peft_keys import (
    FOREIGN,
    PREFIX,
    Contents,
    Misfit,
    arranged,
    fitted,
    pair_keys,
)
from decal.store.pickled import load_pickled
from decal.store.tensorfile import TensorSpec, dtype_name, load_tensors, read_header, save_tensors

__all__ = [
    "CONFIG_NAME",
    "WEIGHTS_NAME",
    "LoraTensors",
    "ModuleHeader",
    "PeftAdapter",
    "PeftHeader",
    "peek_adapter",
    "read_adapter",
    "write_adapter",
]

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
_PICKLE_NAME = "adapter_model.bin"
_SHOWN = 12
"""Lines of an error; kinds of problems, each with its count."""
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
    other_settings: dict[str, Any] = field(default_factory=dict)
    """Keys of adapter_config.json that LoraConfig has no field for (eva_config, …); written
    again as they are."""


class ModuleHeader(NamedTuple):
    """One adapted module, from the file's header."""

    r: int
    shape: tuple[int, int]
    """[out, in]; of an embedding [dimensions, vocabulary]."""
    embedding: bool


@dataclass(frozen=True, kw_only=True)
class PeftHeader:
    """What a PEFT folder says about itself, no tensor read."""

    config: LoraConfig
    modules: dict[str, ModuleHeader]
    full: dict[str, tuple[int, ...]]
    """Parameter trained whole -> shape."""
    parameters: int
    """Trained numbers: factors, biases of B and parameters trained whole."""
    metadata: dict[str, str]
    base_model_name_or_path: str | None
    revision: str | None
    task_type: str | None


@dataclass(frozen=True)
class _Stored:
    """A weights file, its header read."""

    path: Path
    specs: dict[str, TensorSpec]
    metadata: dict[str, str]
    load: Callable[[], Mapping[str, Tensor]]


@dataclass(frozen=True)
class _Opened:
    """A folder whose settings and header fit each other."""

    raw: dict[str, Any]
    stored: _Stored
    config: LoraConfig
    contents: Contents


def read_adapter(path: str | Path) -> PeftAdapter:
    """Reads a PEFT folder.

    16-bit tensors are widened to float32. Keys that are missing in the JSON have peft's defaults.

    Raises:
        AdapterError: a file is missing or damaged, or the adapter is not plain LoRA; every setting
            and tensor that does not fit is counted in one error.
    """
    folder = Path(path)
    opened = _open(folder)
    contents, raw = opened.contents, opened.raw
    values = _load(folder, opened.stored, contents)
    return PeftAdapter(
        config=opened.config,
        tensors={
            module: LoraTensors(
                values[pair.A], values[pair.B], None if pair.bias is None else values[pair.bias]
            )
            for module, pair in contents.pairs.items()
        },
        embeddings=frozenset(m for m, pair in contents.pairs.items() if pair.embedding),
        full={name: values[key] for name, key in sorted(contents.full.items())},
        base_copies={name: values[key] for name, key in sorted(contents.copies.items())},
        metadata=opened.stored.metadata,
        base_model_name_or_path=raw.get("base_model_name_or_path"),
        revision=raw.get("revision"),
        task_type=raw.get("task_type"),
        fan_in_fan_out=bool(raw.get("fan_in_fan_out", False)),
        auto_mapping=raw.get("auto_mapping"),
        other_settings=rest(raw),
    )


def peek_adapter(path: str | Path) -> PeftHeader:
    """What `read_adapter` would read, from the settings and the header alone.

    Raises:
        AdapterError: like `read_adapter`, apart from what only the tensors' values can tell.
    """
    opened = _open(Path(path))
    contents, raw, specs = opened.contents, opened.raw, opened.stored.specs
    trained = list(contents.full.values())
    for pair in contents.pairs.values():
        trained += [key for key in (pair.A, pair.B, pair.bias) if key is not None]
    return PeftHeader(
        config=opened.config,
        modules={m: ModuleHeader(p.r, p.shape, p.embedding) for m, p in contents.pairs.items()},
        full={name: specs[key].shape for name, key in sorted(contents.full.items())},
        parameters=sum(math.prod(specs[key].shape) for key in trained),
        metadata=opened.stored.metadata,
        base_model_name_or_path=raw.get("base_model_name_or_path"),
        revision=raw.get("revision"),
        task_type=raw.get("task_type"),
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
        AdapterError: there are no tensors, or they do not fit the config.
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
    others = {
        **adapter.other_settings,
        "auto_mapping": adapter.auto_mapping,
        "base_model_name_or_path": adapter.base_model_name_or_path,
        "fan_in_fan_out": adapter.fan_in_fan_out,
        "revision": adapter.revision,
        "task_type": adapter.task_type,
    }
    raw = to_json(adapter.config, sorted(adapter.tensors), sorted(adapter.full), others)
    write_json(folder / CONFIG_NAME, raw)
    tensors = _by_key(adapter)
    save_tensors(folder / WEIGHTS_NAME, tensors, {"format": "pt", **adapter.metadata})
    _verify(folder, adapter, tensors, raw)


def _by_key(adapter: PeftAdapter) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for module, parts in adapter.tensors.items():
        keys = pair_keys(module, embedding=module in adapter.embeddings)
        tensors |= {key: part for key, part in zip(keys, parts, strict=True) if part is not None}
    for name, value in adapter.full.items():
        module, _, last = name.rpartition(".")
        based = last == "bias" and module in adapter.tensors
        tensors[f"{PREFIX}{module}.base_layer.bias" if based else PREFIX + name] = value
    return {key: t.detach().to("cpu", torch.float32) for key, t in tensors.items()}


def _verify(
    folder: Path, adapter: PeftAdapter, meant: Mapping[str, Tensor], raw: Mapping[str, Any]
) -> None:
    found = read_adapter(folder)
    read = _by_key(found)
    differing = [
        key
        for key in sorted(meant.keys() | read.keys())
        if key not in read or key not in meant or not torch.equal(read[key], meant[key])
    ]
    if differing:
        raise VerificationError(
            f"{len(differing)} of {len(meant)} tensors read back differ from what was written",
            details=differing[:1],
            hint="the disk or its driver is faulty; write to another disk",
        )
    same = all(
        found.config.scaling_of(module) == adapter.config.scaling_of(module)
        for module in adapter.tensors
    )
    again = read_json(folder / CONFIG_NAME, VerificationError)
    if not same or again != raw or found.metadata != adapter.metadata:
        raise VerificationError(f"{CONFIG_NAME} read back differs from what was written")


def _open(folder: Path) -> _Opened:
    raw = _read_config(folder)
    stored = _stored(folder)
    contents = arranged(stored.specs)
    settings = config_problems(raw)
    config = config_fields(raw, contents.pairs)
    if isinstance(config, list):
        settings += config
    else:
        try:
            tying = bool(raw.get("ensure_weight_tying"))
            task = raw["task_type"] if isinstance(raw.get("task_type"), str) else None
            costly = pattern_problems(config, contents.pairs)
            settings += costly
            if not costly:
                config = fitted(contents, config, stored.specs, task_type=task, tying=tying)
        except re.error as error:
            settings.append(f"a name pattern of the settings is no regular expression: {error}")
    if not stored.specs:
        contents.problems.append((stored.path.name, "holds no tensors"))
    elif not contents.pairs and not contents.problems:
        contents.problems.append((stored.path.name, "holds no factors, lora_A and lora_B"))
    _refuse(folder, settings, contents.problems)
    assert isinstance(config, LoraConfig)
    return _Opened(raw, stored, config, contents)


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


def _stored(folder: Path) -> _Stored:
    """The weights of a folder: safetensors, or the older pickle."""
    path, pickled = folder / WEIGHTS_NAME, folder / _PICKLE_NAME
    if not path.exists() and pickled.exists():
        tensors: dict[str, Tensor] = load_pickled(pickled, AdapterError, hint=_AGAIN)
        specs = {key: TensorSpec(dtype_name(t.dtype), tuple(t.shape)) for key, t in tensors.items()}
        warnings.warn(
            f"adapter `{folder}` is stored as a pickle ({_PICKLE_NAME}); no code in it "
            "was run, but safetensors is the safer form, and saving it again writes that",
            DecalWarning,
            stacklevel=4,
        )
        return _Stored(pickled, specs, {}, lambda: {k: t.clone() for k, t in tensors.items()})
    if not path.exists():
        raise AdapterError(f"adapter `{folder}` has no {WEIGHTS_NAME}", hint=_AGAIN)
    file = read_header(path, AdapterError, hint=_AGAIN)
    return _Stored(
        path,
        {key: entry.spec for key, entry in file.entries.items()},
        {key: text for key, text in file.metadata.items() if key != "format"},
        lambda: load_tensors(file),
    )


def _refuse(folder: Path, settings: list[str], tensors: list[Misfit]) -> None:
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
    features = bool(settings) or not reasons.keys().isdisjoint(FOREIGN.values())
    raise AdapterError(
        f"adapter `{folder}` is not plain LoRA: {counts} {verb} not fit",
        details=details[:_SHOWN],
        hint=_MERGE if features else _AGAIN,
    )


def _count(problems: Sequence[object], noun: str) -> str:
    return f"{len(problems)} {noun}{'' if len(problems) == 1 else 's'}" if problems else ""


def _load(folder: Path, stored: _Stored, contents: Contents) -> dict[str, Tensor]:
    """All tensors, float32. Raises AdapterError for NaN, and for copies that are none."""
    try:
        tensors = {key: tensor.float() for key, tensor in stored.load().items()}
    except OSError as error:
        raise StorageError(f"`{stored.path}` cannot be read: {error.strerror or error}") from error
    unlike = [key for known, key in contents.twins if not torch.equal(tensors[known], tensors[key])]
    if unlike:
        raise AdapterError(
            f"adapter `{folder}` holds {len(unlike)} parameters twice, with different values",
            details=unlike[:1],
            hint=_AGAIN,
        )
    bad = [key for key, tensor in tensors.items() if not bool(tensor.isfinite().all())]
    if bad:
        raise AdapterError(
            f"adapter `{folder}` holds NaN or infinity in {len(bad)} of {len(tensors)} tensors",
            details=bad[:1],
            hint="its training diverged; use an earlier checkpoint",
        )
    return tensors
