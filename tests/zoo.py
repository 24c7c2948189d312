"""Tiny real architectures of transformers, with weights that hide no mistake.

Widths are odd where the architecture lets them be, the heads are wider together than the hidden
states, key-value heads are fewer than heads; windows are shorter than the samples of the tests,
softcaps bite. Every weight is drawn anew: biases are not zero and norms are not one, which is what
fresh models have, and what a forgotten bias or a swapped norm would survive.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers as tf
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor

Tensors = dict[str, Tensor]

VOCABULARY = 263
"""A prime: the tokenizer has 259 tokens, and the last rows are never read, as in real models."""
SPECIALS = ("<pad>", "<s>", "</s>")

CHAT = (
    "{% for m in messages %}<s>{{ m.role }}\n{{ m.content }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant\n{% endif %}"
)
LABELS = ("billing", "network", "printer")


@dataclass(frozen=True)
class Tiny:
    """One architecture, and what must be true of it."""

    cls: type
    config: Callable[[], Any]
    """A fresh config each time: models write into theirs."""
    task: str = "causal"
    """causal | classify"""
    flattens: bool = True
    """Whether flattened batches give its samples the logits that they have alone."""
    fused: tuple[str, ...] = ()
    """Layers that compute several projections at once, by their last name."""
    experts: tuple[str, ...] = ()
    """Modules whose weights have a third dimension: neither adapted nor quantized."""

    @property
    def causal(self) -> bool:
        return self.task == "causal"


def _config(kind: type, **own: Any) -> Callable[[], Any]:
    shared = {"vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    return lambda: kind(**{**shared, **own})


def _decoder(kind: type, *, heads: int = 6, kv: int = 2, tied: bool, **own: Any) -> Any:
    sizes = {
        "hidden_size": 54,
        "intermediate_size": 75,
        "num_hidden_layers": 2,
        "num_attention_heads": heads,
        "num_key_value_heads": kv,
        "head_dim": 10,
        "max_position_embeddings": 512,
        "tie_word_embeddings": tied,
    }
    return _config(kind, **{**sizes, **own})


def _encoder(kind: type, **own: Any) -> Any:
    sizes = {
        "hidden_size": 36,
        "intermediate_size": 75,
        "num_hidden_layers": 2,
        "num_attention_heads": 6,
        "max_position_embeddings": 514,
        "type_vocab_size": 2,
        **_labels(),
    }
    return _config(kind, **{**sizes, **own})


def _labels() -> dict[str, Any]:
    return {
        "num_labels": len(LABELS),
        "id2label": dict(enumerate(LABELS)),
        "label2id": {label: i for i, label in enumerate(LABELS)},
    }


_MIXED = ["sliding_attention", "full_attention", "sliding_attention"]

ZOO: dict[str, Tiny] = {
    "llama": Tiny(
        tf.LlamaForCausalLM,
        _decoder(tf.LlamaConfig, tied=True, attention_bias=True, mlp_bias=True),
    ),
    "qwen2": Tiny(
        tf.Qwen2ForCausalLM,
        _decoder(tf.Qwen2Config, tied=False, hidden_size=60),
    ),
    "qwen3": Tiny(
        tf.Qwen3ForCausalLM,
        _decoder(tf.Qwen3Config, tied=True),
    ),
    "mistral": Tiny(
        tf.MistralForCausalLM,
        _decoder(tf.MistralConfig, tied=False, sliding_window=4),
    ),
    "gemma": Tiny(
        tf.GemmaForCausalLM,
        _decoder(tf.GemmaConfig, tied=True, kv=1),
    ),
    "gemma2": Tiny(
        tf.Gemma2ForCausalLM,
        _decoder(
            tf.Gemma2Config,
            tied=True,
            num_hidden_layers=3,
            layer_types=_MIXED,
            sliding_window=4,
            query_pre_attn_scalar=17,
            attn_logit_softcapping=2.0,
            attn_implementation="eager",
            final_logit_softcapping=5.0,
        ),
    ),
    "gemma3": Tiny(
        tf.Gemma3ForCausalLM,
        _decoder(
            tf.Gemma3TextConfig,
            tied=True,
            num_hidden_layers=3,
            layer_types=_MIXED,
            sliding_window=4,
            query_pre_attn_scalar=17,
        ),
    ),
    "phi3": Tiny(
        tf.Phi3ForCausalLM,
        _decoder(tf.Phi3Config, tied=False, hidden_size=60),
        fused=("qkv_proj", "gate_up_proj"),
    ),
    "gpt2": Tiny(
        tf.GPT2LMHeadModel,
        _config(tf.GPT2Config, n_embd=36, n_inner=75, n_layer=2, n_head=6, n_positions=512),
        fused=("c_attn",),
    ),
    "gpt_neox": Tiny(
        tf.GPTNeoXForCausalLM,
        _config(
            tf.GPTNeoXConfig,
            hidden_size=48,
            intermediate_size=75,
            num_hidden_layers=2,
            num_attention_heads=6,
            rotary_pct=0.5,
            max_position_embeddings=512,
            tie_word_embeddings=False,
        ),
        fused=("query_key_value",),
    ),
    "opt": Tiny(
        tf.OPTForCausalLM,
        _config(
            tf.OPTConfig,
            hidden_size=48,
            ffn_dim=75,
            word_embed_proj_dim=30,
            num_hidden_layers=2,
            num_attention_heads=6,
            max_position_embeddings=512,
        ),
    ),
    "bloom": Tiny(
        tf.BloomForCausalLM,
        _config(tf.BloomConfig, hidden_size=48, n_layer=2, n_head=6),
        flattens=False,
        fused=("query_key_value",),
    ),
    "falcon": Tiny(
        tf.FalconForCausalLM,
        _config(
            tf.FalconConfig,
            hidden_size=48,
            num_hidden_layers=2,
            num_attention_heads=6,
            multi_query=True,
        ),
        flattens=False,
        fused=("query_key_value",),
    ),
    "qwen3_moe": Tiny(
        tf.Qwen3MoeForCausalLM,
        _decoder(
            tf.Qwen3MoeConfig,
            tied=False,
            hidden_size=48,  # torch's grouped product wants rows of whole 16 bytes
            num_experts=5,
            num_experts_per_tok=2,
            moe_intermediate_size=24,
            decoder_sparse_step=1,
            mlp_only_layers=[0],
        ),
        experts=("experts",),
    ),
    "llama_classify": Tiny(
        tf.LlamaForSequenceClassification,
        _decoder(tf.LlamaConfig, tied=False, **_labels()),
        task="classify",
        flattens=False,
    ),
    "bert": Tiny(
        tf.BertForSequenceClassification,
        _encoder(tf.BertConfig),
        task="classify",
        flattens=False,
    ),
    "roberta": Tiny(
        tf.RobertaForSequenceClassification,
        _encoder(tf.RobertaConfig, pad_token_id=1, bos_token_id=0),
        task="classify",
        flattens=False,
    ),
}
CAUSAL = tuple(name for name, tiny in ZOO.items() if tiny.causal)
CLASSIFY = tuple(name for name, tiny in ZOO.items() if not tiny.causal)


def build(name: str, dtype: torch.dtype = torch.float32, seed: int = 0) -> Any:
    """The model in evaluation mode, with weights of our own drawing."""
    tiny = ZOO[name]
    with torch.random.fork_rng():
        model: Any = tiny.cls(tiny.config())
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim == 1:  # norms start at one or, gemma's, at zero
                parameter += 0.25 * noise
            else:
                parameter.copy_(0.2 * noise)
    model.tie_weights()
    if dtype == torch.float64:  # torch's grouped matrix product has no float64
        model.set_experts_implementation("eager")
    return model.to(dtype).eval()


def tokenizer(chat: bool = True) -> Any:
    """One token per byte and three special ones: any text, no file needed."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate((*SPECIALS, *alphabet))}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return tf.PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        chat_template=CHAT if chat else None,
    )


