"""`decal compare`: the base and its adapters on the same prompts or the same rows."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from decal.config import DataConfig
from decal.data.batch import Batch
from decal.data.chat import Encoder
from decal.data.example import Example
from decal.data.pack import LayoutName, make_batches
from decal.data.source import read_rows
from decal.errors import AdapterError, DecalError
from decal.model import attention
from decal.model.adapter import Adapter
from decal.model.inject import attach, disabled, use
from decal.objectives import sft
from decal.verbs.load import load_adapter
from decal.verbs.target import BASE, QUANTIZER, base_of, metadata_json, read
from decal.verbs.text import Prompt, complete, exact_match

BASE_NAME = "base"
_BATCH_TOKENS = 4096


def compare(
    base: str | None,
    adapters: Mapping[str, str],
    *,
    prompts: Sequence[str] | None = None,
    data: str | None = None,
    limit: int | None = None,
    max_new_tokens: int = 64,
) -> dict[str, Any]:
    """Runs base and adapters, one base in memory, all adapters on it.

    Args:
        base: the base, if not the one that the adapters name.
        adapters: name -> run or adapter folder; all trained on one base, quantized alike.
        prompts: texts to complete (as a user turn where the tokenizer has a chat template).
        data: rows with known answers: loss, perplexity and exact match are measured.
        limit: use only the first so many rows.

    Returns:
        {"base": path, "results": {name: {...}}} with, per name, `outputs` for prompts, and `loss`,
        `perplexity`, `accuracy` (exact match of the last turn, greedy), `rows` for data.

    Raises:
        DecalError: neither prompts nor data, or the name `base` for an adapter.
        AdapterError: adapters of different bases or quantizations.
    """
    if not prompts and not data:
        raise DecalError("nothing to compare on", hint="give --prompt TEXT or --data FILE")
    if not adapters:
        raise DecalError("no adapter to compare", hint="decal compare NAME=ADAPTER … --data FILE")
    if BASE_NAME in adapters:
        raise DecalError(f"`{BASE_NAME}` is what the base is called; name the adapter differently")
    loaded = {name: read(path)[1] for name, path in adapters.items()}
    _refuse_mixed(loaded, base)
    first = next(iter(loaded))
    model, tokenizer = load_adapter(loaded[first], base, "auto", name=first)
    for name, adapter in loaded.items():
        if name != first:
            attach(model, adapter, name)

    results: dict[str, Any] = {}
    rows = read_rows(DataConfig(path=data, limit=limit)).examples if data else []
    batches = _encoded(model, tokenizer, rows) if rows else []
    for name in (BASE_NAME, *loaded):
        active: AbstractContextManager[Any]
        active = disabled(model) if name == BASE_NAME else use(model, name)
        with active:
            found: dict[str, Any] = {}
            if prompts:
                chat = tokenizer.chat_template is not None
                asked = [_as_prompt(p, chat) for p in prompts]
                found["outputs"] = complete(model, tokenizer, asked, max_new_tokens=max_new_tokens)
            if rows:
                found |= measure(model, tokenizer, rows, batches, max_new_tokens)
            results[name] = found
    path, _ = base_of(loaded[first], base)
    shown = {"prompts": list(prompts)} if prompts else {}
    return {"base": path, **shown, "results": results}


def measure(
    model: Any,
    tokenizer: Any,
    rows: Sequence[Example],
    batches: Sequence[Batch],
    max_new_tokens: int = 64,
) -> dict[str, Any]:
    """Loss per trained token, perplexity, and exact match of the last answer, on rows.

    `batches` are the encoded rows, made once for all adapters.
    """
    total, tokens = 0.0, 0
    was_training = model.training
    model.eval()
    with torch.no_grad():
        for batch in batches:
            total += _loss(model, batch.to(model.device))
            tokens += batch.trained
    model.train(was_training)
    answers = complete(
        model, tokenizer, [question(row)[0] for row in rows], max_new_tokens=max_new_tokens
    )
    loss = total / tokens
    return {
        "rows": len(rows),
        "loss": loss,
        "perplexity": math.exp(min(loss, 700.0)),
        "accuracy": exact_match(answers, [question(row)[1] for row in rows]),
    }


def question(row: Example) -> tuple[Prompt, str]:
    """What a row asks, and the answer it expects: its last turn, or its completion."""
    if row.messages is None:
        return row.prompt or "", row.completion or ""
    turns = [{"role": m.role, "content": m.content} for m in row.messages]
    last = max(i for i, turn in enumerate(turns) if turn["role"] == "assistant")
    return turns[:last], turns[last]["content"]


def _encoded(model: Any, tokenizer: Any, rows: Sequence[Example]) -> list[Batch]:
    samples = Encoder(tokenizer, DataConfig(path="data", max_length=1 << 20)).encode_all(rows)
    layout: LayoutName = "flat" if attention.flattens(model) else "padded"
    return make_batches(samples, _BATCH_TOKENS, layout=layout)


def _loss(model: Any, batch: Batch) -> float:
    keep = sft.trained_positions(batch)
    with attention.flat_attention(model) if batch.layout == "flat" else nullcontext():
        logits = attention.forward(model, batch, keep)
    return float(sft.loss(logits, batch.targets.flatten()[keep]))


def _as_prompt(text: str, chat: bool) -> Prompt:
    return [{"role": "user", "content": text}] if chat else text


def _refuse_mixed(adapters: Mapping[str, Adapter], base: str | None) -> None:
    first_name, first = next(iter(adapters.items()))
    for name, adapter in adapters.items():
        same_quantizer = adapter.metadata.get(QUANTIZER) == first.metadata.get(QUANTIZER)
        for same, what in (
            (same_quantizer, "quantization"),
            (_same_base(adapter, first, base), "base"),
        ):
            if not same:
                raise AdapterError(
                    f"adapters `{first_name}` and `{name}` were trained on a different {what}",
                    hint="compare them in two calls",
                )


def _same_base(a: Adapter, b: Adapter, given: str | None) -> bool:
    """By fingerprint, whatever the folder is called; by name where one records none."""
    marks = [(metadata_json(adapter, BASE) or {}).get("fingerprint") for adapter in (a, b)]
    if all(marks):
        return marks[0] == marks[1]
    return given is not None or base_of(a) == base_of(b)
