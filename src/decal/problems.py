"""What is wrong with settings, said in decal's voice: pydantic's errors become `ConfigError`.

Knows pydantic, but neither the settings themselves nor where they came from: the caller gives the
model that was validated, and a function that names the place of a key (`run.yaml:7`).

pydantic reports a value that fits no branch of a union once per branch, and puts the branch into
the key path (`adapter.lora.r`). Here the path is walked along the model's fields, whatever is not a
field is dropped, and one key is reported once, with all that it could have been.
"""

from __future__ import annotations

import json
import types
from collections.abc import Iterator, Sequence
from typing import Annotated, Any, Literal, NamedTuple, Union, get_args, get_origin

from pydantic import BaseModel, BeforeValidator, ValidationError
from pydantic.fields import FieldInfo

from decal.errors import ConfigError, nearest

__all__ = ["Key", "Problem", "collected", "config_error", "describe", "expects", "problems"]

Key = tuple[str, ...]

MOST_SHOWN = 20
LONGEST = 500
"""Characters of one problem."""

ALIASES = {
    "adapter_name_or_path": "from",
    "alpha": "lora_alpha",
    "bf16": "dtype",
    "bnb_4bit_compute_dtype": "dtype",
    "bnb_4bit_quant_type": "format",
    "bnb_4bit_use_double_quant": "double",
    "bs": "batch_size",
    "dataset": "data",
    "dataset_name": "data",
    "device_map": "device",
    "dropout": "lora_dropout",
    "early_stopping_patience": "early_stopping",
    "eval_dataset": "eval",
    "eval_steps": "eval_every",
    "fp16": "dtype",
    "gradient_accumulation_steps": "batch_size",
    "learning_rate": "lr",
    "llm_int8_skip_modules": "skip_modules",
    "load_in_4bit": "quant",
    "load_in_8bit": "quant",
    "lr_scheduler_type": "schedule",
    "max_seq_length": "max_length",
    "max_train_samples": "limit",
    "micro_batch_size": "micro_batch_tokens",
    "model": "base",
    "model_name_or_path": "base",
    "num_epochs": "epochs",
    "num_train_epochs": "epochs",
    "optim": "optimizer",
    "output_dir": "output",
    "per_device_train_batch_size": "batch_size",
    "quantization": "quant",
    "rank": "r",
    "save_steps": "save_every",
    "task": "objective",
    "task_type": "objective",
    "torch_dtype": "dtype",
    "warmup_ratio": "warmup",
}
"""Names of the same thing in tutorials for other libraries."""

NEEDLESS = {
    "assistant_only_loss": "the assistant's tokens alone are trained",
    "completion_only_loss": "the completion's tokens alone are trained",
    "fan_in_fan_out": "the base says how its weights lie",
    "group_by_length": "batches are flattened, nothing is padded",
    "inference_mode": "an adapter is trainable where it is trained",
    "logging_steps": "every step is recorded",
    "packing": "batches are flattened, nothing is padded",
    "remove_unused_columns": "columns that are not used are named and left alone",
}
"""Settings of other libraries that have no counterpart, and why none is needed."""


class Problem(NamedTuple):
    """One key and what is wrong with it."""

    key: Key
    text: str

    def __str__(self) -> str:
        return f"{dotted(self.key)}: {self.text}" if self.key else self.text


class _Place(NamedTuple):
    key: Key
    models: tuple[type[BaseModel], ...]
    """The sections that the key may stand in."""
    field: FieldInfo | None


def config_error(error: ValidationError, model: type[BaseModel], name: str) -> ConfigError:
    """The ConfigError for a ValidationError of `model`.

    Args:
        error: what pydantic raised.
        model: the model that was validated.
        name: what the settings are called.
    """
    found = [str(problem) for problem in problems(error, model)]
    return collected(found if len(found) > 1 else [f"{name}: {found[0]}"], name)


def collected(lines: Sequence[str], name: str, hint: str | None = None) -> ConfigError:
    """One ConfigError for all `lines`: a single one is the sentence itself."""
    # A key or value may be of any length.
    shown = [f"{line[:LONGEST]}..." if len(line) > LONGEST else line for line in lines[:MOST_SHOWN]]
    if len(lines) == 1:
        return ConfigError(shown[0], hint=hint)
    if len(lines) > MOST_SHOWN:
        shown.append(f"and {len(lines) - MOST_SHOWN} more")
    return ConfigError(f"{name} has {len(lines)} problems", details=shown, hint=hint)


def problems(error: ValidationError, model: type[BaseModel]) -> list[Problem]:
    """One problem per key, in the order of the settings that were given."""
    found: dict[Key, Problem] = {}
    for item in error.errors(include_url=False):
        place = _walk(model, item["loc"], unknown=item["type"] == "extra_forbidden")
        problem = _problem(model, place, item)
        found.setdefault(problem.key, problem)
    return list(found.values())


def _walk(model: type[BaseModel], loc: Sequence[str | int], *, unknown: bool) -> _Place:
    """The key that pydantic's `loc` means: names of union branches dropped."""
    key: list[str] = []
    models: tuple[type[BaseModel], ...] = (model,)
    field: FieldInfo | None = None
    for i, part in enumerate(loc):
        if unknown and i == len(loc) - 1:
            return _Place((*key, str(part)), models, None)
        if isinstance(part, int):
            continue  # an element of a list: the list is reported
        found = next((f for m in models for f in [_field(m, part)] if f), None)
        if found is not None:
            key.append(part)
            field = found
            models = tuple(_models(field.annotation)) or models
        else:
            models = tuple(m for m in models if _tag(m) == part) or models
    return _Place(tuple(key), models, field)


