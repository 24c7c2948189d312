"""What decal takes transformers' modules for, on real architectures on the meta device."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers as tf
from torch import nn
from transformers import AutoModelForCausalLM

from decal.config import LoraConfig
from decal.model.inject import attach, detach
from decal.model.survey import module_infos, notes_on_rest, parameter_counts
from decal.model.targets import resolve

SMALL: dict[str, Any] = {
    "hidden_size": 24,
    "intermediate_size": 44,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 51,
}
GROUPED = {**SMALL, "num_key_value_heads": 2}
QKVO = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP = ("gate_proj", "up_proj", "down_proj")
ARCHITECTURES: dict[str, tuple[Any, tuple[str, ...], tuple[str, ...]]] = {
    "llama": (tf.LlamaConfig(**GROUPED), QKVO, MLP),
    "qwen2": (tf.Qwen2Config(**GROUPED), QKVO, MLP),
    "qwen3": (tf.Qwen3Config(**GROUPED, head_dim=6), QKVO, MLP),
    "mistral": (tf.MistralConfig(**GROUPED), QKVO, MLP),
    "gemma": (tf.GemmaConfig(**GROUPED, head_dim=6), QKVO, MLP),
    "gemma3": (tf.Gemma3TextConfig(**GROUPED, head_dim=6), QKVO, MLP),
    "phi3": (
        tf.Phi3Config(**GROUPED, pad_token_id=0),
        ("qkv_proj", "o_proj"),
        ("gate_up_proj", "down_proj"),
    ),
    "gpt2": (
        tf.GPT2Config(n_embd=24, n_layer=2, n_head=4, vocab_size=51),
        ("attn.c_attn", "attn.c_proj"),
        ("c_fc", "mlp.c_proj"),
    ),
    "gpt_neox": (
        tf.GPTNeoXConfig(**SMALL),
        ("query_key_value", "attention.dense"),
        ("dense_h_to_4h", "dense_4h_to_h"),
    ),
    "bert": (
        tf.BertConfig(**SMALL, is_decoder=True),
        ("query", "key", "value", "attention.output.dense"),
        ("intermediate.dense",),
    ),
}


def skeleton(config: Any, kind: Any = AutoModelForCausalLM, device: str = "meta") -> Any:
    with torch.device(device):
        return kind.from_config(config)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_attention_and_all_linear(name: str) -> None:
    """Mutations: recognize attention by a name that ends with `attn`; count the head as linear."""
    config, attention, rest = ARCHITECTURES[name]
    model = skeleton(config)
    infos = module_infos(model)
    wanted = [n for n in infos if n.endswith(tuple("." + a for a in attention))]
    assert len(wanted) == 2 * len(attention)
    assert resolve(infos, "attention") == wanted
    everything = resolve(infos, "all-linear")
    assert set(wanted) < set(everything)
    for leaf in rest:
        assert sum(n.endswith("." + leaf) for n in everything) == 2
    head = model.get_output_embeddings()
    assert not any(model.get_submodule(n) is head for n in everything)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_architecture_runs_with_adapters_and_reads_the_same(name: str) -> None:
    """Every adapter gets a gradient; names and kinds do not change by attaching.

    Mutation: wrap a layer that its owner never calls.
    """
    model = skeleton(ARCHITECTURES[name][0], device="cpu")
    before, counts = module_infos(model), parameter_counts(model)
    found = attach(model, LoraConfig(r=3, init_lora_weights=False))
    assert module_infos(model) == before
    assert parameter_counts(model) == (found.parameters, counts[1] + found.parameters)
    ids = torch.tensor([[3, 50, 7, 7, 1], [4, 2, 9, 11, 12]])
    model(ids, labels=ids, use_cache=False).loss.backward()
    trained = [p.grad for p in model.parameters() if p.requires_grad]
    assert all(g is not None and bool(g.any()) for g in trained)
    detach(model)
    assert parameter_counts(model) == counts


def test_a_classification_head_is_a_head() -> None:
    """It is no output embedding. Mutation: look at get_output_embeddings only."""
    model = skeleton(tf.LlamaConfig(**GROUPED, num_labels=3), tf.AutoModelForSequenceClassification)
    infos = module_infos(model)
    assert [n for n, info in infos.items() if info.is_head] == ["score"]
    assert "score" not in resolve(infos, "all-linear")


class Renamed(nn.Module):
    """Attention under another name, as in code from the hub."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(4, 12)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)
        return nn.functional.scaled_dot_product_attention(q, k, v)


def test_attention_is_also_known_by_what_it_calls() -> None:
    model = nn.ModuleDict({"mixer": Renamed(), "fc": nn.Linear(4, 4)})
    assert resolve(module_infos(model), "attention") == ["mixer.qkv"]


def test_expert_weights_that_stay_frozen_are_named() -> None:
    """F8: `all-linear` reaches 5 % of a mixture of experts. Mutation: count 2-D weights only."""
    config = tf.Qwen3MoeConfig(
        **GROUPED, head_dim=6, num_experts=6, num_experts_per_tok=2, moe_intermediate_size=20
    )
    model = skeleton(config)
    held = sum(p.numel() for p in model.parameters() if p.ndim == 3)
    (note,) = notes_on_rest(model)
    share = 100 * held / sum(p.numel() for p in model.parameters())
    assert "2 Qwen3MoeExperts" in note
    assert f"({share:.0f} % of the model)" in note
    assert note in attach(model, LoraConfig(r=2)).notes
    assert notes_on_rest(skeleton(tf.LlamaConfig(**GROUPED))) == []
