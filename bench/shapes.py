"""The bases and batches that the benches of speed use: shapes of known models, random weights.

Knows no contender. Speed does not depend on the values of weights, so that nothing is downloaded.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer, models
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)

KNOWN: dict[str, dict[str, Any]] = {
    "smollm2-135m": {
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "vocab_size": 49152,
    },
    "qwen2.5-0.5b": {
        "hidden_size": 896,
        "intermediate_size": 4864,
        "num_hidden_layers": 24,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
        "vocab_size": 151936,
    },
    "tiny": {
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 1024,
    },
}
ROWS, LENGTH, RANK = 4, 256, 16
CHAT_ROWS, CHAT_BATCHES = 8, 3
SHORTEST, LONGEST = 20, 600
PADDED_ROWS = {"smollm2-135m": 8, "qwen2.5-0.5b": 2, "tiny": 8}
"""Rows of a micro-batch of the padded loop: what fits into its share of 24 GB."""

Row = tuple[NDArray[np.int32], NDArray[np.bool_]]
"""Tokens and which of them are trained."""


def write_base(shape: str, folder: str) -> None:
    """A Llama or, for Qwen's shape, a Qwen2 (biases on q, k, v) in bf16, and a tokenizer."""
    torch.manual_seed(0)
    settings = {**KNOWN[shape], "tie_word_embeddings": True, "max_position_embeddings": 2048}
    if shape.startswith("qwen"):
        model: Any = Qwen2ForCausalLM(Qwen2Config(**settings))
    else:
        model = LlamaForCausalLM(LlamaConfig(**settings))
    model.to(torch.bfloat16).save_pretrained(folder)
    vocabulary = {"<pad>": 0, "<s>": 1, "</s>": 2, "[UNK]": 3}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]")),
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
    )
    tokenizer.save_pretrained(folder)


def even_rows(vocabulary: int) -> list[Row]:
    """ROWS rows of LENGTH tokens, all trained that can be: the first follows nothing."""
    generator = np.random.default_rng(0)
    trained = np.arange(LENGTH) > 0
    return [
        (generator.integers(5, vocabulary, LENGTH).astype(np.int32), trained.copy())
        for _ in range(ROWS)
    ]


def chat_rows(vocabulary: int) -> list[list[Row]]:
    """CHAT_BATCHES batches of CHAT_ROWS rows with a chat's lengths; prompts are not trained.

    Lengths are log-normal with a median of 130 tokens, cut at SHORTEST and LONGEST; between 20 and
    70 percent of a row are its prompt.
    """
    generator = np.random.default_rng(0)
    count = CHAT_BATCHES * CHAT_ROWS
    drawn = np.exp(np.log(130) + 0.8 * generator.standard_normal(count))
    rows = []
    for length in np.clip(drawn, SHORTEST, LONGEST).astype(int).tolist():
        prompt = int(length * generator.uniform(0.2, 0.7))
        ids = generator.integers(5, vocabulary, length).astype(np.int32)
        rows.append((ids, np.arange(length) >= max(prompt, 1)))
    return [rows[i : i + CHAT_ROWS] for i in range(0, count, CHAT_ROWS)]


def operations(shape: str, lengths: list[int], trained: int) -> dict[str, float]:
    """Multiplications and additions of one step, by part, counted as 2 per pair.

    linears: forward and the gradient of the input; the frozen weights need none. adapters: two
    products forward, two for each factor and the input's. head: as linears, at trained tokens.
    attention: the visible half of the scores; two products forward and five in backward, which
    computes the scores again.
    """
    config = KNOWN[shape]
    hidden, inner, layers = (
        config[k] for k in ("hidden_size", "intermediate_size", "num_hidden_layers")
    )
    kv = hidden // config["num_attention_heads"] * config["num_key_value_heads"]
    widths = [(hidden, hidden)] * 2 + [(hidden, kv)] * 2 + [(hidden, inner)] * 3
    tokens = sum(lengths)
    return {
        "linears": 4.0 * tokens * layers * sum(a * b for a, b in widths),
        "adapters": 6.0 * tokens * layers * RANK * sum(a + b for a, b in widths),
        "attention": 14.0 * layers * hidden * sum(n * (n + 1) / 2 for n in lengths),
        "head": 4.0 * trained * hidden * config["vocab_size"],
    }
