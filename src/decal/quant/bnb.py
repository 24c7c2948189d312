"""bitsandbytes' checkpoint keys, and the settings beside them in config.json, read and written.

Knows key names and the JSON inside; no modules, no files. The bytes of codes and scales are the
packed weight's own; only names, the codebooks and a small JSON are added. 4-bit formats:

    <name>.weight                                  uint8 [n / 2, 1]
    <name>.weight.absmax                           float32, or uint8 with double quantization
    <name>.weight.quant_map                        float32 [16]
    <name>.weight.nested_absmax                    float32    double only
    <name>.weight.nested_quant_map                 float32 [256]
    <name>.weight.quant_state.bitsandbytes__<fmt>  uint8: JSON of quant_type, blocksize, dtype,
                                                   shape; double: nested_blocksize, nested_dtype,
                                                   nested_offset

LLM.int8:

    <name>.weight          int8 [out, in]
    <name>.SCB             float32 [out]
    <name>.weight_format   uint8 []: 0 is row-major, the only one that is written today

Shapes are those of the logical weight [out, in], for GPT-2's Conv1D as well, whose plain files hold
[in, out]. config.json does not say the block size; each weight's JSON does.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from decal.errors import QuantError
from decal.kernels.stored import NESTED_BLOCK_SIZE
from decal.quant import FORMATS
from decal.quant.base import Packed, Recipe
from decal.quant.codebook import CodebookFormat, check_recipe, nested_map
from decal.quant.int8 import INT8, OUTLIER
from decal.untrusted import parse_json

STATE = "quant_state.bitsandbytes__"
_LONGEST_FLOAT = -1.2345678901234567e-100
_LONGEST_STATE = 10_000
"""Bytes of the JSON beside a weight; it has some three hundred."""
_LARGEST = 3e38
"""What float32 can hold."""
_MAP_TOLERANCE = 1e-6
"""Older versions computed the maps in another order of float32 operations."""


def _codebook(name: str, fmt: str) -> CodebookFormat:
    found = FORMATS.get(fmt)
    if not isinstance(found, CodebookFormat):
        raise QuantError(f"`{name}` is quantized as `{fmt}`, which is no 4-bit format decal knows")
    return found


def to_bnb(name: str, packed: Packed, *, padded: bool = False) -> dict[str, Tensor]:
    """The checkpoint tensors of the linear called `name`; parts are shared, not copied.

    Args:
        padded: fill the JSON with blanks to the length that `bnb_shapes` announces.

    Raises:
        QuantError: the format is not one of bitsandbytes'.
    """
    if packed.recipe.format == INT8.name:
        rows = torch.zeros((), dtype=torch.uint8, device=packed.parts["CB"].device)
        codes, scales = packed.parts["CB"], packed.parts["SCB"]
        return {f"{name}.weight": codes, f"{name}.SCB": scales, f"{name}.weight_format": rows}
    fmt = _codebook(name, packed.recipe.format)
    codes = packed.parts["weight_packed"]
    offset = packed.parts["nested_offset"].item() if packed.recipe.double else None
    text = _state_text(packed.recipe, packed.shape, packed.dtype, offset)
    if padded:
        text = text.ljust(_state_length(packed.recipe, packed.shape, packed.dtype))
    tensors = {
        "absmax": packed.parts["absmax"],
        "quant_map": fmt.code(codes.device).clone(),
    }
    if packed.recipe.double:
        tensors["nested_absmax"] = packed.parts["nested_absmax"]
        tensors["nested_quant_map"] = nested_map(codes.device).clone()
    state = torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)
    tensors[STATE + fmt.name] = state.to(codes.device)
    prefix = f"{name}.weight"
    return {prefix: codes, **{f"{prefix}.{key}": value for key, value in tensors.items()}}


def bnb_shapes(
    name: str, shape: tuple[int, int], recipe: Recipe, dtype: torch.dtype
) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Keys, shapes and dtypes of `to_bnb(…, padded=True)` for a weight [out, in] of `dtype`."""
    if recipe.format == INT8.name:
        parts = INT8.part_shapes(shape, recipe)
        return {
            f"{name}.weight": parts["CB"],
            f"{name}.SCB": parts["SCB"],
            f"{name}.weight_format": ((), torch.uint8),
        }
    fmt = _codebook(name, recipe.format)
    parts = fmt.part_shapes(shape, recipe)
    prefix = f"{name}.weight"
    shapes = {prefix: parts["weight_packed"], f"{prefix}.absmax": parts["absmax"]}
    shapes[f"{prefix}.quant_map"] = ((16,), torch.float32)
    if recipe.double:
        shapes[f"{prefix}.nested_absmax"] = parts["nested_absmax"]
        shapes[f"{prefix}.nested_quant_map"] = ((256,), torch.float32)
    shapes[f"{prefix}.{STATE}{fmt.name}"] = ((_state_length(recipe, shape, dtype),), torch.uint8)
    return shapes


