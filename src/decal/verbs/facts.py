"""What is known of an adapter, a model and the run that made it, for the model card.

Gathered from the adapter's metadata, and from run.yaml and info.json where there is a run folder.
Of places on this disk only the last name is taken.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from decal.config import FullConfig, LoraConfig, RunConfig
from decal.model.adapter import Adapter
from decal.model.hub import may_be_on_hub
from decal.report.card import CardFacts, Value
from decal.runfile import parse_run
from decal.store.base import open_base
from decal.store.run import RunFolder
from decal.verbs.provenance import runs_of
from decal.verbs.target import BASE, LABELS, QUANTIZER, Target, metadata_json


def on_hub(path: str) -> bool:
    """Whether a base or data set is a hub id, and not a folder or file of this disk."""
    return may_be_on_hub(path) and not Path(path).exists()


def model_facts(target: Target) -> CardFacts:
    """Facts of a model folder, or of the run that trained it whole; `repo` is still empty."""
    run = _run_facts(target)
    config = open_base(target.path).config
    named, kinds = config.get("id2label"), config.get("architectures")
    classifies = isinstance(kinds, list) and any("Classification" in str(name) for name in kinds)
    known = named.values() if classifies and isinstance(named, dict) else ()
    labels = tuple(str(label) for label in known)
    return CardFacts(repo="", kind="model", labels=labels, **run)


def adapter_facts(target: Target, adapter: Adapter) -> CardFacts:
    """Facts of an adapter, and of its run; `repo` is still empty."""
    run = _run_facts(target) or _recorded_facts(adapter)
    base = metadata_json(adapter, BASE) or {}
    if adapter.base is not None:
        run["base_on_hub"] = on_hub(adapter.base)
        run["base"] = adapter.base if run["base_on_hub"] else Path(adapter.base).name
        run["commit"] = base.get("commit")
    run["settings"] = _lora_settings(adapter) | run.get("settings", {})
    if "dtype" in base:
        run["settings"]["computed in"] = base["dtype"]
    written_by = adapter.metadata.get("decal.version")
    if written_by and "versions" not in run:
        run["versions"] = {"decal": written_by}
    labels = metadata_json(adapter, LABELS) or ()
    quantized = _quantized(metadata_json(adapter, QUANTIZER))
    return CardFacts(repo="", kind="adapter", labels=labels, quantized=quantized, **run)


def _lora_settings(adapter: Adapter) -> dict[str, Value]:
    config: LoraConfig = adapter.config
    kinds = dict.fromkeys(module.rpartition(".")[2] for module in adapter.tensors)
    found: dict[str, Value] = {
        "r": config.r,
        "lora_alpha": config.lora_alpha,
        "lora_dropout": config.lora_dropout,
        "target modules": ", ".join(kinds),
        "parameters": adapter.parameters,
    }
    if config.use_rslora:
        found["use_rslora"] = True
    if config.modules_to_save:
        found["modules_to_save"] = ", ".join(config.modules_to_save)
    return found


def _quantized(recorded: Mapping[str, Any] | None) -> str | None:
    if not recorded:
        return None
    text = str(recorded.get("format", "fewer bits"))
    if recorded.get("block_size") and text != "int8":
        text += f" in blocks of {recorded['block_size']}"
    return text + (" with double quantization" if recorded.get("double") else "")


def _run_facts(target: Target) -> dict[str, Any]:
    """What the run folder knows: base, data, training settings, results, versions."""
    if target.run is None:
        return {}
    run = RunFolder.look(target.run)
    config: RunConfig = parse_run(run.settings, name=str(target.run / "run.yaml"))
    info = run.info()
    base_on_hub = on_hub(config.base.path)
    dataset = config.data.path if on_hub(config.data.path) else None
    data: dict[str, Value] = {"data": dataset or Path(config.data.path).name}
    if "rows" in info:
        data["rows"] = info["rows"]
    data["max_length"] = config.data.max_length
    return {
        "base": config.base.path if base_on_hub else Path(config.base.path).name,
        "base_on_hub": base_on_hub,
        "dataset": dataset,
        "data": data,
        "settings": _train_settings(config),
        "results": _results(info.get("result") or {}),
        "versions": {k: info[k] for k in ("decal", "torch", "transformers") if k in info},
    }


def _recorded_facts(adapter: Adapter) -> dict[str, Any]:
    """What an adapter that lies apart from its run says of it; nothing if others changed it."""
    runs = runs_of(adapter.metadata)
    if not runs or any("data" not in entry for entry in runs):
        return {}
    last = runs[-1]
    data: dict[str, Value] = {"data": ", then ".join(str(entry["data"]) for entry in runs)}
    if isinstance(last.get("rows"), int):
        data["rows"] = last["rows"]
    settings = {"seed": last["seed"]} if isinstance(last.get("seed"), int) else {}
    return {
        "data": data,
        "settings": settings,
        "results": _results(last),
        "versions": {k: last[k] for k in ("decal", "torch", "transformers") if k in last},
    }


def _train_settings(config: RunConfig) -> dict[str, Value]:
    train = config.train
    length: dict[str, Value] = {"epochs": train.epochs}
    if train.max_steps is not None:
        length = {"max_steps": train.max_steps}
    method: dict[str, Value] = {}
    if isinstance(config.adapter, FullConfig):
        method = {"method": "full fine-tuning"}
    return {
        **method,
        "lr": train.lr,
        "schedule": train.schedule,
        "warmup": train.warmup,
        **length,
        "batch_size": train.batch_size,
        "optimizer": train.optimizer,
        "seed": train.seed,
    }


def _results(result: Mapping[str, Any]) -> dict[str, Value]:
    best = result.get("kept_step") == result.get("best_step")
    last = result.get("kept_step") == result.get("steps")
    named = {
        "steps": result.get("steps"),
        "step of these weights": None if last else result.get("kept_step"),
        "training loss of the last step": result.get("loss"),
        "evaluation loss": result.get("best_eval_loss" if best else "eval_loss"),
        "accuracy": result.get("accuracy"),
        "trained tokens": result.get("trained_tokens"),
    }
    return {name: value for name, value in named.items() if value is not None}
