"""The model card: known facts in, Markdown with sound front matter out."""

from __future__ import annotations

import pytest
from huggingface_hub import ModelCard

from decal.report.card import MARK, CardFacts, card


def test_what_is_not_known_is_left_out() -> None:
    """Fails when an empty section, an unknown base or a made-up licence is written."""
    text = card(CardFacts(repo="ann/plain", kind="adapter"))
    data = ModelCard(text).data.to_dict()
    assert data == {
        "library_name": "peft",
        "pipeline_tag": "text-generation",
        "tags": ["decal", "lora"],
    }
    assert MARK in text
    assert "None" not in text
    assert [line for line in text.splitlines() if line.startswith("#")] == [
        "# plain",
        "## How to use it",
    ]


def test_all_sections() -> None:
    """Fails when a section is lost, or a number is rounded away."""
    text = card(
        CardFacts(
            repo="ann/tickets",
            kind="adapter",
            base="tiny/base",
            base_on_hub=True,
            commit="f" * 40,
            quantized="nf4",
            dataset="tiny/tickets",
            data={"rows": 6400},
            settings={"lr": 2e-4, "use_rslora": True},
            results={"evaluation loss": 0.123456789},
            versions={"decal": "1.0"},
        )
    )
    data = ModelCard(text).data.to_dict()
    assert data["base_model"] == "tiny/base"
    assert data["base_model_relation"] == "adapter"
    assert data["datasets"] == ["tiny/tickets"]
    assert data["tags"] == ["decal", "lora", "qlora"]
    for fact in (
        "| rows | 6,400 |",
        "| lr | 0.0002 |",
        "| use_rslora | yes |",
        "| evaluation loss | 0.123457 |",
        "| decal | 1.0 |",
        'decal.load("ann/tickets")',
        'PeftModel.from_pretrained(base, "ann/tickets")',
        f'revision="{"f" * 40}"',
    ):
        assert fact in text, fact


def test_a_base_that_is_a_folder() -> None:
    """Its name is shown, and no snippet pretends that the hub has it."""
    text = card(CardFacts(repo="ann/x", kind="adapter", base="my-base"))
    assert "base_model" not in ModelCard(text).data.to_dict()
    assert 'decal.load("ann/x", base="path/to/my-base")' in text
    assert "PeftModel" not in text
    assert "huggingface.co/my-base" not in text


def test_a_classifier() -> None:
    """Fails when a classifier is loaded as a language model, or its classes are lost."""
    facts = CardFacts(
        repo="ann/x", kind="adapter", base="tiny/base", base_on_hub=True, labels=("spam", "ham")
    )
    text = card(facts)
    assert ModelCard(text).data.to_dict()["pipeline_tag"] == "text-classification"
    assert "AutoModelForSequenceClassification" in text
    assert "num_labels=2" in text
    assert "Classes: `spam`, `ham`." in text
    model = card(CardFacts(repo="ann/x", kind="model", labels=("spam", "ham")))
    assert "AutoModelForSequenceClassification" in model
    assert "AutoModelForCausalLM" not in model


@pytest.mark.parametrize("name", ['a: "b"', "yes", "null", "# c", "ünï"])
def test_front_matter_survives_any_name(name: str) -> None:
    """Fails when values are written into the YAML unquoted."""
    facts = CardFacts(repo="ann/x", kind="model", base=name, base_on_hub=True, dataset=name)
    data = ModelCard(card(facts)).data.to_dict()
    assert data["base_model"] == name
    assert data["datasets"] == [name]


def test_cells_keep_the_table_whole() -> None:
    text = card(CardFacts(repo="ann/x", kind="model", data={"data": "a|b\nc"}))
    assert "| data | a\\|b c |" in text
