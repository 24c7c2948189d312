"""`decal diff`: in what two adapters or two models differ, and by how much.

Adapters are compared by what they add to the base, so that other factors of the same delta, or
other ranks, are no obstacle. Models are hashed tensor by tensor (hashes are remembered), and only
those that differ are read.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from decal.errors import BaseModelError, DecalError
from decal.model.adapter import Adapter
from decal.model.hf import local_folder
from decal.store.base import BaseFiles, open_base, side_files
from decal.store.fingerprint import tensor_hashes
from decal.verbs.target import resolve
from decal.weights.difference import (
    Factors,
    Norms,
    delta_norms,
    stored_norms,
    tensor_norms,
    total,
)

_NOT_COMPARED = {"transformers_version", "_name_or_path", "decal.version"}
"""Settings and metadata that say who wrote a folder, not what is in it."""
_PAPERS = ("LICENSE", "NOTICE", "USE_POLICY")


def diff(
    a: str | Path, b: str | Path, *, observe: Callable[[int, int], None] | None = None
) -> dict[str, Any]:
    """Compares two adapters or two models.

    Args:
        a: run, adapter, model folder or hub id; so is `b`.
        observe: called with bytes done and bytes in total while models are hashed.

    Returns:
        Plain JSON: `kind`, `identical`; `config` (keys that differ, with both values), `files`
        (tokenizer and others, of models), `only_in_a`, `only_in_b`, `shapes` and `dtypes` (of
        modules or tensors), `compared` (how many are in both, of one shape), `different` (those
        that differ, the farthest first, with `relative`: the norm of the difference over the
        larger norm, None where there is none) and `relative` of those together.

    Raises:
        DecalError: an adapter and a model, or nothing at one of the paths.
        AdapterError, BaseModelError: an adapter or a model that cannot be read.
    """
    left, right = resolve(a), resolve(b)
    if left.kind != right.kind:
        raise DecalError(
            f"`{a}` is {_article(left.kind)}, `{b}` is {_article(right.kind)}",
            hint="name two adapters or two models",
        )
    if left.kind == "adapter":
        found = _adapters(Adapter.from_pretrained(left.path), Adapter.from_pretrained(right.path))
    else:
        bases = [open_base(local_folder(side.path, side.revision)) for side in (left, right)]
        found = _models(bases[0], bases[1], observe)
    parts = ("config", "files", "only_in_a", "only_in_b", "shapes", "dtypes", "different")
    identical = not any(found.get(part) for part in parts)
    return {"kind": left.kind, "a": str(a), "b": str(b), "identical": identical, **found}


def _article(kind: str) -> str:
    return "an adapter" if kind == "adapter" else "a model"


# --- adapters ---------------------------------------------------------------------------------


def _adapters(a: Adapter, b: Adapter) -> dict[str, Any]:
    different: dict[str, Norms | None] = {}
    shapes = []
    compared = 0
    for module in sorted(a.tensors.keys() & b.tensors.keys()):
        pairs = _factors(a, module), _factors(b, module)
        sizes = [[f.B.shape[0], f.A.shape[1]] for f in pairs]
        if sizes[0] != sizes[1]:
            shapes.append({"name": module, "a": sizes[0], "b": sizes[1]})
            continue
        compared += 1
        if not _same_factors(*pairs):
            different[module] = delta_norms(*pairs)
    wholes = _wholes(a), _wholes(b)
    for name in sorted(wholes[0].keys() & wholes[1].keys()):
        x, y = wholes[0][name], wholes[1][name]
        if x.shape != y.shape:
            shapes.append({"name": name, "a": list(x.shape), "b": list(y.shape)})
            continue
        compared += 1
        if not torch.equal(x, y):
            different[name] = tensor_norms(x, y)
    names = a.tensors.keys() | wholes[0].keys(), b.tensors.keys() | wholes[1].keys()
    return {
        "config": _changed(_facts(a), _facts(b)),
        "only_in_a": sorted(names[0] - names[1]),
        "only_in_b": sorted(names[1] - names[0]),
        "shapes": shapes,
        "compared": compared,
        "different": _ranked(different),
        "relative": _together(different),
    }


def _factors(adapter: Adapter, module: str) -> Factors:
    A, B, *_ = adapter.tensors[module]
    return Factors(A, B, adapter.config.scaling_of(module))


def _same_factors(a: Factors, b: Factors) -> bool:
    return a.scale == b.scale and torch.equal(a.A, b.A) and torch.equal(a.B, b.B)


def _wholes(adapter: Adapter) -> dict[str, Tensor]:
    """What an adapter holds beside its factors: parameters trained whole, and B's own biases."""
    biases = {
        f"{module}.lora_B.bias": adapter.config.scaling_of(module) * bias
        for module, (_, _, *rest) in adapter.tensors.items()
        for bias in rest
        if bias is not None
    }
    return {**adapter.full, **biases}


