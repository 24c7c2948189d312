"""`decal compare`: the base and its adapters on the same prompts or the same rows."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

from decal.config import DataConfig
from decal.errors import AdapterError, DataError, DecalError
from decal.model.adapter import Adapter
from decal.model.heads import labels_of
from decal.model.inject import attach, disabled, use
from decal.verbs.load import load_adapter
from decal.verbs.measure import exam, measure
from decal.verbs.target import (
    BASE,
    LABELS,
    QUANTIZER,
    Target,
    base_of,
    data_settings,
    metadata_json,
    read,
)
from decal.verbs.text import Chat, Prompt, classify, complete

BASE_NAME = "base"
Observe = Callable[[str, int, int], None]
_READING = ("layout", "columns", "system", "turns")
"""Settings that decide what a row means."""


def compare(
    base: str | None,
    adapters: Mapping[str, str],
    *,
    prompts: Sequence[Prompt] | None = None,
    data: str | DataConfig | None = None,
    limit: int | None = None,
    max_new_tokens: int = 64,
    trust_remote_code: bool = False,
    allow_other_base: bool = False,
    observe: Observe | None = None,
) -> dict[str, Any]:
    """Runs base and adapters, one base in memory, all adapters on it.

    Args:
        base: the base, if not the one that the adapters name.
        adapters: name -> run or adapter folder; all trained on one base, quantized alike.
        prompts: what to complete; plain text is a user turn where the tokenizer has a chat
            template, with the system message of the run's rows.
        data: rows with known answers to measure on. A path is read as the run of the adapters
            read its own rows (layout, columns, system); a DataConfig as it says.
        limit: use only the first so many rows.
        trust_remote_code: run Python code that comes with the base.
        allow_other_base: warn where the base is not an adapter's own, instead of refusing.
        observe: called with the name of a model, steps done and steps in total.

    Returns:
        {"base": path, "results": {name: {...}}} with, per name, `outputs` for prompts, and what
        `measure` returns for data. A base whose classification head is new has no results.

    Raises:
        DecalError: neither prompts nor data, or the name `base` for an adapter.
        AdapterError: adapters of different bases, quantizations, labels or readings of rows.
        DataError: rows or prompts that cannot be used.
    """
    _refuse_nothing(adapters, bool(prompts or data))
    found = {name: read(path) for name, path in adapters.items()}
    loaded = {name: adapter for name, (_, adapter) in found.items()}
    _refuse_mixed(loaded, base, allow_other_base)
    reading = _reading({name: target for name, (target, _) in found.items()})
    rows = rows_as_read(data, reading, limit) if data else None
    model, tokenizer = _attached(loaded, base, trust_remote_code, allow_other_base)
    asked = exam(model, tokenizer, rows) if rows else None
    turns = _turns(prompts or (), model, tokenizer, reading.system)
    results: dict[str, Any] = {}
    for name in (BASE_NAME, *loaded):
        if name == BASE_NAME and model.decal_base.new:
            continue
        step = partial(observe, name) if observe else None
        results[name] = {}
        with _active(model, name):
            if turns:
                results[name]["outputs"] = answers(model, tokenizer, turns, max_new_tokens, step)
            if asked:
                results[name] |= measure(
                    model, tokenizer, asked, max_new_tokens=max_new_tokens, observe=step
                )
    path, _ = base_of(next(iter(loaded.values())), base)
    shown = {"prompts": [_shown(prompt) for prompt in prompts]} if prompts else {}
    return {"base": path, **shown, "results": results}


def _refuse_nothing(adapters: Mapping[str, str], anything: bool) -> None:
    if not adapters:
        raise DecalError("no adapter to compare", hint="decal compare NAME=ADAPTER … --data FILE")
    if not anything:
        raise DecalError(
            "nothing to compare on", hint="give --prompt TEXT, --prompts FILE or --data FILE"
        )
    if BASE_NAME in adapters:
        raise DecalError(f"`{BASE_NAME}` is what the base is called; name the adapter differently")


def _attached(
    adapters: Mapping[str, Adapter],
    base: str | None,
    trust_remote_code: bool,
    allow_other_base: bool,
) -> tuple[Any, Any]:
    """Model and tokenizer, loaded as the first adapter was trained, with all adapters on it."""
    first, *others = adapters
    model, tokenizer = load_adapter(
        adapters[first],
        base,
        "auto",
        trust_remote_code=trust_remote_code,
        allow_other_base=allow_other_base,
        name=first,
    )
    for name in others:
        attach(model, adapters[name], name, allow_other_base=allow_other_base)
    return model, tokenizer


def _active(model: Any, name: str) -> AbstractContextManager[Any]:
    return disabled(model) if name == BASE_NAME else use(model, name)


def answers(
    model: Any, tokenizer: Any, turns: Sequence[Prompt], max_new_tokens: int, step: Any = None
) -> list[str]:
    """What the model makes of each prompt: completions, or a classifier's labels.

    Raises:
        DataError: chats for a classifier, and whatever `complete` and `classify` refuse.
    """
    if labels_of(model) is None:
        return complete(model, tokenizer, turns, max_new_tokens=max_new_tokens, progress=step)
    chats = [turn for turn in turns if not isinstance(turn, str)]
    if chats:
        raise DataError("a classifier takes plain texts, not chats")
    texts = [str(turn) for turn in turns]
    found = classify(model, tokenizer, texts, progress=step)
    return [f"{label} ({probability:.1%})" for label, probability in found]


def _reading(targets: Mapping[str, Target]) -> DataConfig:
    """How the adapters' runs read their rows; the defaults where none comes from a run.

    Raises:
        AdapterError: two runs read them differently, so that one row would mean two things.
    """
    runs = {name: data_settings(target) for name, target in targets.items()}
    known = {name: settings for name, settings in runs.items() if settings is not None}
    if not known:
        return DataConfig(path="-")
    (first, reading), *others = known.items()
    for name, settings in others:
        differ = [key for key in _READING if getattr(settings, key) != getattr(reading, key)]
        if differ:
            key = differ[0]
            raise AdapterError(
                f"the runs of `{first}` and `{name}` read their rows differently",
                details=[f"data.{key}: {getattr(reading, key)} and {getattr(settings, key)}"],
                hint="compare them in two calls, or name their adapter folders",
            )
    return reading


def rows_as_read(data: str | DataConfig, reading: DataConfig, limit: int | None) -> DataConfig:
    """Settings for the rows of a path that is read as `reading` reads its own."""
    if isinstance(data, DataConfig):
        return data.model_copy(update={"limit": limit or data.limit})
    fields = {key: getattr(reading, key) for key in _READING}
    if data == reading.path:
        fields |= {"name": reading.name, "split": reading.split}
    return DataConfig(path=data, limit=limit, eval=None, **fields)


def _turns(
    prompts: Sequence[Prompt], model: Any, tokenizer: Any, system: str | None
) -> list[Prompt]:
    chat = tokenizer.chat_template is not None and labels_of(model) is None
    instruction = [{"role": "system", "content": system}] if system is not None else []
    return [
        [*instruction, {"role": "user", "content": prompt}]
        if isinstance(prompt, str) and chat
        else prompt
        for prompt in prompts
    ]


def _shown(prompt: Prompt) -> str:
    """A prompt as a text: of a chat its last message."""
    if isinstance(prompt, str):
        return prompt
    return (prompt if isinstance(prompt, Chat) else Chat.of(prompt)).messages[-1].content


def _refuse_mixed(
    adapters: Mapping[str, Adapter], base: str | None, allow_other_base: bool
) -> None:
    first_name, first = next(iter(adapters.items()))
    for name, adapter in adapters.items():
        for same, what in (
            (_same_packing(adapter, first, allow_other_base), "on different quantizations"),
            (allow_other_base or _same_base(adapter, first, base), "on different bases"),
            (_same(adapter, first, LABELS), "for different labels"),
        ):
            if not same:
                raise AdapterError(
                    f"adapters `{first_name}` and `{name}` were trained {what}",
                    details=_packing(first, adapter) if "quant" in what else (),
                    hint="compare them in two calls",
                )


def _same(a: Adapter, b: Adapter, key: str) -> bool:
    return a.metadata.get(key) == b.metadata.get(key)


def _same_packing(a: Adapter, b: Adapter, allow_other_base: bool) -> bool:
    """By identity; where other bases are allowed, by recipe."""
    if not allow_other_base:
        return _same(a, b, QUANTIZER)
    recipes = [dict(metadata_json(adapter, QUANTIZER) or {}) for adapter in (a, b)]
    return recipes[0] | {"identity": None} == recipes[1] | {"identity": None}


def _packing(*adapters: Adapter) -> list[str]:
    """How the bases of the adapters were stored, as far as that differs."""
    recorded = [metadata_json(adapter, QUANTIZER) or {"format": "none"} for adapter in adapters]
    keys = [k for k in ("format", "block_size", "double") if len({r.get(k) for r in recorded}) > 1]
    if not keys:
        return ["their packed weights differ"]
    return [f"quant.{keys[0]}: " + " and ".join(str(facts.get(keys[0])) for facts in recorded)]


def _same_base(a: Adapter, b: Adapter, given: str | None) -> bool:
    """By fingerprint, whatever the folder is called; by name where one records none."""
    marks = [(metadata_json(adapter, BASE) or {}).get("fingerprint") for adapter in (a, b)]
    if all(marks):
        return marks[0] == marks[1]
    return given is not None or base_of(a) == base_of(b)