def _state_text(
    recipe: Recipe, shape: tuple[int, int], dtype: torch.dtype, offset: float | None
) -> str:
    state: dict[str, Any] = {
        "quant_type": recipe.format,
        "blocksize": recipe.block_size,
        "dtype": str(dtype).removeprefix("torch."),
        "shape": list(shape),
    }
    if offset is not None:
        state |= {
            "nested_blocksize": NESTED_BLOCK_SIZE,
            "nested_dtype": "float32",
            "nested_offset": offset,
        }
    return json.dumps(state)


def _state_length(recipe: Recipe, shape: tuple[int, int], dtype: torch.dtype) -> int:
    longest = _LONGEST_FLOAT if recipe.double else None
    return len(_state_text(recipe, shape, dtype, longest))


def from_bnb(name: str, tensors: Mapping[str, Tensor]) -> Packed:
    """The packed weight of the linear called `name` from checkpoint tensors; others are ignored.

    4-bit weights stored in another dtype than uint8 (`bnb_4bit_quant_storage`) are viewed as bytes.

    Raises:
        QuantError: missing or contradicting tensors, a format or codebook decal does not know.
    """
    prefix = f"{name}.weight"
    if f"{name}.SCB" in tensors:
        return _from_int8(name, tensors)
    own = {k[len(prefix) + 1 :]: v for k, v in tensors.items() if k.startswith(prefix + ".")}
    states = [k for k in own if k.startswith(STATE)]
    if prefix not in tensors or len(states) != 1:
        raise QuantError(
            f"`{prefix}` is not a 4-bit bitsandbytes weight: {len(states)} keys "
            f"`{prefix}.{STATE}…`, expected one beside the weight"
        )
    fmt = _codebook(name, states[0].removeprefix(STATE))
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


def stored_shape(name: str, state: Tensor) -> tuple[int, int]:
    """[out, in] of a 4-bit weight, from the JSON beside it. Raises QuantError."""
    rows, columns = _state(f"{name}.weight", state)["shape"]
    return int(rows), int(columns)


def _from_int8(name: str, tensors: Mapping[str, Tensor]) -> Packed:
    codes, scales = tensors.get(f"{name}.weight"), tensors[f"{name}.SCB"]
    layout = tensors.get(f"{name}.weight_format")
    sound = codes is not None and codes.dtype == torch.int8 and codes.ndim == 2
    if codes is None or not sound or scales.dtype != torch.float32:
        kind = "no weight" if codes is None else f"{codes.dtype} {list(codes.shape)}"
        raise QuantError(f"`{name}.weight` is no int8 matrix with float32 scales: {kind}")
    if scales.shape != codes.shape[:1]:
        raise QuantError(
            f"`{name}.SCB` holds {scales.numel()} scales, `{name}.weight` has {len(codes)} rows"
        )
    if layout is not None and (layout.numel() != 1 or bool((layout != 0).any())):
        raise QuantError(
            f"`{name}.weight` is stored in an order made for one kind of GPU "
            f"(weight_format {layout.reshape(-1)[:4].tolist()}), decal reads row-major ones",
            hint="load and save it with a current bitsandbytes",
        )
    return Packed(
        recipe=Recipe(format=INT8.name),
        shape=(codes.shape[0], codes.shape[1]),
        dtype=torch.float16,
        parts={"CB": codes, "SCB": scales},
    )


