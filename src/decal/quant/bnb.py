"""bitsandbytes' checkpoint keys for 4-bit weights, read and written.

Knows key names and the JSON inside; no modules, no files. The bytes of codes and scales are the
packed weight's own; only names, the codebooks and a small JSON are added:

    <name>.weight                                  uint8 [n / 2, 1]
    <name>.weight.absmax                           float32, or uint8 with double quantization
    <name>.weight.quant_map                        float32 [16]
    <name>.weight.nested_absmax                    float32    double only
    <name>.weight.nested_quant_map                 float32 [256]
    <name>.weight.quant_state.bitsandbytes__<fmt>  uint8: JSON of quant_type, blocksize, dtype,
                                                   shape; double: nested_blocksize, nested_dtype,
                                                   nested_offset
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from decal.errors import QuantError
from decal.quant import FORMATS
from decal.quant.base import Packed, Recipe
from decal.quant.codebook import NESTED_BLOCK_SIZE, CodebookFormat, check_recipe, nested_map

_STATE = "quant_state.bitsandbytes__"
_MAP_TOLERANCE = 1e-6
"""Older versions computed the maps in another order of float32 operations."""


def _codebook(name: str, fmt: str) -> CodebookFormat:
    found = FORMATS.get(fmt)
    if not isinstance(found, CodebookFormat):
        raise QuantError(f"`{name}` is quantized as `{fmt}`, which is no 4-bit format decal knows")
    return found


def to_bnb(name: str, packed: Packed) -> dict[str, Tensor]:
    """The checkpoint tensors of the linear called `name`; parts are shared, not copied.

    Raises:
        QuantError: the format is not one of bitsandbytes' 4-bit formats.
    """
    fmt = _codebook(name, packed.recipe.format)
    codes = packed.parts["weight_packed"]
    state: dict[str, Any] = {
        "quant_type": fmt.name,
        "blocksize": packed.recipe.block_size,
        "dtype": str(packed.dtype).removeprefix("torch."),
        "shape": list(packed.shape),
    }
    tensors = {
        "absmax": packed.parts["absmax"],
        "quant_map": fmt.code(codes.device).clone(),
    }
    if packed.recipe.double:
        state |= {
            "nested_blocksize": NESTED_BLOCK_SIZE,
            "nested_dtype": "float32",
            "nested_offset": packed.parts["nested_offset"].item(),
        }
        tensors["nested_absmax"] = packed.parts["nested_absmax"]
        tensors["nested_quant_map"] = nested_map(codes.device).clone()
    text = bytearray(json.dumps(state).encode())
    tensors[_STATE + fmt.name] = torch.frombuffer(text, dtype=torch.uint8).to(codes.device)
    prefix = f"{name}.weight"
    return {prefix: codes, **{f"{prefix}.{key}": value for key, value in tensors.items()}}


def from_bnb(name: str, tensors: Mapping[str, Tensor]) -> Packed:
    """The packed weight of the linear called `name` from checkpoint tensors; others are ignored.

    Weights stored in another dtype than uint8 (`bnb_4bit_quant_storage`) are viewed as bytes.

    Raises:
        QuantError: missing or contradicting tensors, a format or codebook decal does not know.
    """
    prefix = f"{name}.weight"
    own = {k[len(prefix) + 1 :]: v for k, v in tensors.items() if k.startswith(prefix + ".")}
    states = [k for k in own if k.startswith(_STATE)]
    if prefix not in tensors or len(states) != 1:
        raise QuantError(
            f"`{prefix}` is not a 4-bit bitsandbytes weight: {len(states)} keys "
            f"`{prefix}.{_STATE}…`, expected one beside the weight"
        )
    fmt = _codebook(name, states[0].removeprefix(_STATE))
    state = _state(prefix, own[states[0]])
    double = "nested_absmax" in own
    recipe = Recipe(format=fmt.name, block_size=int(state["blocksize"]), double=double)
    check_recipe(recipe)
    codes = tensors[prefix]
    if codes.dtype != torch.uint8:
        codes = codes.contiguous().view(-1).view(torch.uint8)
    parts = {"weight_packed": codes.reshape(-1, 1)}
    maps = {"quant_map": fmt.code(codes.device)}
    names = ["absmax"]
    if double:
        _check_nested(prefix, state)
        offset = torch.tensor(state["nested_offset"], dtype=torch.float32, device=codes.device)
        parts["nested_offset"] = offset
        maps["nested_quant_map"] = nested_map(codes.device)
        names.append("nested_absmax")
    _check_maps(prefix, own, names, maps)
    parts |= {key: own[key] for key in names}
    rows, columns = state["shape"]
    dtype = getattr(torch, state["dtype"])
    packed = Packed(recipe=recipe, shape=(int(rows), int(columns)), dtype=dtype, parts=parts)
    _check_parts(prefix, packed, fmt)
    return packed


def _state(prefix: str, tensor: Tensor) -> dict[str, Any]:
    """The JSON beside a weight, with every field that is read present."""
    try:
        state = json.loads(bytes(tensor.cpu().contiguous().view(torch.uint8).tolist()))
        fields = {"blocksize", "dtype", "shape"}
        missing = fields - set(state)
        sound = not missing and len(state["shape"]) == 2
        sound = sound and isinstance(getattr(torch, state["dtype"], None), torch.dtype)
    except (ValueError, TypeError) as error:
        raise QuantError(f"`{prefix}.{_STATE}…` is not readable JSON: {error}") from error
    if not sound:
        raise QuantError(f"`{prefix}.{_STATE}…` does not describe a linear weight: {state}")
    result: dict[str, Any] = state
    return result


def _check_nested(prefix: str, state: Mapping[str, Any]) -> None:
    given = state.get("nested_blocksize"), state.get("nested_dtype")
    if given != (NESTED_BLOCK_SIZE, "float32") or "nested_offset" not in state:
        raise QuantError(
            f"`{prefix}` has nested scales of block size and dtype {given[0]} {given[1]}, decal "
            f"reads {NESTED_BLOCK_SIZE} float32"
        )


def _check_maps(
    prefix: str, own: Mapping[str, Tensor], names: list[str], maps: Mapping[str, Tensor]
) -> None:
    missing = [key for key in [*names, *maps] if key not in own]
    if missing:
        raise QuantError(f"`{prefix}` lacks {len(missing)} tensors: {', '.join(missing)}")
    for key, expected in maps.items():
        given = own[key].to(torch.float32).view(-1)
        if given.shape != expected.shape or (given - expected).abs().max() > _MAP_TOLERANCE:
            raise QuantError(f"`{prefix}.{key}` is not the codebook of its format")


def _check_parts(prefix: str, packed: Packed, fmt: CodebookFormat) -> None:
    wrong = []
    for key, (shape, dtype) in fmt.part_shapes(packed.shape, packed.recipe).items():
        part = packed.parts[key]
        if tuple(part.shape) != shape or part.dtype != dtype:
            wrong.append(f"{key}: {part.dtype} {list(part.shape)}, expected {dtype} {list(shape)}")
    if wrong:
        raise QuantError(
            f"`{prefix}` is said to be {list(packed.shape)}, but {len(wrong)} of its "
            f"{len(packed.parts)} tensors do not fit",
            details=wrong,
        )
