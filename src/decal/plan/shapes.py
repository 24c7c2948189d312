"""config.json facts of well-known models, so that they can be planned without a network.

A row is what decides the shapes; everything else is left to the defaults of the model type in
transformers. The published number of parameters, tied weights counted once, stands beside it and is
what a test holds the row against.

Knows no transformers: `verbs/plan.py` makes a skeleton of a row.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from decal.errors import nearest


@dataclass(frozen=True)
class Shape:
    """One well-known model."""

    hub_id: str
    model_type: str
    """transformers' name of the architecture."""
    parameters: int
    """Published total; what is tied counts once."""
    facts: Mapping[str, Any]
    """Keys of config.json."""


def _shape(
    hub_id: str, model_type: str, parameters: int, numbers: tuple[int, ...], **more: Any
) -> Shape:
    names = (
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "vocab_size",
        "max_position_embeddings",
    )
    return Shape(hub_id, model_type, parameters, {**dict(zip(names, numbers, strict=True)), **more})


_TIED: dict[str, Any] = {"tie_word_embeddings": True}
_OWN: dict[str, Any] = {"tie_word_embeddings": False}
_EXPERTS: dict[str, Any] = {"num_experts": 128, "num_experts_per_tok": 8, "decoder_sparse_step": 1}
_PHI: dict[str, Any] = {"pad_token_id": None, **_OWN}

