"""Classification heads: a base that was trained for something else, with a new head on it.

transformers fills what the files lack with random numbers, and says so in its log. Here a lack is
an error everywhere but in the head of a classifier, and the head's start follows from the run's
seed and the parameters' names alone: normal with the architecture's own deviation, biases zero.

What the files hold for another task's head (`lm_head.weight`, BERT's `cls.*`) is left out; it lies
beside the model proper, whose prefix tells. Knows no adapters and no runs.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from decal.adapters.init import module_generator
from decal.data.batch import Batch
from decal.errors import BaseModelError

_CLASSIFIER = "ForSequenceClassification"


def relabel(config: Any, labels: Sequence[str]) -> bool:
    """Makes a model's config that of a classifier of `labels`; True if it was one already.

    Raises:
        BaseModelError: fewer than two labels, or one twice.
    """
    if len(labels) < 2 or len(set(labels)) < len(labels):
        raise BaseModelError(f"{len(set(labels))} different labels cannot be told apart")
    before = getattr(config, "id2label", None) or {}
    same = tuple(before.get(i) for i in range(len(before))) == tuple(labels)
    config.id2label = dict(enumerate(labels))
    config.label2id = {label: i for i, label in enumerate(labels)}
    config.problem_type = "single_label_classification"
    return same


def labels_of(model: Any) -> tuple[str, ...] | None:
    """The class names of a classifier in the order of its logits; None for other models."""
    return _names(model.config) if type(model).__name__.endswith(_CLASSIFIER) else None


def stored_labels(config: Any) -> tuple[str, ...] | None:
    """The class names in the config of a stored classifier; None for other models."""
    architectures = getattr(config, "architectures", None) or [""]
    return _names(config) if architectures[0].endswith(_CLASSIFIER) else None


def _names(config: Any) -> tuple[str, ...]:
    return tuple(str(config.id2label[i]) for i in range(config.num_labels))


def set_padding(model: Any, tokenizer: Any) -> None:
    """Gives a classifier a padding token: causal ones read the last token that is not padding."""
    config = model.config.get_text_config()
    if config.pad_token_id is None:
        pad = tokenizer.pad_token_id
        config.pad_token_id = tokenizer.eos_token_id if pad is None else pad


def in_head(model: Any, name: str) -> bool:
    """Whether a classifier's module or parameter is part of its head, BERT's pooler included."""
    prefix = f"{model.base_model_prefix}."
    return labels_of(model) is not None and (not name.startswith(prefix) or _pooled(name))


def new_modules(names: Collection[str], prefix: str) -> tuple[str, ...]:
    """Names of the modules that hold the parameters `names`, as modules_to_save wants them.

    Of a head beside the model proper (whose prefix is given) the whole (`classifier.dense.bias` ->
    `classifier`), of the model proper the layer alone (`bert.pooler.dense`).
    """
    inside = f"{prefix}."
    modules = (
        name.rpartition(".")[0] if name.startswith(inside) else name.partition(".")[0]
        for name in names
    )
    return tuple(dict.fromkeys(modules))


def start(model: PreTrainedModel, names: Collection[str], seed: int) -> None:
    """Gives the parameters `names`, which no file filled, their starting values."""
    deviation = float(getattr(model.config, "initializer_range", 0.02))
    with torch.no_grad():
        for name in sorted(names):
            parameter = model.get_parameter(name)
            values = torch.zeros(parameter.shape)
            if parameter.dim() > 1:
                values.normal_(0.0, deviation, generator=module_generator(seed, name))
            parameter.copy_(values)


def settle(model: PreTrainedModel, report: dict[str, Any], same_labels: bool) -> tuple[str, ...]:
    """Takes out of transformers' loading report what a new head explains; returns its parameters.

    `same_labels` says that the files' own head was made for these very labels; any other head is
    started anew, and so is what the files lack. Leaves in the report what no head explains.
    """
    inside = f"{model.base_model_prefix}."
    new = {key for key in report["missing_keys"] if in_head(model, key)}
    new |= {key for key, *_ in report["mismatched_keys"] if in_head(model, key)}
    if not same_labels:
        new |= {name for name, _ in model.named_parameters() if not name.startswith(inside)}
    report["missing_keys"] = set(report["missing_keys"]) - new
    report["mismatched_keys"] = {m for m in report["mismatched_keys"] if m[0] not in new}
    left = report["unexpected_keys"]
    report["unexpected_keys"] = {k for k in left if k.startswith(inside) and not _pooled(k)}
    start(model, new, seed=0)
    return tuple(name for name, _ in model.named_parameters() if name in new)


def _pooled(key: str) -> bool:
    """BERT's pooler belongs to the head: files of masked language models lack it."""
    return ".pooler." in f".{key}."


def forward(model: Any, batch: Batch) -> Tensor:
    """Logits [n, classes] of a padded batch, with the padding token that pooling looks for."""
    pad = model.config.get_text_config().pad_token_id
    ids = batch.input_ids
    if batch.attention is not None and pad is not None:
        ids = ids.masked_fill(batch.attention == 0, pad)
    logits: Tensor = model(input_ids=ids, attention_mask=batch.attention).logits
    return logits
