"""Decoder layers computed in a few fused steps. One family per file; FAMILIES is the registry."""

from __future__ import annotations

from decal.model.blocks.llama import LLAMA, MISTRAL, QWEN2, QWEN3, Family

FAMILIES: dict[str, Family] = {
    "LlamaDecoderLayer": LLAMA,
    "MistralDecoderLayer": MISTRAL,
    "Qwen2DecoderLayer": QWEN2,
    "Qwen3DecoderLayer": QWEN3,
}
"""By the name of transformers' decoder layer."""
