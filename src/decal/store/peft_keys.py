"""What each tensor of a PEFT adapter file is, told by its key; and the key of what is written.

With m a module's path in the base model and p a parameter's full name, behind the prefix
`base_model.model.` (peft's two wrappers; the adapter's name is not stored):

    <m>.lora_A.weight  <m>.lora_B.weight     factors, [r, in] and [out, r]
    <m>.lora_B.bias                          lora_bias, [out]
    <m>.lora_embedding_A  …_B                factors of an embedding, [r, vocabulary], [dim, r]
    <p>                                      modules_to_save; biases (`bias: all`) of other layers
    <m>.base_layer.bias                      biases of adapted layers (`bias: all`, `lora_only`)
    <m>.base_layer.weight                    the base's own weight, where an embedding or head is
                                             adapted; <p> where the vocabulary was resized
    <m>.modules_to_save.…                    the same as <p> once more (resized, or `bias: all`)
    <m>.original_module.…                    what <m> was before; never computed with

A bare <p> is told apart by the settings: it belongs to modules_to_save, or it is a bias that the
settings train, or it can only be a copy of the base's weight, which is held against the base where
the adapter meets one. With ensure_weight_tying peft also writes the head that follows the
embedding; it is read as a module of its own, so nothing is left to a reader's tying.

Looks at headers only: names, shapes and dtypes. Knows no values, files or models.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from decal.config import LoraConfig
from decal.store.peft_config import dotted, misnamed, saved_by, unsaved
from decal.store.tensorfile import TensorSpec

__all__ = ["FOREIGN", "PREFIX", "Contents", "Misfit", "Pair", "arranged", "fitted", "pair_keys"]

PREFIX = "base_model.model."
FLOATS = ("F32", "BF16", "F16")

Misfit = tuple[str, str]
"""A tensor or module, and what is wrong with it."""

_PARTS = {
    ".lora_A.weight": ("A", False),
    ".lora_B.weight": ("B", False),
    ".lora_B.bias": ("bias", False),
    ".lora_embedding_A": ("A", True),
    ".lora_embedding_B": ("B", True),
}
"""Ending of the key -> part of the pair, and whether it is an embedding's."""
FOREIGN = {
    "lora_magnitude_vector": "a DoRA magnitude",
    "trainable_tokens_delta": "trained token embeddings",
}
_UNKNOWN = "neither a part of LoRA nor a parameter that the settings train"
_COPY = ".base_layer."
_AGAIN = ".modules_to_save."
_BEFORE = ".original_module."


class Pair(NamedTuple):
    """Keys of one module's factors."""

    A: str
    B: str
    bias: str | None
    embedding: bool
    shape: tuple[int, int]
    """[out, in]; of an embedding dimensions, vocabulary."""
    r: int


@dataclass
class Contents:
    """The keys of one file, arranged by what they are."""

    pairs: dict[str, Pair] = field(default_factory=dict)
    """Module -> its factors."""
    full: dict[str, str] = field(default_factory=dict)
    """Parameter trained whole -> key."""
    copies: dict[str, str] = field(default_factory=dict)
    """Parameter of the base -> key of its copy."""
    twins: list[tuple[str, str]] = field(default_factory=list)
    """Pairs of keys that must hold the same."""
    problems: list[Misfit] = field(default_factory=list)


@dataclass
class _Found:
    """Keys by their endings, before the settings are asked."""

    parts: dict[str, dict[str, str]] = field(default_factory=dict)
    embeddings: set[str] = field(default_factory=set)
    whole: dict[str, str] = field(default_factory=dict)
    """Parameter -> key, where the key is the bare name."""
    based: dict[str, str] = field(default_factory=dict)
    """Parameter -> key, where the key names a base_layer."""
    again: dict[str, str] = field(default_factory=dict)
    """Name with `modules_to_save` in it -> key."""
    problems: list[Misfit] = field(default_factory=list)


