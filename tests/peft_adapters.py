"""Adapters that the real peft makes of the zoo's models: one line per option of LoRA.

Everything that an option trains gets random values, so that nothing can be left out unnoticed.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tests.zoo import build

QV = ["q_proj", "v_proj"]
IDS = torch.arange(5, 18)[None]

OPTIONS: dict[str, tuple[str, dict[str, Any]]] = {
    "plain": ("llama", {}),
    "rslora": ("llama", {"use_rslora": True}),
    "all-linear": ("llama", {"target_modules": "all-linear"}),
    "expression": ("llama", {"target_modules": r".*layers\.1.*(q|k)_proj"}),
    "some not there": ("llama", {"target_modules": ["q_proj", "does_not_exist"]}),
    "half an alpha": ("llama", {"task_type": None, "lora_alpha": 7.5}),
    "orthogonal": ("llama", {"r": 4, "lora_alpha": 9, "init_lora_weights": "orthogonal"}),
    "gaussian": ("llama", {"init_lora_weights": "gaussian"}),
    "kaiming": ("llama", {"init_lora_weights": True}),
    "eva": ("llama", {"init_lora_weights": "eva"}),
    "conv1d": ("gpt2", {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}),
    "ranks": (
        "llama",
        {"rank_pattern": {r"layers\.1\..*q_proj": 2, "q_proj": 5}, "alpha_pattern": {"v_proj": 4}},
    ),
    "ranks and rslora": (
        "llama",
        {"rank_pattern": {"^model.layers.0.self_attn.q_proj": 5}, "use_rslora": True},
    ),
    "excluded": ("llama", {"exclude_modules": ["v_proj"]}),
    "excluded expression": (
        "llama",
        {"target_modules": "all-linear", "exclude_modules": r".*\.mlp\..*"},
    ),
    "layers": ("llama", {"layers_to_transform": [1], "exclude_modules": ["v_proj"]}),
    "layer and pattern": ("llama", {"layers_to_transform": 0, "layers_pattern": "layers"}),
    "layer and patterns": ("llama", {"layers_to_transform": [0], "layers_pattern": ["layers"]}),
    "biases": ("llama", {"bias": "all"}),
    "their biases": ("llama", {"bias": "lora_only"}),
    "biases of conv1d": (
        "gpt2",
        {"target_modules": ["c_attn"], "bias": "all", "fan_in_fan_out": True},
    ),
    "bias of B": ("llama", {"lora_bias": True}),
    "all biases": ("qwen2", {"lora_bias": True, "bias": "lora_only", "init_lora_weights": False}),
    "head": ("qwen2", {"modules_to_save": ["lm_head"]}),
    "head and embedding": ("qwen2", {"modules_to_save": ["lm_head", "embed_tokens"]}),
    "tied head and embedding": ("llama", {"modules_to_save": ["lm_head", "embed_tokens"]}),
    "tied embedding": ("llama", {"modules_to_save": ["embed_tokens"]}),
    "tied head": ("llama", {"modules_to_save": ["lm_head"]}),
    "norms": ("llama", {"modules_to_save": ["norm"]}),
    "blocks": ("llama", {"modules_to_save": ["mlp"], "bias": "all"}),
    "saved layer with biases": ("llama", {"modules_to_save": ["k_proj"], "bias": "all"}),
    "embedding": ("qwen2", {"target_modules": ["q_proj", "embed_tokens"]}),
    "embedding by expression": ("qwen2", {"target_modules": r".*(q_proj|embed_tokens)"}),
    "tied embedding adapted": ("llama", {"target_modules": ["q_proj", "embed_tokens"]}),
    "head adapted": ("qwen2", {"target_modules": ["q_proj", "lm_head"]}),
    "both adapted": ("llama", {"target_modules": ["q_proj", "lm_head", "embed_tokens"]}),
    "embedding of gpt2": (
        "gpt2",
        {"target_modules": ["c_attn", "wte"], "fan_in_fan_out": True},
    ),
    "head adapted, with biases": (
        "llama",
        {"target_modules": ["q_proj", "lm_head"], "bias": "all"},
    ),
    "classifier": ("llama_classify", {"task_type": "SEQ_CLS"}),
    "classifier of bert": (
        "bert",
        {"task_type": "SEQ_CLS", "target_modules": ["query", "value"]},
    ),
    "classifier of bert, biases": (
        "bert",
        {"task_type": "SEQ_CLS", "target_modules": ["query"], "bias": "all"},
    ),
    "classifier of roberta": (
        "roberta",
        {"task_type": "SEQ_CLS", "target_modules": ["query"], "bias": "lora_only"},
    ),
    "experts beside": ("qwen3_moe", {"target_modules": QV}),
}
TIED: dict[str, dict[str, Any]] = {
    "saved": {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
    "adapted": {"target_modules": ["q_proj", "embed_tokens"], "ensure_weight_tying": True},
}
"""Options whose files we write in another form, with the same meaning."""


def base(name: str) -> Any:
    model = build(name)
    model.set_experts_implementation("eager")  # torch's grouped product wants aligned widths
    return model


def theirs(folder: Path, name: str, **settings: Any) -> Any:
    """Writes an adapter with peft; returns its model."""
    import peft

    defaults = {
        "r": 3,
        "lora_alpha": 7,
        "lora_dropout": 0.1,
        "target_modules": QV,
        "task_type": "CAUSAL_LM",
        "init_lora_weights": False,
    }
    model = peft.get_peft_model(base(name), peft.LoraConfig(**{**defaults, **settings})).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.2 * torch.randn(parameter.shape, generator=generator)
    model.save_pretrained(folder)
    return model


@torch.no_grad()
def logits(model: Any) -> Tensor:
    result: Tensor = model(IDS).logits
    return result
