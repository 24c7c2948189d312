"""The names in a model's files and in its module tree, from a skeleton without weights.

Hub files carry historic names, transformers renames, fuses and ties on loading; merging,
fingerprints and adapters must speak of the same weight by one name. Knows no adapters and no runs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    rename_source_key,
)
from transformers.pytorch_utils import Conv1D

from decal.errors import BaseModelError
from decal.model.hf import Quiet, load_config


def skeleton(path: str, *, revision: str | None = None, trust_remote_code: bool = False) -> Any:
    """The model on the meta device: names and shapes, no weights read or allocated."""
    config = load_config(path, revision=revision, trust_remote_code=trust_remote_code)
    config.quantization_config = None
    del config.quantization_config
    with Quiet(), torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    model.tie_weights()
    return model.eval()


def name_map(model: PreTrainedModel, file_keys: list[str]) -> dict[str, str]:
    """File key -> name of the weight in the module tree, by transformers' own renamings.

    Files on the hub carry historic names (gpt2 without `transformer.`, gamma and beta in BERT).
    Keys that the model does not know map to themselves and are not weights of the model.

    Raises:
        BaseModelError: tensors that transformers fuses or splits on loading (experts); merging
            into such files is not supported.
    """
    transforms = get_model_conversion_mapping(model)
    renamings = [t for t in transforms if isinstance(t, WeightRenaming)]
    converters = [t for t in transforms if isinstance(t, WeightConverter)]
    known = model.state_dict()
    names: dict[str, str] = {}
    fused: list[str] = []
    for key in file_keys:
        name, pattern = rename_source_key(
            key, renamings, converters, model.base_model_prefix, known
        )
        if name not in known and key in known:
            name, pattern = key, None
        if pattern is not None:
            fused.append(key)
        names[key] = name
    if fused:
        raise BaseModelError(
            f"{len(fused)} of {len(file_keys)} tensors are fused or split when they are loaded",
            details=[f"first: {fused[0]}"],
            hint="mixture-of-experts files cannot be merged into yet",
        )
    return names


def transposed_modules(model: nn.Module) -> set[str]:
    """Names of the layers whose files hold [in, out] (GPT-2's Conv1D)."""
    return {name for name, module in model.named_modules() if isinstance(module, Conv1D)}