def _field(model: type[BaseModel], key: str) -> FieldInfo | None:
    """The field that is written `key`."""
    fields = model.model_fields.items()
    return next((f for name, f in fields if key == (f.alias or name)), None)


def _models(annotation: Any) -> Iterator[type[BaseModel]]:
    """The sections inside a field's type."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for argument in get_args(annotation):
        yield from _models(argument)


def _tag(model: type[BaseModel]) -> Any:
    """The value of the field that tells the models of a union apart."""
    method = model.model_fields.get("method")
    return method.default if method else None


def _problem(model: type[BaseModel], place: _Place, item: Any) -> Problem:
    kind, given = item["type"], item["input"]
    if kind == "extra_forbidden":
        if place.key[-1] in NEEDLESS:
            return Problem(place.key, f"unknown key, leave it out: {NEEDLESS[place.key[-1]]}")
        meant = _suggestion(model, place)
        if meant == dotted(place.key):
            return Problem(
                place.key, f"not a key of {' or '.join(str(_tag(m)) for m in place.models)}"
            )
        return Problem(place.key, "unknown key" + (f", did you mean `{meant}`?" if meant else ""))
    if kind == "value_error":
        return Problem(place.key, str(item["ctx"]["error"]))
    if kind == "union_tag_invalid":
        tags = [str(_tag(m)) for m in place.models]
        return _wrong_choice((*place.key, "method"), tags, item["ctx"]["tag"])
    wanted = expects(place.field.annotation, place.field.metadata) if place.field else "a mapping"
    if kind == "missing":
        doc = place.field.description if place.field else None
        return Problem(place.key, f"missing, expected {wanted}" + (f": {doc}" if doc else ""))
    if kind == "literal_error" and isinstance(given, str) and place.field:
        choices = [str(c) for c in get_args(place.field.annotation)]
        if set(choices) == {c for c in get_args(place.field.annotation) if isinstance(c, str)}:
            return _wrong_choice(place.key, choices, given)
    advice = _advice(wanted, given)
    return Problem(place.key, f"expected {wanted}, got {describe(given)}{advice}")


def _wrong_choice(key: Key, choices: Sequence[str], given: str) -> Problem:
    meant = nearest(given, choices)
    text = f"expected one of {', '.join(choices)}, got {describe(given)}"
    return Problem(key, text + (f", did you mean `{meant}`?" if meant else ""))


def _advice(wanted: str, given: Any) -> str:
    """What to do about a number in quotes, or a text without them."""
    if isinstance(given, str) and "number" in wanted:
        try:
            float(given)
        except ValueError:
            return ""
        return " (remove the quotes)"
    if isinstance(given, int | float) and not isinstance(given, bool) and "text" in wanted:
        return " (put it in quotes)" if "number" not in wanted else ""
    return ""


def _suggestion(model: type[BaseModel], place: _Place) -> str | None:
    """The known key that was most likely meant: a neighbour, else the same name elsewhere."""
    neighbours = [f.alias or name for m in place.models for name, f in m.model_fields.items()]
    name = ALIASES.get(place.key[-1], place.key[-1])
    near = nearest(name, neighbours)
    if name in neighbours or (near and not _elsewhere(model, name)):
        return near
    found = _elsewhere(model, name)
    return found[0] if found else None


def _elsewhere(model: type[BaseModel], name: str) -> list[str]:
    """All dotted keys of `model` that end in `name`."""
    found = [name] if name in model.model_fields else []
    for key, field in model.model_fields.items():
        for section in _models(field.annotation):
            found += [f"{key}.{k}" for k in _elsewhere(section, name)]
    return found


def expects(annotation: Any, metadata: Sequence[Any] = ()) -> str:
    """What a field takes, in words: `a whole number of at least 1 or null`."""
    origin = get_origin(annotation)
    if origin is Annotated:
        inner, *more = get_args(annotation)
        return expects(inner, [*metadata, *_flat(more)])
    if origin in (Union, types.UnionType):
        *first, last = dict.fromkeys(expects(a, metadata) for a in get_args(annotation))
        return f"{', '.join(first)} or {last}" if first else last
    if origin is Literal:
        choices = [str(c) for c in get_args(annotation)]
        return choices[0] if len(choices) == 1 else f"one of {', '.join(choices)}"
    if origin is tuple:
        return f"a list of {expects(get_args(annotation)[0])}"
    if origin is dict:
        return f"a mapping from text to {expects(get_args(annotation)[1])}"
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        short = any(isinstance(m, BeforeValidator) for m in metadata)
        return "text or a mapping" if short else "a mapping"
    words = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}
    return words.get(annotation, "null") + (_bounds(metadata) if annotation in (int, float) else "")


def _flat(metadata: Sequence[Any]) -> list[Any]:
    return [x for m in metadata for x in (m.metadata if isinstance(m, FieldInfo) else [m])]


def _bounds(metadata: Sequence[Any]) -> str:
    words = {"gt": "above", "ge": "of at least", "lt": "below", "le": "of at most"}
    found = [
        f"{word} {getattr(m, sign):g}"
        for m in metadata
        for sign, word in words.items()
        if getattr(m, sign, None) is not None
    ]
    return f" {' and '.join(found)}" if found else ""


def describe(value: Any) -> str:
    """A value as it would stand in run.yaml, cut to one line."""
    if isinstance(value, dict):
        return "a mapping"
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, str):
        text = json.dumps(value, ensure_ascii=False)
    elif isinstance(value, list | tuple):
        text = f"the list [{', '.join(describe(v) for v in value)}]"
    else:
        text = str(value)
    return text if len(text) <= 60 else text[:57] + "..."


def dotted(key: Key) -> str:
    """A key path as it is written after --set: train.lr."""
    return ".".join(key)