# fmt: off
KNOWN: dict[str, Shape] = {
    "smollm2-135m": _shape("HuggingFaceTB/SmolLM2-135M", "llama", 134_515_008,
        (576, 1536, 30, 9, 3, 49152, 8192), **_TIED),
    "smollm2-360m": _shape("HuggingFaceTB/SmolLM2-360M", "llama", 361_821_120,
        (960, 2560, 32, 15, 5, 49152, 8192), **_TIED),
    "smollm2-1.7b": _shape("HuggingFaceTB/SmolLM2-1.7B", "llama", 1_711_376_384,
        (2048, 8192, 24, 32, 32, 49152, 8192), **_TIED),
    "tinyllama-1.1b": _shape("TinyLlama/TinyLlama-1.1B-Chat-v1.0", "llama", 1_100_048_384,
        (2048, 5632, 22, 32, 4, 32000, 2048), **_OWN),
    "llama-2-7b": _shape("meta-llama/Llama-2-7b-hf", "llama", 6_738_415_616,
        (4096, 11008, 32, 32, 32, 32000, 4096), **_OWN),
    "llama-2-13b": _shape("meta-llama/Llama-2-13b-hf", "llama", 13_015_864_320,
        (5120, 13824, 40, 40, 40, 32000, 4096), **_OWN),
    "llama-2-70b": _shape("meta-llama/Llama-2-70b-hf", "llama", 68_976_648_192,
        (8192, 28672, 80, 64, 8, 32000, 4096), **_OWN),
    "llama-3.1-8b": _shape("meta-llama/Llama-3.1-8B", "llama", 8_030_261_248,
        (4096, 14336, 32, 32, 8, 128256, 131072), **_OWN),
    "llama-3.1-70b": _shape("meta-llama/Llama-3.1-70B", "llama", 70_553_706_496,
        (8192, 28672, 80, 64, 8, 128256, 131072), **_OWN),
    "llama-3.2-1b": _shape("meta-llama/Llama-3.2-1B", "llama", 1_235_814_400,
        (2048, 8192, 16, 32, 8, 128256, 131072), head_dim=64, **_TIED),
    "llama-3.2-3b": _shape("meta-llama/Llama-3.2-3B", "llama", 3_212_749_824,
        (3072, 8192, 28, 24, 8, 128256, 131072), head_dim=128, **_TIED),
    "mistral-7b": _shape("mistralai/Mistral-7B-v0.3", "mistral", 7_248_023_552,
        (4096, 14336, 32, 32, 8, 32768, 32768), sliding_window=None, **_OWN),
    "mixtral-8x7b": _shape("mistralai/Mixtral-8x7B-v0.1", "mixtral", 46_702_792_704,
        (4096, 14336, 32, 32, 8, 32000, 32768), num_local_experts=8, num_experts_per_tok=2, **_OWN),
    "qwen2.5-0.5b": _shape("Qwen/Qwen2.5-0.5B", "qwen2", 494_032_768,
        (896, 4864, 24, 14, 2, 151936, 32768), **_TIED),
    "qwen2.5-1.5b": _shape("Qwen/Qwen2.5-1.5B", "qwen2", 1_543_714_304,
        (1536, 8960, 28, 12, 2, 151936, 32768), **_TIED),
    "qwen2.5-3b": _shape("Qwen/Qwen2.5-3B", "qwen2", 3_085_938_688,
        (2048, 11008, 36, 16, 2, 151936, 32768), **_TIED),
    "qwen2.5-7b": _shape("Qwen/Qwen2.5-7B", "qwen2", 7_615_616_512,
        (3584, 18944, 28, 28, 4, 152064, 32768), **_OWN),
    "qwen2.5-14b": _shape("Qwen/Qwen2.5-14B", "qwen2", 14_770_033_664,
        (5120, 13824, 48, 40, 8, 152064, 32768), **_OWN),
    "qwen2.5-32b": _shape("Qwen/Qwen2.5-32B", "qwen2", 32_763_876_352,
        (5120, 27648, 64, 40, 8, 152064, 32768), **_OWN),
    "qwen2.5-72b": _shape("Qwen/Qwen2.5-72B", "qwen2", 72_706_203_648,
        (8192, 29568, 80, 64, 8, 152064, 32768), **_OWN),
    "qwen3-0.6b": _shape("Qwen/Qwen3-0.6B", "qwen3", 596_049_920,
        (1024, 3072, 28, 16, 8, 151936, 40960), head_dim=128, **_TIED),
    "qwen3-1.7b": _shape("Qwen/Qwen3-1.7B", "qwen3", 1_720_574_976,
        (2048, 6144, 28, 16, 8, 151936, 40960), head_dim=128, **_TIED),
    "qwen3-4b": _shape("Qwen/Qwen3-4B", "qwen3", 4_022_468_096,
        (2560, 9728, 36, 32, 8, 151936, 40960), head_dim=128, **_TIED),
    "qwen3-8b": _shape("Qwen/Qwen3-8B", "qwen3", 8_190_735_360,
        (4096, 12288, 36, 32, 8, 151936, 40960), head_dim=128, **_OWN),
    "qwen3-14b": _shape("Qwen/Qwen3-14B", "qwen3", 14_768_307_200,
        (5120, 17408, 40, 40, 8, 151936, 40960), head_dim=128, **_OWN),
    "qwen3-32b": _shape("Qwen/Qwen3-32B", "qwen3", 32_762_123_264,
        (5120, 25600, 64, 64, 8, 151936, 40960), head_dim=128, **_OWN),
    "qwen3-30b-a3b": _shape("Qwen/Qwen3-30B-A3B", "qwen3_moe", 30_532_122_624,
        (2048, 6144, 48, 32, 4, 151936, 40960), head_dim=128, moe_intermediate_size=768,
        **_EXPERTS, **_OWN),
    "gemma-2b": _shape("google/gemma-2b", "gemma", 2_506_172_416,
        (2048, 16384, 18, 8, 1, 256000, 8192), head_dim=256, **_TIED),
    "gemma-7b": _shape("google/gemma-7b", "gemma", 8_537_680_896,
        (3072, 24576, 28, 16, 16, 256000, 8192), head_dim=256, **_TIED),
    "gemma-2-2b": _shape("google/gemma-2-2b", "gemma2", 2_614_341_888,
        (2304, 9216, 26, 8, 4, 256000, 8192), head_dim=256, **_TIED),
    "gemma-2-9b": _shape("google/gemma-2-9b", "gemma2", 9_241_705_984,
        (3584, 14336, 42, 16, 8, 256000, 8192), head_dim=256, **_TIED),
    "gemma-3-1b": _shape("google/gemma-3-1b-pt", "gemma3_text", 999_885_952,
        (1152, 6912, 26, 4, 1, 262144, 32768), head_dim=256, sliding_window=512, **_TIED),
    "phi-2": _shape("microsoft/phi-2", "phi", 2_779_683_840,
        (2560, 10240, 32, 32, 32, 51200, 2048), **_OWN),
    "phi-3-mini": _shape("microsoft/Phi-3-mini-4k-instruct", "phi3", 3_821_079_552,
        (3072, 8192, 32, 32, 32, 32064, 4096), **_PHI),
    "phi-4": _shape("microsoft/phi-4", "phi3", 14_659_507_200,
        (5120, 17920, 40, 40, 10, 100352, 16384), **_PHI),
    "gpt2": Shape("openai-community/gpt2", "gpt2", 124_439_808,
        {"n_embd": 768, "n_layer": 12, "n_head": 12, "vocab_size": 50257, "n_positions": 1024,
         **_TIED}),
}
# fmt: on
"""By the names that people call them."""

_SUFFIXES = re.compile(r"-(instruct|chat|base|it|pt|hf|v0\.\d)(?=-|$)")


def plain(name: str) -> str:
    """A name without its owner, and without what tells tuned versions of one shape apart."""
    short = name.rpartition("/")[2].lower().replace("_", "-")
    short = _SUFFIXES.sub("", _SUFFIXES.sub("", short)).removeprefix("meta-")
    return re.sub(r"^llama-3-(?=8b|70b)", "llama-3.1-", short)


def known(name: str) -> Shape | None:
    """The well-known model that `name` or a hub id means; None for any other.

    A tuned version has the shape of its base, so that `Qwen/Qwen2.5-7B-Instruct` is found too.
    """
    ids = {plain(shape.hub_id): shape for shape in KNOWN.values()}
    return KNOWN.get(plain(name)) or ids.get(plain(name))


def near(name: str) -> str | None:
    """The well-known name closest to `name`, for a hint; None if none is close."""
    return nearest(plain(name), list(KNOWN))
