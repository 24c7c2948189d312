"""The table of well-known models: every row has the published number of parameters."""

from __future__ import annotations

import pytest

from decal.config import BaseConfig
from decal.plan.shapes import KNOWN, known, near
from decal.verbs.plan import model_config
from decal.verbs.structure import as_meta


@pytest.mark.parametrize("name", KNOWN)
def test_the_published_number_of_parameters(name: str) -> None:
    """Fails when a width, a number of layers or tying is wrong: 128256 words for 128000."""
    found_name, config = model_config(BaseConfig(path=name))
    skeleton = as_meta(config)
    assert found_name == name
    assert sum(p.numel() for p in skeleton.parameters()) == KNOWN[name].parameters


@pytest.mark.parametrize(
    ("asked", "name"),
    [
        ("llama-3.1-8b", "llama-3.1-8b"),
        ("meta-llama/Llama-3.1-8B-Instruct", "llama-3.1-8b"),
        ("meta-llama/Meta-Llama-3-8B", "llama-3.1-8b"),
        ("meta-llama/Llama-2-7b-chat-hf", "llama-2-7b"),
        ("HuggingFaceTB/SmolLM2-135M-Instruct", "smollm2-135m"),
        ("microsoft/Phi-3-mini-4k-instruct", "phi-3-mini"),
        ("google/gemma-3-1b-it", "gemma-3-1b"),
        ("mistralai/Mistral-7B-Instruct-v0.3", "mistral-7b"),
        ("openai-community/gpt2", "gpt2"),
    ],
)
def test_tuned_versions_have_the_shape_of_their_base(asked: str, name: str) -> None:
    """Fails when an owner or a suffix keeps a name from being found."""
    assert known(asked) is KNOWN[name]


@pytest.mark.parametrize("asked", ["llama-3.1-9b", "someone/llama-3.1-8b-pruned", "bert"])
def test_other_models_are_not_known(asked: str) -> None:
    """Fails when a name is found by its beginning: a pruned model has other shapes."""
    assert known(asked) is None


def test_the_nearest_name() -> None:
    """Fails when a typo gets no suggestion."""
    assert near("lama-3.1-8b") == "llama-3.1-8b"
    assert near("zzzzzz") is None
