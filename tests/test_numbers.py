"""Parameter counts that must come out exactly, on skeletons with the real shapes.

The skeletons are transformers models on the meta device; nothing is allocated or downloaded.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config

from decal.config import LoraConfig
from decal.model.inject import attach, detach, trainable_parameters

QV, QKVO = ("q_proj", "v_proj"), ("q_proj", "k_proj", "v_proj", "o_proj")


def _config(kind: type, hidden: int, inner: int, layers: int, heads: int, kv: int, vocab: int,
            tied: bool) -> Any:  # fmt: skip
    return kind(
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv,
        vocab_size=vocab,
        tie_word_embeddings=tied,
    )


CONFIGS = {
    "SmolLM2-135M": _config(LlamaConfig, 576, 1536, 30, 9, 3, 49152, True),
    "Qwen2.5-0.5B": _config(Qwen2Config, 896, 4864, 24, 14, 2, 151936, True),
    "Llama-2-7B": _config(LlamaConfig, 4096, 11008, 32, 32, 32, 32000, False),
    "Llama-3.1-8B": _config(LlamaConfig, 4096, 14336, 32, 32, 8, 128256, False),
}
TOTALS = {
    "SmolLM2-135M": 134_515_008,
    "Qwen2.5-0.5B": 494_032_768,
    "Llama-2-7B": 6_738_415_616,
    "Llama-3.1-8B": 8_030_261_248,
}
RANKS = (4, 8, 16, 32, 64)
TRAINABLE = [
    ("SmolLM2-135M", QV, (230_400, 460_800, 921_600, 1_843_200, 3_686_400)),
    ("SmolLM2-135M", QKVO, (460_800, 921_600, 1_843_200, 3_686_400, 7_372_800)),
    ("SmolLM2-135M", "attention", (460_800, 921_600, 1_843_200, 3_686_400, 7_372_800)),
    ("SmolLM2-135M", "all-linear", (1_221_120, 2_442_240, 4_884_480, 9_768_960, 19_537_920)),
    ("Qwen2.5-0.5B", QV, (270_336, 540_672, 1_081_344, 2_162_688, 4_325_376)),
    ("Qwen2.5-0.5B", "all-linear", (2_199_552, 4_399_104, 8_798_208, 17_596_416, 35_192_832)),
    ("Llama-2-7B", QV, (2_097_152, 4_194_304, 8_388_608, 16_777_216, 33_554_432)),
    ("Llama-2-7B", "all-linear", (9_994_240, 19_988_480, 39_976_960, 79_953_920, 159_907_840)),
    ("Llama-3.1-8B", QKVO, (3_407_872, 6_815_744, 13_631_488, 27_262_976, 54_525_952)),
    ("Llama-3.1-8B", "all-linear", (10_485_760, 20_971_520, 41_943_040, 83_886_080, 167_772_160)),
]


@pytest.fixture(scope="module")
def skeletons() -> dict[str, Any]:
    with torch.device("meta"):
        return {name: AutoModelForCausalLM.from_config(c) for name, c in CONFIGS.items()}


@pytest.mark.parametrize("model", TOTALS)
def test_all_parameters(skeletons: dict[str, Any], model: str) -> None:
    """Tied embeddings once. Mutation: sum over state_dict."""
    assert trainable_parameters(skeletons[model])[1] == TOTALS[model]


@pytest.mark.parametrize(("model", "targets", "wanted"), TRAINABLE)
def test_trainable_parameters(
    skeletons: dict[str, Any], model: str, targets: Any, wanted: tuple[int, ...]
) -> None:
    """sum of r * (in + out). Mutations: all-linear with the head; leave the base trainable."""
    skeleton = skeletons[model]
    for r, count in zip(RANKS, wanted, strict=True):
        found = attach(skeleton, LoraConfig(r=r, target_modules=targets))
        assert found.parameters == count
        assert trainable_parameters(skeleton) == (count, TOTALS[model] + count)
        detach(skeleton)
