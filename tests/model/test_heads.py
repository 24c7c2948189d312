"""Classification heads: what the files lack is started, seeded, named; nothing else may lack."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    BertConfig,
    BertForMaskedLM,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    RobertaConfig,
    RobertaForMaskedLM,
)

from decal.errors import BaseModelError
from decal.model import heads, hf
from decal.quant.base import Recipe
from decal.quant.linear import QuantLinear

LABELS = ("cold", "mild", "hot")
SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "vocab_size": 99,
}


def saved(model: Any, folder: Path) -> str:
    model.save_pretrained(folder)
    return str(folder)


def load(path: str, **options: Any) -> Any:
    return hf.load_model(path, dtype=torch.float32, device="cpu", **options)


@pytest.mark.parametrize("quantized", [False, True])
@pytest.mark.parametrize(
    ("build", "new", "modules"),
    [
        (lambda: LlamaForCausalLM(LlamaConfig(**SIZES)), 1, ("score",)),
        (lambda: BertForMaskedLM(BertConfig(**SIZES)), 4, ("bert.pooler.dense", "classifier")),
        (lambda: RobertaForMaskedLM(RobertaConfig(**SIZES)), 4, ("classifier",)),
    ],
    ids=["llama", "bert", "roberta"],
)
def test_a_language_model_becomes_a_classifier(
    tmp_path: Path, build: Any, new: int, modules: tuple[str, ...], quantized: bool
) -> None:
    """Fails when the pooler is forgotten, the head is quantized, or labels are not set."""
    recipe = Recipe(format="nf4") if quantized else None
    model = load(saved(build(), tmp_path / "m"), labels=LABELS, recipe=recipe)
    assert heads.labels_of(model) == LABELS
    assert len(model.decal_base.new) == new
    assert heads.new_modules(model.decal_base.new, model.base_model_prefix) == modules
    packed = [n for n, m in model.named_modules() if isinstance(m, QuantLinear)]
    assert bool(packed) == quantized
    assert not [n for n in packed if heads.in_head(model, n)]


def test_the_start_of_a_head_follows_from_the_seed(tmp_path: Path) -> None:
    """Fails when the start depends on torch's generator, or biases are not zero."""
    path = saved(BertForMaskedLM(BertConfig(**SIZES)), tmp_path / "m")
    torch.manual_seed(1)
    first = load(path, labels=LABELS)
    torch.manual_seed(2)
    second = load(path, labels=LABELS)
    assert torch.equal(first.classifier.weight, second.classifier.weight)
    assert not first.classifier.bias.any()
    assert 0.01 < float(first.classifier.weight.detach().std()) < 0.03
    heads.start(second, second.decal_base.new, seed=5)
    assert not torch.equal(first.classifier.weight, second.classifier.weight)


def test_a_head_for_the_same_labels_is_kept_and_another_is_not(tmp_path: Path) -> None:
    """Fails when the head of a fine-tuned classifier is thrown away, or kept for other labels."""
    config = LlamaConfig(**SIZES, id2label=dict(enumerate(LABELS)))
    path = saved(LlamaForSequenceClassification(config), tmp_path / "m")
    stored = LlamaForSequenceClassification.from_pretrained(path).score.weight
    same = load(path, labels=LABELS)
    assert same.decal_base.new == ()
    assert torch.equal(same.score.weight, stored)
    assert load(path, labels=("a", "b", "c")).decal_base.new == ("score.weight",)
    assert load(path, labels=("a", "b")).decal_base.new == ("score.weight",)


def test_what_no_head_explains_is_still_an_error(tmp_path: Path) -> None:
    """Fails when missing layers of the model proper pass as a new head."""
    path = saved(LlamaForCausalLM(LlamaConfig(**SIZES)), tmp_path / "m")
    text = (tmp_path / "m/config.json").read_text()
    more = text.replace('"num_hidden_layers": 1', '"num_hidden_layers": 2')
    (tmp_path / "m/config.json").write_text(more)
    with pytest.raises(BaseModelError, match="does not fill LlamaForSequenceClassification"):
        load(path, labels=LABELS)


@pytest.mark.parametrize("labels", [("one",), ("a", "a")])
def test_labels_that_cannot_be_told_apart(tmp_path: Path, labels: tuple[str, ...]) -> None:
    """Fails when one class, or two of one name, are trained."""
    path = saved(LlamaForCausalLM(LlamaConfig(**SIZES)), tmp_path / "m")
    with pytest.raises(BaseModelError, match="cannot be told apart"):
        load(path, labels=labels)