def pair_keys(module: str, *, embedding: bool) -> tuple[str, str, str]:
    """Keys of A, B and B's bias, as they are written."""
    start = PREFIX + module
    if embedding:
        return f"{start}.lora_embedding_A", f"{start}.lora_embedding_B", ""
    return f"{start}.lora_A.weight", f"{start}.lora_B.weight", f"{start}.lora_B.bias"


def arranged(specs: Mapping[str, TensorSpec]) -> Contents:
    """The factors of a file; `fitted` asks the settings about the rest.

    `problems` has every tensor that has no place whatever the settings are.
    """
    found = _sorted_keys(specs)
    contents = Contents(problems=found.problems)
    for module, parts in sorted(found.parts.items()):
        _pair(contents, module, parts, module in found.embeddings, specs)
    _whole(contents, found)
    return contents


def _sorted_keys(specs: Mapping[str, TensorSpec]) -> _Found:
    found = _Found()
    for key, spec in sorted(specs.items()):
        name = key.removeprefix(PREFIX)
        ending = next((e for e in _PARTS if name.endswith(e)), "")
        module = name.removesuffix(ending)
        if not key.startswith(PREFIX) or name.startswith(PREFIX):
            found.problems.append((key, f"does not have the prefix `{PREFIX}` once"))
        elif ending and module:
            part, embedding = _PARTS[ending]
            if len(spec.shape) != (1 if part == "bias" else 2) or spec.dtype not in FLOATS:
                found.problems.append((key, f"{spec.dtype} {list(spec.shape)} is no factor"))
                continue
            parts = found.parts.setdefault(module, {})
            if part in parts or (parts and embedding != (module in found.embeddings)):
                found.problems.append((module, "has factors of a layer and of an embedding"))
                continue
            parts[part] = key
            if embedding:
                found.embeddings.add(module)
        elif _foreign(name) or "." not in name:
            found.problems.append((key, _foreign(name) or _UNKNOWN))
        elif spec.dtype not in FLOATS:
            found.problems.append((key, f"{spec.dtype} {list(spec.shape)} is no parameter"))
        elif _BEFORE in name:
            continue
        elif _AGAIN in name:
            found.again[name] = key
        elif _COPY in name:
            found.based[name.replace(_COPY, ".", 1)] = key
        else:
            found.whole[name] = key
    return found


def _foreign(name: str) -> str | None:
    last = name.rpartition(".")[2]
    if last in FOREIGN:
        return FOREIGN[last]
    return _UNKNOWN if re.search(r"\.lora_[A-Za-z]", name) else None


def _pair(
    contents: Contents,
    module: str,
    parts: Mapping[str, str],
    embedding: bool,
    specs: Mapping[str, TensorSpec],
) -> None:
    missing = [part for part in "AB" if part not in parts]
    if missing:
        has = "B" if missing == ["A"] else "A" if missing == ["B"] else "bias"
        reason = f"has lora_{has} but no lora_{missing[0]}"
        contents.problems.append((module, reason.replace("lora_bias", "lora_B.bias")))
        return
    (r, columns), (out, other) = specs[parts["A"]].shape, specs[parts["B"]].shape
    bias = parts.get("bias")
    if r != other:
        contents.problems.append((module, f"A has rank {r}, B has {other}"))
    elif bias is not None and specs[bias].shape != (out,):
        size = list(specs[bias].shape)
        contents.problems.append((module, f"lora_B.bias has shape {size}, B has out={out}"))
    else:
        contents.pairs[module] = Pair(parts["A"], parts["B"], bias, embedding, (out, columns), r)


