"""The weights that training on a quantized base computed with, made again from the base's files.

Training on a 4-bit base computes with its dequantized weights. They come about in one of two ways:
the files hold 16-bit weights that loading casts, packs and dequantizes, or they hold bitsandbytes'
packed tensors. Either way the hash of all packed bytes must be the one recorded with the adapter.
It is known when the last weight has passed; the merge is then still in its temporary folder.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from decal.model import names
from decal.model.quantizer import quantizable_modules
from decal.quant import quant_format
from decal.quant.base import Packed, Recipe
from decal.quant.bnb import STATE, describe_quantization, from_bnb, stored_shape
from decal.quant.identity import combine, digest
from decal.store.base import BaseFiles
from decal.store.tensorfile import TensorSpec, dtype_name
from decal.verbs.load import as_dtype, recorded_quant
from decal.verbs.plan_merge import Merging
from decal.verbs.quantize import stored_weights
from decal.verbs.same_base import compare_marks
from decal.verbs.target import QUANTIZER, metadata_json
from decal.weights.changes import Changes, Dequantized


def as_trained(plan: Merging, changes: Changes) -> Changes:
    """The changes, with every quantized weight as training computed with it.

    Raises:
        QuantError: packed tensors that contradict each other, or a recipe that is not known.
    """
    recorded = metadata_json(plan.adapter, QUANTIZER) or {}
    check = _Identity(plan, recorded.get("identity"))
    dtype = as_dtype(recorded.get("dtype", "bfloat16"))
    if describe_quantization(plan.files.config) is not None:
        return _unpacked(plan, changes, check, dtype)
    quant = recorded_quant(recorded)
    recipe = Recipe(format=quant.format, block_size=quant.block_size, double=quant.double)
    modules = quantizable_modules(plan.skeleton, quant.skip_modules)
    check.waiting |= set(modules)
    weights = {}
    for module in modules:
        weights[plan.key(f"{module}.weight")] = Dequantized(
            _through(
                partial(_packed, recipe, dtype, module in check.transposed), check, module, dtype
            )
        )
    return replace(changes, dequantized=weights)


class _Identity:
    """Collects the hashes of packed weights until none is waited for, and compares them then."""

    def __init__(self, plan: Merging, wanted: str | None):
        self._plan, self._wanted = plan, wanted
        self.transposed = names.transposed_modules(plan.skeleton)
        self.waiting: set[str] = set()
        self._digests: dict[str, str] = {}

    def see(self, module: str, packed: Packed) -> None:
        """With the last weight, raises AdapterError if they are not those of the training."""
        if not self._wanted:
            return
        self._digests[module] = digest(module, packed)
        self.waiting.discard(module)
        if self.waiting:
            return
        compare_marks(
            self._plan.adapter,
            self._plan.path,
            self._wanted,
            combine(self._digests),
            "quantized ",
            self._plan.allow_other_base,
        )
        self._wanted = None  # weights that are read again, to be verified, are the same


def _through(
    pack: Callable[[Tensor], Packed], check: _Identity, module: str, dtype: torch.dtype
) -> Callable[[Tensor], Tensor]:
    """From a stored weight to the one that training computed with, in the file's orientation."""
    transposed = module in check.transposed

    def convert(stored: Tensor) -> Tensor:
        packed = pack(stored)
        check.see(module, packed)
        weight = quant_format(packed.recipe.format).dequantize(packed, dtype)
        return weight.T.contiguous() if transposed else weight

    return convert


def _packed(recipe: Recipe, dtype: torch.dtype, transposed: bool, stored: Tensor) -> Packed:
    """Casts and packs a weight, as [out, in], exactly as loading did it."""
    weight = stored.T if transposed else stored
    return quant_format(recipe.format).quantize(weight.to(dtype).contiguous(), recipe)


def _read(files: BaseFiles, prefix: str, keys: Sequence[str], codes: Tensor) -> Packed:
    """A weight as bitsandbytes stored it; `keys` are those of codes, scales and state."""
    return from_bnb(prefix, {keys[0]: codes} | {key: files.read(key) for key in keys[1:]})


def _unpacked(plan: Merging, changes: Changes, check: _Identity, dtype: torch.dtype) -> Changes:
    """Every weight that bitsandbytes stored, from its packed tensors; these are not written."""
    parameters = {key: name for name, key in plan.keys.items()}
    weights: dict[str, Dequantized] = {}
    parts: set[str] = set()
    for prefix, keys in stored_weights(plan.files).items():
        module = parameters.get(keys[0], keys[0]).removesuffix(".weight")
        check.waiting.add(module)
        state = next((key for key in keys if STATE in key), None)
        shape = plan.files.tensors[keys[0]].spec.shape
        if state is not None:
            shape = stored_shape(prefix, plan.files.read(state))
        spec = TensorSpec(dtype_name(dtype), shape[::-1] if module in check.transposed else shape)
        pack = partial(_read, plan.files, prefix, keys)
        weights[keys[0]] = Dequantized(_through(pack, check, module, dtype), spec)
        parts |= set(keys[1:])
    return replace(
        changes,
        dequantized=weights,
        dropped=changes.dropped | parts,
        config={**changes.config, "quantization_config": None},
    )