def _facts(adapter: Adapter) -> dict[str, Any]:
    """Settings and metadata by name; what says where and when is left out."""
    settings = adapter.config.model_dump(mode="json")
    targets = settings.pop("target_modules")
    settings["target_modules"] = targets if isinstance(targets, str) else sorted(targets)
    facts = {"base_model_name_or_path": adapter.base, "task_type": adapter.task_type}
    return {**settings, **facts, **adapter.metadata}


# --- models -----------------------------------------------------------------------------------


def _models(
    a: BaseFiles, b: BaseFiles, observe: Callable[[int, int], None] | None
) -> dict[str, Any]:
    both = a.nbytes + b.nbytes

    def hashes(files: BaseFiles, before: int) -> dict[str, str]:
        if observe is None:
            return tensor_hashes(files)
        return tensor_hashes(files, lambda done, _: observe(before + done, both))

    first, second = hashes(a, 0), hashes(b, a.nbytes)
    shapes, dtypes = [], []
    different: dict[str, Norms | None] = {}
    compared = 0
    for name in sorted(a.tensors.keys() & b.tensors.keys()):
        x, y = a.tensors[name], b.tensors[name]
        if x.spec.shape != y.spec.shape:
            shapes.append({"name": name, "a": list(x.spec.shape), "b": list(y.spec.shape)})
            continue
        compared += 1
        if x.spec.dtype != y.spec.dtype:
            dtypes.append({"name": name, "a": x.spec.dtype, "b": y.spec.dtype})
        if first[name] != second[name]:
            different[name] = _stored_norms(x, y)
    return {
        "config": _changed(_flat(a.config), _flat(b.config)),
        "files": _changed(_side_hashes(a.folder), _side_hashes(b.folder)),
        "only_in_a": sorted(a.tensors.keys() - b.tensors.keys()),
        "only_in_b": sorted(b.tensors.keys() - a.tensors.keys()),
        "shapes": shapes,
        "dtypes": dtypes,
        "compared": compared,
        "different": _ranked(different),
        "relative": _together(different),
    }


def _stored_norms(x: Any, y: Any) -> Norms | None:
    try:
        return stored_norms(x, y)
    except OSError as error:
        raise BaseModelError(f"`{error.filename}` cannot be read: {error.strerror}") from error


def _side_hashes(folder: Path) -> dict[str, str]:
    """sha256 of tokenizer, templates, generation settings and code; licences apart."""
    return {
        str(name): hashlib.sha256((folder / name).read_bytes()).hexdigest()[:16]
        for name in side_files(folder)
        if not name.name.startswith(_PAPERS)
    }


# --- both -------------------------------------------------------------------------------------


def _flat(value: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """A nested mapping as one with dotted keys."""
    flat: dict[str, Any] = {}
    for key, inner in value.items():
        nested = isinstance(inner, Mapping) and inner
        flat |= _flat(inner, f"{prefix}{key}.") if nested else {f"{prefix}{key}": inner}
    return flat


def _changed(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The keys whose values differ, with both; None is a key that is not there."""
    return [
        {"key": key, "a": a.get(key), "b": b.get(key)}
        for key in sorted(a.keys() | b.keys())
        if key not in _NOT_COMPARED and a.get(key) != b.get(key)
    ]


def _together(different: Mapping[str, Norms | None]) -> float | None:
    known = [norms for norms in different.values() if norms is not None]
    return total(known).relative if known else None


def _ranked(different: Mapping[str, Norms | None]) -> list[dict[str, Any]]:
    """The farthest first; those without a distance last."""
    rows = [{"name": n, "relative": norms and norms.relative} for n, norms in different.items()]
    return sorted(rows, key=lambda row: (row["relative"] is None, -(row["relative"] or 0.0)))
