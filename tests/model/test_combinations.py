"""Random combinations of every setting: attached, saved, loaded, merged, taken off again."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from decal.config import LoraConfig
from decal.errors import AdapterError
from decal.model.adapter import Adapter
from decal.model.inject import (
    adapted_layers,
    adapter_state,
    attach,
    detach,
    disabled,
    trainable_parameters,
    use,
)
from decal.verbs.in_place import merge_in_place
from tests.model.test_inject import snapshot
from tests.zoo import VOCABULARY, build

IDS = torch.randint(3, VOCABULARY, (2, 9), generator=torch.Generator().manual_seed(2))
LINEAR = {
    "llama": ("q_proj", "k_proj", "o_proj", "down_proj", "lm_head", "embed_tokens"),
    "qwen2": ("q_proj", "v_proj", "gate_proj", "lm_head", "embed_tokens"),
    "gemma3": ("k_proj", "up_proj", "embed_tokens"),
    "gpt2": ("c_attn", "c_fc", "wte", "wpe"),
    "bert": ("query", "dense", "word_embeddings", "classifier"),
    "roberta": ("query", "key", "value"),
}
WHOLE = {
    "llama": ("model.norm", "lm_head", "embed_tokens", "0.mlp"),
    "qwen2": ("lm_head", "post_attention_layernorm"),
    "gemma3": ("q_norm", "lm_head"),
    "gpt2": ("ln_f", "wpe", "lm_head"),
    "bert": ("pooler", "classifier", "1.attention"),
    "roberta": ("classifier", "embeddings"),
}


def combination(seed: int) -> tuple[str, LoraConfig]:
    """An architecture and settings that act on it."""
    draw = random.Random(seed)
    name = draw.choice(list(LINEAR))
    targets = draw.sample(LINEAR[name], draw.randint(2, len(LINEAR[name])))
    fields: dict[str, Any] = {
        "r": draw.randint(1, 5),
        "lora_alpha": draw.choice([3, 7.5]),
        "use_rslora": draw.random() < 0.3,
        "lora_dropout": 0.0,
        "target_modules": targets,
        "init_lora_weights": draw.choice([True, False, "gaussian"]),
        "bias": draw.choice(["none", "all", "lora_only"]),
        "lora_bias": not any(t.startswith(("emb", "wte", "wpe", "word")) for t in targets),
    }
    if draw.random() < 0.5:
        fields["rank_pattern"] = {targets[0]: draw.randint(6, 7)}
        fields["alpha_pattern"] = {targets[-1]: 11}
    if draw.random() < 0.6:
        fields["modules_to_save"] = draw.sample(WHOLE[name], draw.randint(1, 2))
        fields |= {"rank_pattern": {}, "alpha_pattern": {}}  # what is whole may leave no target
    return name, LoraConfig(**fields)


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(IDS).logits
    return found


def disturb(model: Any, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
                parameter.copy_(parameter.float())  # files hold float32


@pytest.mark.parametrize("seed", range(16))
def test_every_way_leads_to_the_same_model(seed: int, tmp_path: Path) -> None:
    """float64 bases. To the bit after loading, 1e-9 after merging, and the base comes back.

    Mutations: save a tensor under another's name; forget one kind of parameter in detach; merge
    without a scaling.
    """
    name, config = combination(seed)
    first = build(name, torch.float64)
    before, base = snapshot(first), logits(first)
    found = attach(first, config, "a", seed=seed)
    disturb(first, seed)
    assert trainable_parameters(first)[0] == found.parameters
    want = logits(first)
    assert not torch.equal(want, base)
    with disabled(first):
        assert torch.equal(logits(first), base)
    Adapter.from_model(first, "a").save_pretrained(tmp_path / "a")

    second = build(name, torch.float64)
    attach(second, LoraConfig(target_modules=LINEAR[name][:1]), "other")
    attach(second, Adapter.from_pretrained(tmp_path / "a"), "b")
    assert torch.equal(logits(second), want)
    use(second, "other")
    assert torch.equal(logits(second), base)
    use(second, "b")
    homeless = [
        module
        for module, parts in adapter_state(second, "b").items()
        if parts.bias is not None and adapted_layers(second)[module].base.bias is None
    ]
    if homeless:  # a bias of B on a layer without one cannot be merged
        with pytest.raises(AdapterError, match=f"{len(homeless)} layers have no bias"):
            merge_in_place(second, "b")
        detach(second, "other")
    else:
        merge_in_place(second, "b")
    assert float((logits(second) - want).abs().max()) < 1e-9 * float(want.abs().max())

    detach(first)
    after = snapshot(first)
    torch.testing.assert_close(after.pop("bytes"), before.pop("bytes"), rtol=0, atol=0)
    assert after == before
    assert torch.equal(logits(first), base)
