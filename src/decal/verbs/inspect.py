"""`decal inspect`: what a folder holds, from settings and headers alone.

A hundred gigabytes are described as fast as one: no tensor is loaded, with one exception of some
hundred bytes, the JSON in which bitsandbytes keeps its block size.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Mapping
from math import prod
from os.path import expanduser
from pathlib import Path
from typing import Any

from decal.config import FullConfig, LoraConfig, RunConfig
from decal.errors import AdapterError, ConfigError, DecalError
from decal.model.heads import stored_labels
from decal.model.hf import load_config, local_folder
from decal.runfile import load_run
from decal.store.base import BaseFiles, open_base
from decal.store.files import read_json
from decal.store.peft import CONFIG_NAME, ModuleHeader, PeftHeader, peek_adapter
from decal.store.run import RunFolder
from decal.store.tensorfile import TensorEntry, raw_chunks
from decal.untrusted import parse_json
from decal.verbs.provenance import runs_of
from decal.verbs.target import BASE, LABELS, QUANTIZER, resolve

_STATE = ".quant_state.bitsandbytes__"
_TABLES = re.compile(r"\.(nested_)?quant_map$|\.quant_state\.")
"""What bitsandbytes stores once more with every weight: no bits of the weight's own."""
_LONGEST = 10_000
"""Bytes of such a state; it has some three hundred."""


def inspect(path: str | Path) -> dict[str, Any]:
    """Says what is at `path`: a run, an adapter or a model. No weights are loaded.

    Returns:
        Plain JSON; `kind` says which of the three it is. Sizes are in bytes.

    Raises:
        DecalError: nothing there, or nothing that decal knows.
    """
    folder = Path(expanduser(path))
    if (folder / "run.yaml").exists():
        return _run(folder)
    target = resolve(path)
    if target.kind == "adapter":
        return _adapter(Path(target.path))
    return _model(target.path, target.revision)


# --- runs -------------------------------------------------------------------------------------


def _run(folder: Path) -> dict[str, Any]:
    run = RunFolder.look(folder)
    info, rows, steps = run.info(), run.metrics(), run.steps()
    finished = "result" in info
    found: dict[str, Any] = {"kind": "run", "path": str(folder), "finished": finished}
    try:
        found["settings"] = _settings(load_run(folder / "run.yaml"))
    except ConfigError as error:
        found["settings"] = f"cannot be read: {error.message}"
    found |= {k: info[k] for k in ("steps", "rows", "device", "threads", "decal") if k in info}
    if not finished:
        found["last_step"] = rows[-1].get("step") if rows else None
        found["resumes_from"] = steps[-1] if steps else None
    found["losses"] = _losses(rows)
    found["checkpoints"] = steps
    if finished:
        found["result"] = info["result"]
    if (folder / "adapter").is_dir():
        found["adapter"] = _adapter(folder / "adapter")
    if (folder / "model").is_dir():
        found["model"] = _model(str(folder / "model"))
    return found


def _settings(config: RunConfig) -> dict[str, Any]:
    """The settings by which one tells runs apart, each in a word or a number."""
    adapter: dict[str, Any] = {"adapter": config.adapter.method}
    if isinstance(config.adapter, LoraConfig):
        a = config.adapter
        targets = a.target_modules if isinstance(a.target_modules, str) else list(a.target_modules)
        adapter |= {"r": a.r, "lora_alpha": a.lora_alpha, "target_modules": targets}
    elif not isinstance(config.adapter, FullConfig):
        adapter |= {"from": config.adapter.from_}
    train = config.train
    length = {"max_steps": train.max_steps} if train.max_steps else {"epochs": train.epochs}
    return {
        "base": config.base.path,
        "quant": config.quant.format,
        **adapter,
        "data": config.data.path,
        "objective": config.objective,
        **length,
        "lr": train.lr,
        "batch_size": train.batch_size,
        "seed": train.seed,
    }


