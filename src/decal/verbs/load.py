"""`load_base`, `load` and `save_adapter`: models in, adapters out, with what belongs together."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from decal.config import QuantConfig
from decal.errors import AdapterError, BaseModelError, QuantError
from decal.model import heads, hf
from decal.model.adapter import Adapter
from decal.model.inject import attach
from decal.model.saving import refuse_lost
from decal.model.state import known, require
from decal.quant import quant_format
from decal.quant.base import Recipe
from decal.verbs.provenance import history, runs_of
from decal.verbs.same_base import (
    check_model,
    fingerprint_of,
    hashing,
    quantizer_facts,
    remember_files,
)
from decal.verbs.target import (
    BASE,
    CHAT_TEMPLATE,
    LABELS,
    QUANTIZER,
    RUN,
    base_of,
    metadata_json,
    read,
    resolve,
)
from decal.version import __version__

Quant = Literal["none", "nf4", "fp4", "int8"] | QuantConfig | None


def as_recipe(quant: Quant) -> Recipe | None:
    """Settings of `quant:` as a recipe; None for 16-bit weights. Raises QuantError."""
    if quant is None or quant == "none":
        return None
    if isinstance(quant, str):
        quant_format(quant)
        return Recipe(format=quant)
    if quant.format == "none":
        return None
    return Recipe(format=quant.format, block_size=quant.block_size, double=quant.double)


def as_dtype(dtype: str | torch.dtype) -> torch.dtype:
    """`bfloat16` and the like as torch's dtype; raises BaseModelError for anything else."""
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype not in hf.DTYPES:
        raise BaseModelError(f"dtype `{dtype}` is unknown", hint=f"use {', '.join(hf.DTYPES)}")
    return hf.DTYPES[dtype]


