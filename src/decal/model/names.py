"""The names in a model's files and in its module tree, from a skeleton without weights.

Hub files carry historic names, transformers renames, fuses and ties on loading; merging and
adapters must speak of the same weight by one name. Knows no adapters and no runs.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    rename_source_key,
)
from transformers.pytorch_utils import Conv1D

from decal.model import heads
from decal.model.hf import Quiet, load_config


def skeleton(
    path: str,
    *,
    revision: str | None = None,
    trust_remote_code: bool = False,
    labels: Sequence[str] | None = None,
) -> Any:
    """The model on the meta device: names and shapes, no weights read or allocated.

    With `labels` it is a classifier of these classes.

    Raises:
        BaseModelError: the path is no model.
    """
    config = load_config(path, revision=revision, trust_remote_code=trust_remote_code)
    config.quantization_config = None
    del config.quantization_config
    auto = AutoModelForCausalLM
    if labels is not None:
        auto = AutoModelForSequenceClassification
        heads.relabel(config, labels)
    with Quiet(), torch.device("meta"):
        model = auto.from_config(config, trust_remote_code=trust_remote_code)
    model.tie_weights()
    return model.eval()


def name_map(model: PreTrainedModel, file_keys: Iterable[str]) -> dict[str, str]:
    """File key -> name of the weight in the module tree, by transformers' own renamings.

    Files on the hub carry historic names (gpt2 without `transformer.`, gamma and beta in BERT).
    Keys that the model does not know map to themselves, and so do those of `fused_keys`: neither
    are names of the model's weights.
    """
    named, fused = _renamed(model, file_keys)
    return {key: key if key in fused else name for key, name in named.items()}


def fused_keys(model: PreTrainedModel, file_keys: Iterable[str]) -> dict[str, str]:
    """File key -> the parameter that transformers makes of it on loading, with others or changed.

    The experts of a mixture, say: `experts.3.gate_proj.weight` becomes a part of
    `experts.gate_up_proj`. No weight of the module tree is such a tensor as it lies in the file.
    """
    named, fused = _renamed(model, file_keys)
    return {key: named[key] for key in named if key in fused}


def _renamed(model: PreTrainedModel, keys: Iterable[str]) -> tuple[dict[str, str], set[str]]:
    transforms = get_model_conversion_mapping(model)
    renamings = [t for t in transforms if isinstance(t, WeightRenaming)]
    converters = [t for t in transforms if isinstance(t, WeightConverter)]
    known = model.state_dict()
    names: dict[str, str] = {}
    fused: set[str] = set()
    for key in keys:
        name, pattern = rename_source_key(
            key, renamings, converters, model.base_model_prefix, known
        )
        if name not in known and key in known:
            name, pattern = key, None
        if pattern is not None:
            fused.add(key)
        names[key] = name
    return names, fused


def transposed_modules(model: nn.Module) -> set[str]:
    """Names of the layers whose files hold [in, out] (GPT-2's Conv1D)."""
    return {name for name, module in model.named_modules() if isinstance(module, Conv1D)}