def save(name: str, folder: Path, dtype: torch.dtype = torch.float32, seed: int = 0) -> Path:
    """A base as it lies on the hub: weights, config, tokenizer."""
    build(name, dtype, seed).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def _old_gpt2(tensors: Tensors) -> Tensors:
    old = {key.removeprefix("transformer."): t for key, t in tensors.items()}
    for i in range(2):
        old[f"h.{i}.attn.bias"] = torch.ones(1, 1, 512, 512).tril()
        old[f"h.{i}.attn.masked_bias"] = torch.tensor(-1e4)
    return old


def _old_neox(tensors: Tensors) -> Tensors:
    old = dict(tensors)
    for i in range(2):
        attention = f"gpt_neox.layers.{i}.attention"
        old[f"{attention}.bias"] = torch.ones(1, 1, 512, 512, dtype=torch.bool).tril()
        old[f"{attention}.masked_bias"] = torch.tensor(-1e9)
        old[f"{attention}.rotary_emb.inv_freq"] = torch.ones(2)
    return old


def _old_llama(tensors: Tensors) -> Tensors:
    old = {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.ones(5) for i in range(2)}
    return {**tensors, **old, "lm_head.weight": tensors["model.embed_tokens.weight"].clone()}


def _old_bert(tensors: Tensors) -> Tensors:
    gamma, beta = ("LayerNorm.weight", "LayerNorm.gamma"), ("LayerNorm.bias", "LayerNorm.beta")
    old = {key.replace(*gamma).replace(*beta): t for key, t in tensors.items()}
    return {**old, "bert.embeddings.position_ids": torch.arange(514)[None]}


def _old_roberta(tensors: Tensors) -> Tensors:
    return {**tensors, "roberta.embeddings.position_ids": torch.arange(514)[None]}


HISTORIC: dict[str, Callable[[Tensors], Tensors]] = {
    "gpt2": _old_gpt2,
    "gpt_neox": _old_neox,
    "llama": _old_llama,
    "bert": _old_bert,
    "roberta": _old_roberta,
}
"""Names that the hub's old files use, and what they hold besides weights: masks, positions."""


def rewrite(folder: Path, change: Callable[[Tensors], Tensors]) -> Path:
    """Changes the tensors in a folder written by `save`."""
    file = folder / "model.safetensors"
    save_file(change(load_file(file)), file, {"format": "pt"})
    return folder


def save_historic(name: str, folder: Path, dtype: torch.dtype = torch.float32) -> Path:
    """As `save`, with the keys and the leftovers of an old file of this architecture."""
    return rewrite(save(name, folder, dtype), HISTORIC[name])