def load_base(
    path: str | Path,
    *,
    quant: Quant = "none",
    dtype: str | torch.dtype = "bfloat16",
    device: str = "auto",
    revision: str | None = None,
    trust_remote_code: bool = False,
    labels: Sequence[str] | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Loads a base model and its tokenizer, quantized while loading if asked for.

    Args:
        path: hub id or folder.
        quant: `none`, the name of a format, or a QuantConfig. A base that bitsandbytes stored
            quantized is loaded as it is stored.
        dtype: what the model computes in.
        device: `auto`, or a torch device name.
        labels: load a classifier of these classes instead of a language model.
        tokenizer: the base's, if it is loaded already.

    Raises:
        BaseModelError: no such model, or files that do not fill it.
        QuantError: weights or settings that the format cannot hold.
    """
    model = hf.load_model(
        str(path),
        revision=revision,
        trust_remote_code=trust_remote_code,
        dtype=as_dtype(dtype),
        device=device,
        recipe=as_recipe(quant),
        skip=quant.skip_modules if isinstance(quant, QuantConfig) else (),
        labels=labels,
    )
    if tokenizer is None:
        loaded: hf.BaseInfo = model.decal_base
        tokenizer = hf.load_tokenizer(
            str(path), revision=loaded.commit or revision, trust_remote_code=trust_remote_code
        )
    if labels is not None:
        heads.set_padding(model, tokenizer)
    remember_files(model)
    model.decal_describe = adapter_of  # the model's own save_pretrained records what we know
    model.decal_check = check_model  # and attach refuses adapters of other bases
    return model, tokenizer


def load(
    target: str | Path,
    *,
    adapter: str | Path | None = None,
    base: str | None = None,
    device: str = "auto",
    trust_remote_code: bool = False,
    allow_other_base: bool = False,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Loads whatever `target` is: a run, an adapter with its base, or a model.

    An adapter of decal's is loaded onto its base as it was quantized in training, and that base's
    packed weights must be the very ones of the training.

    Args:
        target: run folder, adapter folder, model folder, or hub id (`owner/name[@revision]`).
        adapter: an adapter to put on `target`, if that is a base.
        base: the base of an adapter, if not the one it names.
        allow_other_base: warn where the base is not the one of the training, instead of refusing;
            tensors must fit all the same.

    Raises:
        AdapterError: unreadable, no base known, or it does not fit.
        BaseModelError: the base cannot be loaded.
    """
    found = resolve(target)
    if found.kind == "adapter" and adapter is None:
        found_adapter = read(target)[1]
        return load_adapter(
            found_adapter,
            base,
            device,
            trust_remote_code=trust_remote_code,
            allow_other_base=allow_other_base,
        )
    if adapter is not None:
        if found.kind == "adapter":
            raise AdapterError(
                f"`{target}` is an adapter; a second one cannot be put on it",
                hint="name the base model first, then the adapter",
            )
        _, read_in = read(adapter)
        named = f"{found.path}@{found.revision}" if found.revision else found.path
        return load_adapter(
            read_in,
            named,
            device,
            trust_remote_code=trust_remote_code,
            allow_other_base=allow_other_base,
        )
    config = hf.load_config(
        found.path, revision=found.revision, trust_remote_code=trust_remote_code
    )
    return load_base(
        found.path,
        revision=found.revision,
        device=device,
        trust_remote_code=trust_remote_code,
        labels=heads.stored_labels(config),
    )


def load_adapter(
    adapter: Adapter,
    base: str | None,
    device: str,
    *,
    trust_remote_code: bool = False,
    allow_other_base: bool = False,
    name: str = "default",
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Loads the adapter's base as it was in training, and attaches the adapter to it.

    It is in use and could be trained on; the model is in evaluation mode.
    """
    path, revision = base_of(adapter, base)
    recorded = metadata_json(adapter, QUANTIZER)
    trained_in = (metadata_json(adapter, BASE) or {}).get("dtype", "bfloat16")
    with hashing(path) as keep_fingerprint:
        model, tokenizer = load_base(
            path,
            quant=recorded_quant(recorded),
            dtype=trained_in,
            device=device,
            revision=revision,
            trust_remote_code=trust_remote_code,
            labels=labels_of(adapter),
        )
        keep_fingerprint(model)
    template = adapter.metadata.get(CHAT_TEMPLATE)
    if template is not None and tokenizer.chat_template is None:
        tokenizer.chat_template = template
    attach(model, adapter, name, allow_other_base=allow_other_base)
    model.eval()
    return model, tokenizer


def labels_of(adapter: Adapter) -> tuple[str, ...] | None:
    """The class names of a classification adapter; None for a language model's.

    An adapter of another tool records none, and its head says how many there are.

    Raises:
        AdapterError: a classification adapter without a head.
    """
    recorded = metadata_json(adapter, LABELS)
    if recorded is not None:
        return tuple(recorded)
    if adapter.task_type != "SEQ_CLS":
        return None
    rows = [tensor.shape[0] for name, tensor in adapter.full.items() if tensor.ndim == 2]
    if not rows:
        raise AdapterError(
            f"adapter `{adapter.source}` classifies, but holds no head",
            hint="train it again with its head in modules_to_save",
        )
    return tuple(f"LABEL_{i}" for i in range(min(rows)))  # hidden layers of a head are wider


def recorded_quant(recorded: dict[str, Any] | None) -> QuantConfig:
    """The `quant:` settings that an adapter's metadata records; `none` where there are none."""
    if recorded is None:
        return QuantConfig(format="none")
    try:
        fields = {k: recorded[k] for k in ("format", "block_size", "double")}
        fields["skip_modules"] = recorded.get("skip_modules", ())
        return QuantConfig(**fields)
    except (KeyError, ValueError) as error:
        raise QuantError(
            "the adapter was trained on a quantized base of a kind this decal does not know",
            details=[json.dumps(recorded)],
        ) from error


def save_adapter(
    model: PreTrainedModel,
    path: str | Path,
    name: str = "default",
    *,
    force: bool = False,
    run: Mapping[str, Any] | None = None,
) -> Adapter:
    """Writes one attached adapter as a PEFT folder, with the facts that `load` and `merge` need.

    Args:
        path: the folder.
        name: which adapter.
        force: replace a folder that is there.
        run: the training that has just ended, as `run_facts` says it.

    Raises:
        AdapterError: the model has no such adapter, or trains what belongs to none.
        OutputError: the folder is there and not empty, and `force` is not set.
        VerificationError: what was read again is not what was written.
    """
    known(require(model), name)
    refuse_lost(model, name)
    adapter = adapter_of(model, name, run)
    adapter.save_pretrained(path, force=force)
    return adapter


def adapter_of(
    model: PreTrainedModel, name: str = "default", run: Mapping[str, Any] | None = None
) -> Adapter:
    """The attached adapter as an object, with base, fingerprint, quantizer and past recorded."""
    adapter = Adapter.from_model(model, name, **_facts(model))
    came_with = require(model).metadata.get(name, {})
    metadata = dict(adapter.metadata)
    if CHAT_TEMPLATE in came_with:
        metadata.setdefault(CHAT_TEMPLATE, came_with[CHAT_TEMPLATE])
    past = history(runs_of(came_with), adapter, run)
    if past is not None:
        metadata[RUN] = past
    return replace(adapter, metadata=metadata)


def _facts(model: PreTrainedModel) -> dict[str, Any]:
    """What the loaded base adds to an adapter: where it lies, which one it is, how it is packed."""
    info: hf.BaseInfo | None = getattr(model, "decal_base", None)
    metadata = {"decal.version": __version__}
    facts: dict[str, Any] = {"metadata": metadata}
    if labels := heads.labels_of(model):
        metadata[LABELS] = json.dumps(labels)
        facts["task_type"] = "SEQ_CLS"
    if info is None:
        return facts
    if info.chat_template is not None:
        metadata[CHAT_TEMPLATE] = info.chat_template
    base = {
        "path": info.path,
        "revision": info.revision,
        "commit": info.commit,
        "dtype": str(info.dtype).removeprefix("torch."),
        "fingerprint": fingerprint_of(model),
    }
    metadata[BASE] = json.dumps(base, sort_keys=True)
    quantizer = quantizer_facts(model)
    if quantizer is not None:
        metadata[QUANTIZER] = json.dumps(quantizer, sort_keys=True)
    return {**facts, "base": info.path, "revision": info.revision}
