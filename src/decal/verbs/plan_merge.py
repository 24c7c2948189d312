"""An adapter and its base as the changes that `merge_files` writes.

The adapter speaks of modules and parameters, the files of keys; the name map between them is
transformers' own. Here it is also decided what cannot be written: a delta on a tensor that
transformers makes of several, a bias where the file has none, a head for a language model.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from decal.adapters.base import LowRank
from decal.errors import AdapterError, BaseModelError, DecalError, DecalWarning, first_of
from decal.model import heads, hf, names
from decal.model.adapter import Adapter
from decal.store.base import BaseFiles, open_base
from decal.store.files import read_json
from decal.verbs.target import CHAT_TEMPLATE
from decal.weights.changes import Changes
from decal.weights.delta import FileDelta

_TEMPLATE = "chat_template.jinja"


@dataclass(frozen=True, kw_only=True)
class Merging:
    """One adapter, and the base's names without its weights."""

    adapter: Adapter
    path: str
    """Hub id or folder of the base."""
    revision: str | None
    trust_remote_code: bool
    allow_other_base: bool
    """Whether a base that is not the one of the training is only warned of."""
    files: BaseFiles
    skeleton: Any
    labels: Sequence[str] | None
    """Class names, where the adapter makes a classifier of the base."""
    keys: Mapping[str, str]
    """Parameter of the model -> file key."""
    fused: Mapping[str, str]
    """File key -> parameter that transformers makes of it and others."""

    def key(self, parameter: str) -> str:
        """The file key of a parameter; a tied one that no file holds keeps its name."""
        return self.keys.get(parameter, parameter)


def merging(
    adapter: Adapter,
    path: str,
    revision: str | None,
    *,
    labels: Sequence[str] | None = None,
    trust_remote_code: bool = False,
    allow_other_base: bool = False,
) -> Merging:
    """Opens the base and collects the names that a merge needs; reads no weight."""
    files = open_base(hf.local_folder(path, revision))
    skeleton = names.skeleton(
        path, revision=revision, trust_remote_code=trust_remote_code, labels=labels
    )
    stored = sorted(files.tensors)
    fused = names.fused_keys(skeleton, stored)
    keys = {name: key for key, name in names.name_map(skeleton, stored).items()}
    return Merging(
        adapter=adapter,
        path=path,
        revision=revision,
        trust_remote_code=trust_remote_code,
        allow_other_base=allow_other_base,
        files=files,
        skeleton=skeleton,
        labels=labels,
        keys=keys,
        fused=fused,
    )


def changes_of(plan: Merging) -> Changes:
    """What the adapter changes, apart from what quantization does to the base.

    Raises:
        AdapterError: it changes what the files do not hold as one tensor, or a base that is not the
            one it was trained on.
    """
    adapter = plan.adapter
    _refuse_fused(plan)
    _check_copies(plan)
    whole = _whole(plan)
    known = plan.files.tensors.keys() | _tied(plan).keys()
    added = {key: tensor for key, tensor in whole.items() if key not in known}
    replaced = {key: tensor for key, tensor in whole.items() if key in known}
    _check_added(plan, added)
    return Changes(
        deltas=_deltas(plan),
        replaced=replaced,
        added=added,
        dropped=_other_heads(plan),
        tied=_tied(plan),
        config=_classifier(plan) if plan.labels is not None else {},
        texts=_texts(plan),
        name=adapter.source,
        trained_on=adapter.base,
    )


def _deltas(plan: Merging) -> dict[str, FileDelta]:
    adapter = plan.adapter
    transposed = names.transposed_modules(plan.skeleton) | adapter.embeddings
    owners: dict[str, list[str]] = {}
    for module in adapter.tensors:
        owners.setdefault(plan.key(f"{module}.weight"), []).append(module)
    shared = {key: modules for key, modules in owners.items() if modules[1:]}
    if shared:
        key, modules = next(iter(shared.items()))
        raise AdapterError(
            f"adapter `{adapter.source}` has {len(adapter.tensors)} A/B pairs for {len(owners)} "
            f"tensors of the base",
            details=[f"{', '.join(modules)} are all `{key}`"],
            hint="keep the adapter apart: `decal generate` and the others load it with its base",
        )
    return {
        plan.key(f"{module}.weight"): FileDelta(
            LowRank(parts.A, parts.B, adapter.config.scaling_of(module), 0.0),
            module in transposed,
            module,
        )
        for module, parts in adapter.tensors.items()
    }


def _whole(plan: Merging) -> dict[str, Tensor]:
    """File key -> tensor: what was trained whole, and biases that gain B's."""
    adapter = plan.adapter
    whole = {plan.key(name): tensor.float() for name, tensor in adapter.full.items()}
    without = []
    for module, parts in adapter.tensors.items():
        if parts.bias is None:
            continue
        key = plan.key(f"{module}.bias")
        if key not in plan.files.tensors:
            without.append(module)
            continue
        before = whole[key] if key in whole else plan.files.read(key).float()
        whole[key] = before + adapter.config.scaling_of(module) * parts.bias.float()
    if without:
        raise AdapterError(
            f"adapter `{adapter.source}` has a bias of B (lora_bias) on {len(without)} of "
            f"{len(adapter.tensors)} modules whose layers have no bias to add it to",
            details=[first_of(without)],
            hint="keep the adapter apart: `decal generate` and the others load it with its base",
        )
    return whole


