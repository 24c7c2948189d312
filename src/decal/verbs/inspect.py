"""`decal inspect`: what a folder holds, from settings and headers alone."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

from decal.model.adapter import Adapter
from decal.model.hf import local_folder
from decal.store.base import open_base
from decal.store.run import RunFolder
from decal.verbs.target import BASE, QUANTIZER, metadata_json, resolve


def inspect(path: str | Path) -> dict[str, Any]:
    """Says what is at `path`: a run, an adapter or a model. No weights are loaded.

    Raises:
        DecalError: nothing there, or nothing that decal knows.
    """
    folder = Path(path).expanduser()
    if (folder / "run.yaml").exists():
        return _run(folder)
    target = resolve(path)
    if target.kind == "adapter":
        return _adapter(Path(target.path))
    return _model(target.path)


def _adapter(path: Path) -> dict[str, Any]:
    adapter = Adapter.from_pretrained(path)
    config = adapter.config
    kinds = Counter(module.rpartition(".")[2] for module in adapter.tensors)
    quantizer = metadata_json(adapter, QUANTIZER)
    base = metadata_json(adapter, BASE) or {}
    return {
        "kind": "adapter",
        "path": str(path),
        "base": adapter.base,
        "base_fingerprint": base.get("fingerprint"),
        "trained_on": quantizer or base.get("dtype"),
        "method": config.method,
        "r": config.r,
        "lora_alpha": config.lora_alpha,
        "scaling": config.scaling,
        "use_rslora": config.use_rslora,
        "lora_dropout": config.lora_dropout,
        "modules": dict(sorted(kinds.items())),
        "layers": len(adapter.tensors),
        "parameters": adapter.parameters,
        "bytes": sum(f.stat().st_size for f in path.iterdir() if f.is_file()),
        "written_by": adapter.metadata.get("decal.version", "another tool"),
    }


def _model(path: str) -> dict[str, Any]:
    files = open_base(local_folder(path))
    dtypes: Counter[str] = Counter()
    for entry in files.tensors.values():
        dtypes[str(entry.spec.dtype).removeprefix("torch.")] += entry.spec.nbytes
    config = files.config
    return {
        "kind": "model",
        "path": path,
        "architecture": (config.get("architectures") or ["unknown"])[0],
        "model_type": config.get("model_type"),
        "quantization": config.get("quantization_config"),
        "tensors": len(files.tensors),
        "files": len(files.shards),
        "bytes": files.nbytes,
        "bytes_by_dtype": dict(sorted(dtypes.items())),
        "tied_head": bool(config.get("tie_word_embeddings", False)),
    }


def _run(folder: Path) -> dict[str, Any]:
    run = RunFolder.look(folder)
    info = run.info()
    found: dict[str, Any] = {"kind": "run", "path": str(folder), "finished": "result" in info}
    found |= {k: info[k] for k in ("steps", "rows", "device", "threads", "decal") if k in info}
    rows = run.metrics()
    found["checkpoints"] = run.steps()
    if "result" in info:
        found["result"] = info["result"]
    elif rows:
        found["last_step"] = rows[-1].get("step")
    if (folder / "adapter").is_dir():
        found["adapter"] = _adapter(folder / "adapter")
    if (folder / "model").is_dir():
        found["model"] = _model(str(folder / "model"))
    return found