def _losses(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """First and last training loss, and the best evaluation with its step."""
    trained = [row["loss"] for row in rows if row.get("loss") is not None]
    scored = [row for row in rows if row.get("eval_loss") is not None]
    found: dict[str, Any] = {"first": trained[0], "last": trained[-1]} if trained else {}
    if scored:
        best = min(scored, key=lambda row: float(row["eval_loss"]))
        found |= {"best_eval": best["eval_loss"], "best_eval_step": best.get("step")}
    return found


# --- adapters ---------------------------------------------------------------------------------


def _adapter(folder: Path) -> dict[str, Any]:
    header = peek_adapter(folder)
    config = header.config
    base, quantizer, labels = (_recorded(header, key) for key in (BASE, QUANTIZER, LABELS))
    base = base if isinstance(base, dict) else {}
    files = [folder / CONFIG_NAME, *folder.glob("adapter_model.*")]
    found = {
        "kind": "adapter",
        "path": str(folder),
        "base": header.base_model_name_or_path or base.get("path"),
        "base_fingerprint": base.get("fingerprint"),
        "trained_on": quantizer or base.get("dtype"),
        "method": config.method,
        "task_type": header.task_type,
        "labels": labels,
        "r": config.r,
        "lora_alpha": config.lora_alpha,
        "scaling": config.scaling,
        "use_rslora": config.use_rslora,
        "lora_dropout": config.lora_dropout,
        "bias": config.bias,
        "lora_bias": config.lora_bias,
        "rank_pattern": config.rank_pattern,
        "alpha_pattern": config.alpha_pattern,
        "modules": _module_rows(header),
        "layers": len(header.modules),
        "modules_to_save": list(config.modules_to_save),
        "full": [{"parameter": n, "shape": list(shape)} for n, shape in header.full.items()],
        "parameters": header.parameters,
        "bytes": sum(file.stat().st_size for file in files),
        "written_by": _writer(folder, header),
        "runs": runs_of(header.metadata),
    }
    return {key: value for key, value in found.items() if value not in (None, [], {})}


def _module_rows(header: PeftHeader) -> list[dict[str, Any]]:
    """One row for all modules of one kind, rank and alpha."""
    kinds: dict[tuple[str, int, float], list[ModuleHeader]] = defaultdict(list)
    config = header.config
    for name, module in header.modules.items():
        alpha = config.scaling_of(name) * (module.r**0.5 if config.use_rslora else module.r)
        kinds[name.rpartition(".")[2], module.r, round(alpha, 9)].append(module)
    return [
        {
            "module": name,
            "count": len(found),
            "r": r,
            "lora_alpha": alpha,
            "parameters": sum(module.r * sum(module.shape) for module in found),
        }
        for (name, r, alpha), found in sorted(kinds.items())
    ]


def _recorded(header: PeftHeader, key: str) -> Any:
    """One of decal's own metadata entries; None where there is none or it is no JSON."""
    try:
        return parse_json(header.metadata.get(key, "null"))
    except ValueError:
        return None


def _writer(folder: Path, header: PeftHeader) -> str:
    if "decal.version" in header.metadata:
        return f"decal {header.metadata['decal.version']}"
    version = read_json(folder / CONFIG_NAME, AdapterError).get("peft_version")
    return f"peft {version}" if version else "another tool"


# --- models -----------------------------------------------------------------------------------


def _model(path: str, revision: str | None = None) -> dict[str, Any]:
    files = open_base(local_folder(path, revision))
    config = files.config
    inner = config.get("text_config")
    text: dict[str, Any] = inner if isinstance(inner, dict) else config
    found = {
        "kind": "model",
        "path": path,
        "architecture": _architecture(config) or "unknown",
        "model_type": config.get("model_type"),
        "layers": text.get("num_hidden_layers", text.get("n_layer")),
        "hidden_size": text.get("hidden_size", text.get("n_embd")),
        "vocabulary": text.get("vocab_size"),
        "context": text.get("max_position_embeddings", text.get("n_positions")),
        "labels": _labels(files.folder, config),
        "chat_template": _has_template(files.folder),
        **_weights(files),
        "tensors": len(files.tensors),
        "files": len(files.shards),
        "tied_head": bool(config.get("tie_word_embeddings", False)),
    }
    return {key: value for key, value in found.items() if value is not None}


def _labels(folder: Path, config: Mapping[str, Any]) -> list[str] | None:
    if not _architecture(config).endswith("ForSequenceClassification"):
        return None
    return list(stored_labels(load_config(str(folder))) or ())


def _architecture(config: Mapping[str, Any]) -> str:
    named = config.get("architectures")
    return str(named[0]) if isinstance(named, list) and named else ""


def _has_template(folder: Path) -> bool:
    if (folder / "chat_template.jinja").exists():
        return True
    try:
        return bool(read_json(folder / "tokenizer_config.json", DecalError).get("chat_template"))
    except DecalError:
        return False


def _weights(files: BaseFiles) -> dict[str, Any]:
    """Numbers, bytes and bits: of the whole model, of what is quantized, and of what is not."""
    packed = _packed(files.tensors)
    parts = {key: weight for weight, (_, keys) in packed.items() for key in keys}
    plain = [entry for key, entry in files.tensors.items() if key not in parts]
    settings = files.config.get("quantization_config")
    by_dtype: Counter[str] = Counter()
    for entry in files.tensors.values():
        by_dtype[entry.spec.dtype] += entry.spec.nbytes
    found: dict[str, Any] = {"quantization": None}
    if packed:
        numbers = sum(count for count, _ in packed.values())
        size = sum(files.tensors[key].spec.nbytes for key in parts)
        tables = sum(files.tensors[key].spec.nbytes for key in parts if _TABLES.search(key))
        found["quantization"] = {
            **_format(files, next(iter(packed))),
            "parameters": numbers,
            "bytes": size,
            "bits_per_weight": round(8 * (size - tables) / numbers, 3),
        }
        found["not_quantized"] = _by_kind(plain)
        numbers += sum(prod(entry.spec.shape) for entry in plain)
        bits = round(8 * (files.nbytes - tables) / numbers, 3)
        found |= {"parameters": numbers, "bits_per_weight": bits}
    elif isinstance(settings, dict):  # packed in a way of another tool
        found["quantization"] = {"method": settings.get("quant_method", "unknown")}
    else:
        found["parameters"] = sum(prod(entry.spec.shape) for entry in plain)
    return found | {"bytes": files.nbytes, "bytes_by_dtype": dict(sorted(by_dtype.items()))}


def _packed(tensors: Mapping[str, TensorEntry]) -> dict[str, tuple[int, list[str]]]:
    """Key of each weight that bitsandbytes packed -> (its numbers, the keys of all its parts)."""
    found: dict[str, tuple[int, list[str]]] = {}
    for key in tensors:
        weight, state, _ = key.partition(_STATE)
        module = key.removesuffix(".SCB")
        if state and weight in tensors:
            names = ("absmax", "quant_map", "nested_absmax", "nested_quant_map")
            parts = [key, weight, *(k for n in names if (k := f"{weight}.{n}") in tensors)]
            found[weight] = (2 * prod(tensors[weight].spec.shape), parts)
        elif module != key and f"{module}.weight" in tensors:
            weight = f"{module}.weight"
            parts = [key, weight, *(k for k in (f"{module}.weight_format",) if k in tensors)]
            found[weight] = (prod(tensors[weight].spec.shape), parts)
    return found


def _format(files: BaseFiles, weight: str) -> dict[str, Any]:
    """How bitsandbytes packed the model: what config.json and the first weight's state say."""
    given = files.config.get("quantization_config")
    settings = given if isinstance(given, dict) else {}
    found: dict[str, Any] = {"method": settings.get("quant_method", "bitsandbytes")}
    state = next((k for k in files.tensors if k.startswith(weight + _STATE)), None)
    if state is None:
        return {**found, "format": "int8"}
    entry = files.tensors[state]
    try:
        facts = parse_json(next(raw_chunks(entry), b"")) if entry.spec.nbytes < _LONGEST else None
    except (OSError, ValueError):
        facts = None
    if not isinstance(facts, dict):
        raise DecalError(f"`{state}` of `{files.folder}` is not the JSON it should be")
    return {
        **found,
        "format": facts.get("quant_type"),
        "block_size": facts.get("blocksize"),
        "double": f"{weight}.nested_absmax" in files.tensors,
        "compute_dtype": settings.get("bnb_4bit_compute_dtype", facts.get("dtype")),
    }


def _by_kind(entries: list[TensorEntry]) -> list[dict[str, Any]]:
    """One row for all tensors of one name in all layers."""
    kinds: dict[tuple[str, str], list[TensorEntry]] = defaultdict(list)
    for entry in entries:
        name = entry.key.removesuffix(".weight")
        kinds[name.rpartition(".")[2], entry.spec.dtype].append(entry)
    return [
        {
            "module": name,
            "dtype": dtype,
            "tensors": len(found),
            "parameters": sum(prod(entry.spec.shape) for entry in found),
            "bytes": sum(entry.spec.nbytes for entry in found),
        }
        for (name, dtype), found in sorted(kinds.items())
    ]