def _state(prefix: str, tensor: Tensor) -> dict[str, Any]:
    """The JSON beside a weight, with every field that is read present."""
    if tensor.dtype != torch.uint8 or tensor.numel() > _LONGEST_STATE:
        kind = f"{tensor.dtype} {list(tensor.shape)}"
        raise QuantError(f"`{prefix}.{STATE}…` is not readable JSON: {kind}")
    try:
        state = parse_json(bytes(tensor.reshape(-1).tolist()))
    except ValueError as error:
        raise QuantError(f"`{prefix}.{STATE}…` is not readable JSON: {error}") from error
    if not _sound(state):
        raise QuantError(f"`{prefix}.{STATE}…` does not describe a linear weight: {state!r:.300}")
    result: dict[str, Any] = state
    return result


def _sound(state: object) -> bool:
    """Whether blocksize, shape, dtype and the double quantization's offset are what they must."""
    if not isinstance(state, dict):
        return False
    shape, name = state.get("shape"), state.get("dtype")
    dtype = getattr(torch, name, None) if isinstance(name, str) else None
    numbers = [*shape, state.get("blocksize")] if isinstance(shape, list) else []
    return (
        len(numbers) == 3
        and all(type(n) is int and 0 < n < 1 << 40 for n in numbers)
        and isinstance(dtype, torch.dtype)
        and dtype.is_floating_point
        and type(state.get("nested_offset", 0.0)) in (int, float)
        and abs(state.get("nested_offset", 0.0)) < _LARGEST
    )


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
        same = own[key].numel() == expected.numel()
        given = own[key].to(torch.float32).reshape(-1) if same else expected
        # The right way round for NaN, which is not smaller than anything.
        if not same or not bool((given - expected).abs().max() <= _MAP_TOLERANCE):
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


def describe_quantization(config: Mapping[str, Any]) -> dict[str, Any] | None:
    """What a model folder's config.json says of bitsandbytes' quantization, None if nothing.

    Returns:
        `format` (nf4, fp4 or int8), `double` (4-bit only), `compute_dtype` (4-bit only) and
        `skip_modules`. The block size is not there: it stands with each weight.
    """
    stored = config.get("quantization_config")
    if not isinstance(stored, Mapping):
        return None
    # transformers wrote no quant_method before 4.35.
    if stored.get("quant_method", "bitsandbytes") != "bitsandbytes":
        return None
    given = stored.get("llm_int8_skip_modules")
    skipped = [str(name) for name in given] if isinstance(given, list) else []
    if stored.get("load_in_4bit"):
        return {
            "format": str(stored.get("bnb_4bit_quant_type", "fp4")),
            "double": bool(stored.get("bnb_4bit_use_double_quant", False)),
            "compute_dtype": str(stored.get("bnb_4bit_compute_dtype", "float32")),
            "skip_modules": skipped,
        }
    if stored.get("load_in_8bit"):
        return {"format": INT8.name, "skip_modules": skipped}
    return None


def quantization_config(recipe: Recipe, dtype: torch.dtype, skipped: list[str]) -> dict[str, Any]:
    """The `quantization_config` of config.json by which transformers loads such a folder.

    Args:
        dtype: what 4-bit weights compute in.
        skipped: names of the linear layers that are not quantized.
    """
    int8 = recipe.format == INT8.name
    settings: dict[str, Any] = {
        "quant_method": "bitsandbytes",
        "load_in_4bit": not int8,
        "load_in_8bit": int8,
        "llm_int8_enable_fp32_cpu_offload": False,
        "llm_int8_has_fp16_weight": False,
        "llm_int8_skip_modules": skipped or None,
        "llm_int8_threshold": OUTLIER,
    }
    if not int8:
        settings |= {
            "bnb_4bit_quant_type": recipe.format,
            "bnb_4bit_use_double_quant": recipe.double,
            "bnb_4bit_compute_dtype": str(dtype).removeprefix("torch."),
            "bnb_4bit_quant_storage": "uint8",
        }
    return settings