def _tied(plan: Merging) -> dict[str, str]:
    """File key of a tied tensor -> file key of the tensor it shares, where the file has one."""
    tied = getattr(plan.skeleton, "all_tied_weights_keys", None) or {}
    return {plan.key(k): plan.keys[source] for k, source in tied.items() if source in plan.keys}


def _refuse_fused(plan: Merging) -> None:
    made = set(plan.fused.values())
    modules = [m for m in plan.adapter.tensors if f"{m}.weight" in made or m in made]
    wanted = [*modules, *(name for name in plan.adapter.full if name in made)]
    if wanted:
        raise AdapterError(
            f"adapter `{plan.adapter.source}` changes {len(wanted)} tensors that the base's files "
            "hold in parts, as experts",
            details=[first_of(wanted)],
            hint="merge in memory: `decal.load`, `decal.merge_in_place`, `model.save_pretrained`",
        )


def _check_copies(plan: Merging) -> None:
    """Base weights that peft stored with the adapter must be those of this base."""
    tied, problems, values = _tied(plan), [], []
    for name, copy in plan.adapter.base_copies.items():
        key = plan.key(name)
        entry = plan.files.tensors.get(tied.get(key, key))
        if entry is None:
            problems.append(f"{name}: the base has no such tensor")
        elif entry.spec.shape != tuple(copy.shape):
            shapes = f"{list(copy.shape)} with the adapter, {list(entry.spec.shape)} in the base"
            problems.append(f"{name}: {shapes}; the vocabulary was resized")
        elif not _same_rounded(copy, plan.files.read(entry.key)):
            values.append(f"{name}: the embedding or head was trained too, or is another base's")
    if values and plan.allow_other_base:
        text = f"adapter `{plan.adapter.source}` holds {len(values)} base weights that differ"
        warnings.warn(f"{text}, first {values[0]}", DecalWarning, stacklevel=4)
    else:
        problems += values
    if problems:
        raise AdapterError(
            f"adapter `{plan.adapter.source}` does not fit base `{plan.files.folder}`: "
            f"{len(problems)} of {len(plan.adapter.base_copies)} base weights stored in it differ",
            details=[first_of(problems)],
            hint="merge onto the base the adapter was trained on",
        )


def _same_rounded(copy: Tensor, stored: Tensor) -> bool:
    """Whether a copy holds the stored values, perhaps as they were rounded on loading."""
    return any(
        torch.equal(copy.to(dtype).float(), stored.to(dtype).float())
        for dtype in (stored.dtype, torch.bfloat16, torch.float16)
    )


def _check_added(plan: Merging, added: Iterable[str]) -> None:
    adapter, added = plan.adapter, list(added)
    if added and plan.labels is None:
        raise AdapterError(
            f"adapter `{adapter.source}` does not fit base `{plan.files.folder}`: {len(added)} of "
            f"{len(adapter.full)} tensors that it trained whole are not in the base",
            details=added[:1],
        )
    if plan.labels is None:
        return
    tied = getattr(plan.skeleton, "all_tied_weights_keys", None) or {}
    wanted = [n for n, _ in plan.skeleton.named_parameters() if n not in tied]
    made = plan.keys.keys() | set(plan.fused.values()) | adapter.full.keys()
    lacking = [name for name in wanted if name not in made]
    if lacking:
        raise AdapterError(
            f"{len(lacking)} of {len(wanted)} parameters of the classifier are neither in base "
            f"`{plan.files.folder}` nor in adapter `{adapter.source}`",
            details=lacking[:1],
            hint="train it again with the whole head in modules_to_save",
        )


def _other_heads(plan: Merging) -> frozenset[str]:
    """Keys of another task's head, which a classifier does not have."""
    if plan.labels is None:
        return frozenset()
    parameters = plan.skeleton.state_dict().keys()
    inside = f"{plan.skeleton.base_model_prefix}."
    return frozenset(
        key
        for name, key in plan.keys.items()
        if name not in parameters and key not in plan.fused and not name.startswith(inside)
    )


def _classifier(plan: Merging) -> dict[str, Any]:
    """What config.json says of a classifier."""
    labels = list(plan.labels or ())
    try:
        tokenizer = hf.load_tokenizer(
            plan.path, revision=plan.revision, trust_remote_code=plan.trust_remote_code
        )
        heads.set_padding(plan.skeleton, tokenizer)
    except DecalError:
        pass  # a base without a tokenizer: padding stays as its config has it
    pad = plan.skeleton.config.get_text_config().pad_token_id
    return {
        "architectures": [type(plan.skeleton).__name__],
        "id2label": {str(i): label for i, label in enumerate(labels)},
        "label2id": {label: i for i, label in enumerate(labels)},
        "problem_type": "single_label_classification",
        **({} if pad is None else {"pad_token_id": pad}),
    }


def _texts(plan: Merging) -> dict[str, str]:
    """The chat template that training used, where the base has none of its own."""
    template, folder = plan.adapter.metadata.get(CHAT_TEMPLATE), plan.files.folder
    settings = folder / "tokenizer_config.json"
    if template is None or (folder / _TEMPLATE).exists():
        return {}
    if settings.exists() and read_json(settings, BaseModelError).get("chat_template"):
        return {}
    return {_TEMPLATE: template}
