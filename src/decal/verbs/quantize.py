"""`decal quantize` and `decal dequantize`: a model folder as bitsandbytes stores it, and back."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from decal.config import QuantConfig
from decal.errors import BaseModelError, QuantError
from decal.model import hf, names
from decal.model.quantizer import quantize_skeleton
from decal.model.size import bits_per_weight
from decal.model.unquantized import left_unquantized
from decal.quant import Recipe, describe, quant_format
from decal.quant.bnb import (
    STATE,
    bnb_shapes,
    describe_quantization,
    from_bnb,
    quantization_config,
    stored_shape,
    to_bnb,
)
from decal.quant.linear import QuantLinear
from decal.store.base import BaseFiles, open_base
from decal.store.fingerprint import fingerprint
from decal.store.tensorfile import TORCH_DTYPES, TensorEntry, TensorSpec, dtype_name
from decal.version import __version__
from decal.weights.rewrite import Rewrite, rewrite_files

Dtype = Literal["keep", "bf16", "fp16", "fp32"]

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
_FLOATS = ("F32", "F16", "BF16")
Observe = Callable[[int, int], None]


@dataclass(frozen=True, kw_only=True)
class Converted:
    """What was written."""

    out: Path
    source: str
    stored: str
    """The recipe in words, or the dtype."""
    layers: int
    """Linear layers that were quantized, or are no longer."""
    nbytes: int
    bits_per_weight: float
    left: tuple[str, ...] = ()
    """What stayed 16-bit, if it is much."""

    def summary(self) -> dict[str, Any]:
        """The conversion in a few facts, for printing."""
        return {
            "wrote": str(self.out),
            "source": self.source,
            "stored": self.stored,
            "layers": self.layers,
            "bytes": self.nbytes,
            "bits_per_weight": self.bits_per_weight,
            "stays_16_bit": list(self.left),
        }


def quantize(
    model: str | Path,
    out: str | Path,
    quant: QuantConfig,
    *,
    dtype: Dtype = "keep",
    revision: str | None = None,
    force: bool = False,
    observe: Observe | None = None,
) -> Converted:
    """Writes a model as a folder that transformers and bitsandbytes load quantized.

    The bytes are those that `load_base` makes of the same model, recipe and dtype. One weight is in
    memory at a time.

    Args:
        model: hub id or folder of a model in 16 or 32 bits.
        quant: format, block size, double quantization and modules to skip.
        dtype: what weights are rounded to before they are packed, and what stays is stored in.
        observe: called with bytes done and bytes in total.

    Raises:
        QuantError: no format is asked for, or the model or a weight cannot be held by it.
        BaseModelError: no such model, or it is quantized already.
        Whatever `rewrite_files` raises.
    """
    if quant.format == "none":
        raise QuantError("quantize needs a format", hint="use nf4, fp4 or int8")
    recipe = Recipe(format=quant.format, block_size=quant.block_size, double=quant.double)
    files = _opened(model, revision)
    _refuse_stored(files, model)
    skeleton = names.skeleton(str(files.folder))
    linear = [n for n, m in skeleton.named_modules() if type(m) in (nn.Linear, Conv1D)]
    keys = {name: key for key, name in names.name_map(skeleton, files.tensors).items()}
    packed = quantize_skeleton(skeleton, recipe, quant.skip_modules)
    entries = _entries(files, keys, packed)
    rounded = None if dtype == "keep" else _DTYPES[dtype]
    compute = rounded or TORCH_DTYPES[entries[packed[0]].spec.dtype]
    kept = [name for name in linear if name not in set(packed)]
    nbytes = rewrite_files(
        files,
        out,
        [_packing(entry, skeleton.get_submodule(n), rounded) for n, entry in entries.items()],
        {"quantization_config": quantization_config(recipe, compute, kept)},
        dtype=rounded,
        force=force,
        observe=observe,
        facts=_facts("quantize", model, files, describe(recipe)),
    )
    skeleton.to(compute)
    return Converted(
        out=Path(out),
        source=str(model),
        stored=describe(recipe),
        layers=len(packed),
        nbytes=nbytes,
        bits_per_weight=bits_per_weight(skeleton),
        left=tuple(left_unquantized(skeleton)),
    )


def _opened(model: str | Path, revision: str | None) -> BaseFiles:
    return open_base(hf.local_folder(str(model), revision))


def _facts(verb: str, model: str | Path, files: BaseFiles, stored: str) -> dict[str, Any]:
    """What the record of the folder says of its making."""
    source = {"path": str(model), "fingerprint": fingerprint(files)}
    return {"decal": __version__, "made_by": verb, "source": source, "stored": stored}


def _refuse_stored(files: BaseFiles, model: str | Path) -> None:
    stored = files.config.get("quantization_config")
    if stored:
        found = describe_quantization(files.config) or stored
        method = found.get("format") or found.get("quant_method", "unknown")
        raise BaseModelError(
            f"`{model}` is stored quantized already ({method})",
            hint="`decal dequantize` makes a 16-bit folder of it",
        )


def _entries(
    files: BaseFiles, keys: Mapping[str, str], packed: Sequence[str]
) -> dict[str, TensorEntry]:
    """Module -> its weight in the files.

    Raises:
        BaseModelError: no linear layers, or weights that are not there.
        QuantError: weights that are not stored in 16 or 32 bits.
    """
    lost = [name for name in packed if f"{name}.weight" not in keys]
    if lost or not packed:
        raise BaseModelError(
            f"`{files.folder}` lacks the weights of {len(lost)} of {len(packed)} linear layers",
            details=[f"first: {lost[0]}"] if lost else [],
        )
    entries = {name: files.tensors[keys[f"{name}.weight"]] for name in packed}
    for entry in entries.values():
        if entry.spec.dtype not in _FLOATS:
            raise QuantError(f"`{entry.key}` is stored in {entry.spec.dtype}, not in 16 or 32 bits")
    return entries


def _packing(entry: TensorEntry, layer: QuantLinear, rounded: torch.dtype | None) -> Rewrite:
    """The rewrite of one weight into bitsandbytes' tensors; `layer` is what it becomes."""
    key, recipe, transposed = entry.key, layer.recipe, layer.transposed_source
    dtype = rounded or TORCH_DTYPES[entry.spec.dtype]
    prefix = key.removesuffix(".weight")
    shapes = bnb_shapes(prefix, layer.shape, recipe, dtype)

    def convert(taken: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        stored = taken[key].to(dtype)
        weight = stored.T if transposed else stored
        try:
            packed = quant_format(recipe.format).quantize(weight, recipe)
        except QuantError as error:
            raise QuantError(
                f"`{key}` cannot be quantized: {error.message}",
                details=error.details,
                hint=error.hint,
            ) from error
        return to_bnb(prefix, packed, padded=True)

    gives = {name: TensorSpec(dtype_name(d), shape) for name, (shape, d) in shapes.items()}
    return Rewrite(takes=(key,), gives=gives, convert=convert)


def dequantize(
    model: str | Path,
    out: str | Path,
    *,
    dtype: Dtype = "bf16",
    revision: str | None = None,
    force: bool = False,
    observe: Observe | None = None,
) -> Converted:
    """Writes a model that bitsandbytes stored quantized as a plain one.

    Args:
        model: hub id or folder.
        dtype: of all weights that are written; not `keep`.
        observe: called with bytes done and bytes in total.

    Raises:
        BaseModelError: no such model, or it is not stored quantized by bitsandbytes.
        QuantError: tensors that contradict each other.
        Whatever `rewrite_files` raises.
    """
    files = _opened(model, revision)
    found = describe_quantization(files.config)
    if found is None:
        method = (files.config.get("quantization_config") or {}).get("quant_method")
        how = f" in a way that decal reads, but by {method}" if method else ""
        raise BaseModelError(
            f"`{model}` is not stored quantized{how}",
            hint="`decal inspect` shows what a folder holds",
        )
    target = _DTYPES[dtype]
    skeleton = names.skeleton(str(files.folder))
    transposed = names.transposed_modules(skeleton)
    prefixes = stored_weights(files)
    if not prefixes:
        raise BaseModelError(f"`{model}` says that it is quantized, but none of its weights is")
    named = names.name_map(skeleton, [f"{prefix}.weight" for prefix in prefixes])
    rewrites = []
    for prefix, keys in prefixes.items():
        module = named[f"{prefix}.weight"].removesuffix(".weight")
        rewrites.append(_unpacking(files, prefix, keys, target, module in transposed))
    nbytes = rewrite_files(
        files,
        out,
        rewrites,
        {"quantization_config": None},
        dtype=target,
        force=force,
        observe=observe,
        facts=_facts("dequantize", model, files, str(target).removeprefix("torch.")),
    )
    skeleton.to(target)
    return Converted(
        out=Path(out),
        source=str(model),
        stored=str(target).removeprefix("torch."),
        layers=len(rewrites),
        nbytes=nbytes,
        bits_per_weight=bits_per_weight(skeleton),
    )


def stored_weights(files: BaseFiles) -> dict[str, tuple[str, ...]]:
    """Module's prefix in the file -> the keys of its quantized weight, the codes first.

    Raises:
        BaseModelError: scales without codes.
    """
    inside: dict[str, list[str]] = {}
    for key in files.tensors:
        prefix, mark, _ = key.partition(".weight.")
        if mark:
            inside.setdefault(prefix, []).append(key)
        elif key.endswith((".SCB", ".weight_format")):
            inside.setdefault(key.rpartition(".")[0], []).append(key)
    found = {
        prefix: (f"{prefix}.weight", *keys)
        for prefix, keys in inside.items()
        if any(STATE in key or key.endswith(".SCB") for key in keys)
    }
    lost = [prefix for prefix in found if f"{prefix}.weight" not in files.tensors]
    if lost:
        raise BaseModelError(f"`{files.folder}` has scales for `{lost[0]}.weight`, but no weight")
    return found


def _unpacking(
    files: BaseFiles, prefix: str, keys: tuple[str, ...], dtype: torch.dtype, transposed: bool
) -> Rewrite:
    """The rewrite of bitsandbytes' tensors of one weight into the plain one."""
    states = [key for key in keys if STATE in key]
    shape = (
        stored_shape(prefix, files.read(states[0])) if states else files.tensors[keys[0]].spec[1]
    )

    def convert(taken: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        packed = from_bnb(prefix, taken)
        weight = quant_format(packed.recipe.format).dequantize(packed, dtype)
        return {keys[0]: weight.T.contiguous() if transposed else weight}

    spec = TensorSpec(dtype_name(dtype), shape[::-1] if transposed else shape)
    return Rewrite(takes=keys, gives={keys[0]: spec}, convert=convert)
