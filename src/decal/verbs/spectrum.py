"""What an adapter learned, as plain values: singular values, ranks, and norms beside the base's.

The base is looked at where its files are at hand, one tensor at a time, and never downloaded. Where
it is not, the relative norms are missing and a sentence says why. A base quantized by loading is
measured as its files hold it, one that is stored packed as its codes are dequantized.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from decal.errors import DecalError
from decal.model.adapter import Adapter
from decal.model.hub import folder_at_hand
from decal.quant import quant_format
from decal.quant.bnb import from_bnb
from decal.store.fingerprint import fingerprint
from decal.verbs.plan_merge import Merging, merging
from decal.verbs.quantize import stored_weights
from decal.verbs.same_base import compare_marks
from decal.verbs.target import BASE, LABELS, base_of, metadata_json, read
from decal.weights.analyze import (
    ModuleSpectrum,
    Place,
    frobenius,
    kept_by,
    places,
    smallest_rank,
    spectra,
)

SHARES = (0.9, 0.99)
Observe = Callable[[str, int, int], None]


class BaseNorms:
    """Norms of weights of bases, read once for all adapters of a base."""

    def __init__(self, observe: Observe | None = None):
        self._observe = observe
        self._opened: dict[tuple[str, str | None, bool], tuple[Merging, str] | str] = {}
        self._norms: dict[tuple[Path, str], float] = {}

    def of(self, adapter: Adapter, base: str | None) -> tuple[dict[str, float], str | None]:
        """(parameter of the adapter -> norm of the base's, why there are none).

        Parameters that the base's files do not hold as one tensor are left out.
        """
        try:
            path, revision = base_of(adapter, base)
            plan, mark = self._open(adapter, path, revision)
            wanted = (metadata_json(adapter, BASE) or {}).get("fingerprint")
            compare_marks(adapter, path, wanted, mark, "", allowed=False)
            names = [*(f"{module}.weight" for module in adapter.tensors), *adapter.full]
            return self._measured(plan, names), None
        except DecalError as error:
            return {}, error.message

    def _open(self, adapter: Adapter, path: str, revision: str | None) -> tuple[Merging, str]:
        labels = metadata_json(adapter, LABELS)
        key = (path, revision, labels is not None)
        if key not in self._opened:
            try:
                self._opened[key] = self._opening(adapter, path, revision, labels)
            except DecalError as error:
                self._opened[key] = error.message
            except Exception as error:  # code of a model that transformers cannot build
                self._opened[key] = f"the names of base `{path}` are not known: {error!s:.200}"
        found = self._opened[key]
        if isinstance(found, str):
            raise DecalError(found)
        return found

    def _opening(
        self, adapter: Adapter, path: str, revision: str | None, labels: list[str] | None
    ) -> tuple[Merging, str]:
        folder = folder_at_hand(path, revision)
        if folder is None:
            raise DecalError(f"base `{path}` is not on this disk")
        plan = merging(adapter, str(folder), None, labels=labels)
        return plan, fingerprint(plan.files, self._observe and partial(self._observe, "hashing"))

    def _measured(self, plan: Merging, names: list[str]) -> dict[str, float]:
        tied = getattr(plan.skeleton, "all_tied_weights_keys", None) or {}
        packed = {keys[0]: (prefix, keys) for prefix, keys in stored_weights(plan.files).items()}
        found = {}
        for done, name in enumerate(names):
            key = plan.keys.get(name) or plan.keys.get(tied.get(name, name))
            if key is None or key not in plan.files.tensors:
                continue
            if self._observe:
                self._observe("reading the base", done, len(names))
            place = (plan.files.folder, key)
            if place not in self._norms:
                self._norms[place] = _norm(plan, key, packed)
            found[name] = self._norms[place]
        return found


def _norm(plan: Merging, key: str, packed: dict[str, tuple[str, tuple[str, ...]]]) -> float:
    if key not in packed:
        return frobenius(plan.files.read(key))
    prefix, keys = packed[key]
    weight = from_bnb(prefix, {part: plan.files.read(part) for part in keys})
    return frobenius(quant_format(weight.recipe.format).dequantize(weight, torch.float32))


def spectrum(
    path: str | Path,
    *,
    base: str | None = None,
    norms: BaseNorms | None = None,
    observe: Observe | None = None,
) -> dict[str, Any]:
    """The spectrum of the adapter at `path`.

    Args:
        path: run or adapter folder, or hub id.
        base: the base, if it is not where the adapter says.
        norms: of the base's weights, where several adapters share one.
        observe: called with what is done, steps done and steps in total while the base is read.

    Returns:
        Plain JSON. `modules` has, for each module, `kind`, `layer`, `r`, `shape`, `scaling`,
        `values` (singular values), `norm`, `relative` (over the base weight's norm, or None),
        `effective_rank`, `stable_rank`, `directions` (of 90 % and 99 % of the energy). `kept` is
        the energy that one rank everywhere keeps, for 1, 2, ...; `rank` the smallest that keeps
        99 % of all modules together, `rank_everywhere` of each. `beside` are what was trained
        beside the factors; `base` says why the base's norms are missing, or None.

    Raises:
        AdapterError: no adapter that can be read.
    """
    _, adapter = read(path)
    weights, why = (norms or BaseNorms(observe)).of(adapter, base)
    return {"path": str(path), **facts_of(adapter, weights), "base": why}


def facts_of(adapter: Adapter, weights: dict[str, float]) -> dict[str, Any]:
    """The spectrum of an adapter in memory; `weights` are norms of the base's parameters."""
    found = spectra(adapter.tensors, adapter.config, adapter.embeddings)
    where = places([one.module for one in found])
    return {
        "r": adapter.config.r,
        "lora_alpha": adapter.config.lora_alpha,
        "parameters": adapter.parameters,
        "rank": smallest_rank(found, SHARES[1]),
        "rank_everywhere": max((one.directions(SHARES[1]) for one in found), default=0),
        "kept": kept_by(found),
        "modules": [
            _module(one, where[one.module], weights.get(f"{one.module}.weight")) for one in found
        ],
        "beside": _beside(adapter, found),
    }


def _module(one: ModuleSpectrum, place: Place, weight: float | None) -> dict[str, Any]:
    return {
        "module": one.module,
        "kind": place.kind,
        "layer": place.layer,
        "r": one.r,
        "shape": list(one.shape),
        "scaling": one.scaling,
        "norm": one.norm,
        "relative": one.norm / weight if weight else None,
        "effective_rank": one.effective_rank,
        "stable_rank": one.stable_rank,
        "directions": [one.directions(share) for share in SHARES],
        "values": list(one.values),
    }


def _beside(adapter: Adapter, found: list[ModuleSpectrum]) -> list[dict[str, Any]]:
    """What the factors do not hold, with its norm: B's own biases, and parameters trained whole."""
    biases = [one.bias for one in found if one.bias is not None]
    rows = []
    if biases:
        norm = math.sqrt(math.fsum(b * b for b in biases))
        rows.append({"name": f"lora_bias of {len(biases)} modules", "norm": norm})
    rows += [
        {"name": name, "norm": frobenius(tensor)} for name, tensor in sorted(adapter.full.items())
    ]
    return rows
