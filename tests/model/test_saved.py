"""What a pass keeps, counted on a skeleton."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM

from decal.model import saved
from tests.zoo import CAUSAL, build


def skeleton(name: str, dtype: torch.dtype = torch.bfloat16) -> torch.nn.Module:
    config = build(name).config
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    return model.requires_grad_(True)


@pytest.mark.parametrize("name", CAUSAL)
def test_every_architecture_is_counted_or_refused(name: str) -> None:
    """Mutations: let an architecture's error out; count nothing; leave a layer list cut."""
    model = skeleton(name)
    before = len(saved.layers_of(model) or ())
    attention = model.config._attn_implementation  # type: ignore[union-attr]
    found = saved.bytes_per_token(model)
    hidden = model.config.get_text_config().hidden_size  # type: ignore[union-attr,operator]
    assert found is None or found > 4 * hidden
    assert len(saved.layers_of(model) or ()) == before
    assert model.config._attn_implementation == attention  # type: ignore[union-attr]


def test_frozen_weights_keep_less() -> None:
    """A frozen product keeps no input. Mutation: count with gradients whatever is frozen."""
    model = skeleton("llama")
    trained = saved.bytes_per_token(model)
    model.requires_grad_(False)
    model.get_input_embeddings().weight.requires_grad_(True)  # type: ignore[operator]
    frozen = saved.bytes_per_token(model)
    assert trained is not None
    assert frozen is not None
    assert 0 < frozen < trained


def test_float32_keeps_more() -> None:
    """Mutation: count elements instead of bytes."""
    small, large = (
        saved.bytes_per_token(skeleton("gpt2", d)) for d in (torch.bfloat16, torch.float32)
    )
    assert small is not None
    assert large is not None
    assert 1.5 * small < large < 2.1 * small