def _whole(contents: Contents, found: _Found) -> None:
    for name, key in found.based.items():
        module = name.rpartition(".")[0]
        if module not in found.parts:
            contents.problems.append((key, "is the base of a module that has no factors"))
        elif name.endswith(".bias"):
            contents.full[name] = key
        else:
            contents.copies[name] = key
    contents.full.update(found.whole)
    for name, key in found.again.items():
        module, _, inner = name.partition(_AGAIN)
        # Inside a block peft leaves the adapter's name in the key.
        names = (f"{module}.{inner}", f"{module}.{inner.partition('.')[2]}")
        twin = next((n for n in names if n in found.whole), None)
        if twin is None:
            contents.problems.append((key, _UNKNOWN))
        else:
            contents.twins.append((found.whole[twin], key))


def fitted(
    contents: Contents,
    config: LoraConfig,
    specs: Mapping[str, TensorSpec],
    *,
    task_type: str | None,
    tying: bool,
) -> LoraConfig:
    """Holds the contents against the settings; what does not fit goes to `problems`.

    Parameters that the settings do not train move from `full` to `copies`. Returns the settings
    without what peft adds by itself: with `tying` a head that follows its embedding becomes a
    module of its own, and heads of other architectures leave modules_to_save. Raises re.error for a
    pattern that is broken.
    """
    followers, heads = False, []
    for module, pair in contents.pairs.items():
        wanted, reason = config.rank_of(module), misnamed(module, config)
        if pair.r != wanted:
            reason = f"A has rank {pair.r}, B has {pair.r}, the config has r={wanted}"
        elif reason and tying and _follows(pair, contents.pairs):
            followers, reason = True, None
        elif not pair.embedding and config.lora_bias != (pair.bias is not None):
            word = "but lora_bias is off" if pair.bias else "although lora_bias is on"
            reason = f"has {'a' if pair.bias else 'no'} lora_B.bias {word}"
        if reason:
            contents.problems.append((module, reason))
    for name, key in list(contents.full.items()):
        saved = saved_by(name, config.modules_to_save)
        if saved or _trained_bias(name, contents.pairs, config.bias):
            continue
        if tying and config.modules_to_save and name.endswith(".weight"):
            heads.append(name.removesuffix(".weight"))
            continue
        del contents.full[name]
        contents.copies[name] = key
    _check_copies(contents, specs)
    missing, foreign = unsaved(config.modules_to_save, contents.full, task_type)
    contents.problems += [(name, "is in modules_to_save, no tensor is of it") for name in missing]
    saved_names = [name for name in config.modules_to_save if name not in foreign]
    changes: dict[str, object] = {
        "modules_to_save": (*dotted(saved_names, contents.full), *heads),
    }
    if followers:
        changes |= {"target_modules": tuple(sorted(contents.pairs)), "layers_to_transform": None}
    return config.model_copy(update=changes)


def _follows(pair: Pair, pairs: Mapping[str, Pair]) -> bool:
    """Whether the factors can be those of an embedding turned round."""
    embeddings = [other for other in pairs.values() if other.embedding]
    return not pair.embedding and any(e.shape == pair.shape[::-1] for e in embeddings)


def _trained_bias(name: str, pairs: Mapping[str, Pair], bias: str) -> bool:
    if bias == "all":
        return "bias" in name
    return bias == "lora_only" and name.endswith(".bias") and name[:-5] in pairs


def _check_copies(contents: Contents, specs: Mapping[str, TensorSpec]) -> None:
    """A copy is a matrix, or the bias beside one; of an adapted module, of that module's shape."""
    for name, key in contents.copies.items():
        module, shape = name.rpartition(".")[0], specs[key].shape
        pair = contents.pairs.get(module)
        if name.endswith(".weight") and len(shape) == 2:
            stored = pair.shape[::-1] if pair and pair.embedding else pair.shape if pair else shape
            if shape != stored:
                reason = f"the copy of the base has shape {list(shape)}, the factors {list(stored)}"
                contents.problems.append((module, reason))
        elif not (name.endswith(".bias") and f"{module}.weight" in contents.copies):
            contents.problems.append((key, _UNKNOWN))
