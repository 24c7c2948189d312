"""Counts of parameters and bytes that must come out exactly, on skeletons with the real shapes.

The skeletons are transformers models on the meta device; nothing is allocated or downloaded.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config

from decal.config import LoraConfig
from decal.model.inject import attach, detach, trainable_parameters
from decal.model.quantizer import quantizable_modules
from decal.model.size import weight_bytes
from decal.model.state import adapter_state
from decal.quant.base import Recipe
from decal.quant.linear import QuantLinear

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


BYTES: list[tuple[Recipe | None, int, int]] = [
    (None, 16_060_522_496, 0),
    (Recipe(format="nf4", double=True), 5_591_539_712, 110_756_736),
    (Recipe(format="nf4", double=False), 5_591_539_712, 436_207_616),
    (Recipe(format="fp4", double=True), 5_591_539_712, 110_756_736),
    (Recipe(format="fp4", double=False), 5_591_539_712, 436_207_616),
    (Recipe(format="int8"), 9_081_200_640, 5_505_024),
]
"""Recipe, bytes of codes and of all that stays 16-bit, bytes of scales and offsets."""


def _quantized(skeleton: Any, recipe: Recipe | None) -> list[QuantLinear]:
    """Puts empty packed layers in the places of the linear ones."""
    packed = []
    for name in quantizable_modules(skeleton) if recipe else []:
        linear = skeleton.get_submodule(name)
        shape = (linear.in_features, linear.out_features)
        packed.append(QuantLinear.empty(*shape, False, recipe, torch.bfloat16))  # type: ignore[arg-type]
        skeleton.set_submodule(name, packed[-1])
    return packed


@pytest.mark.parametrize(("recipe", "codes", "scales"), BYTES, ids=str)
def test_bytes_of_the_weights(recipe: Recipe | None, codes: int, scales: int) -> None:
    """Llama-3.1-8B in 16 bits and in every format. Mutations: quantize the head; keep the scales
    of double quantization in float32."""
    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(CONFIGS["Llama-3.1-8B"]).bfloat16()
    packed = _quantized(model, recipe)
    assert len(packed) == (224 if recipe else 0)
    assert weight_bytes(model) == codes + scales
    beside = sum(m.nbytes - getattr(m, m.part_names[0]).nbytes for m in packed)
    assert beside == scales
    if recipe is None:
        assert weight_bytes(model.float()) == 32_121_044_992


@pytest.mark.parametrize(("double", "bits", "gigabytes"), [(False, 4.5, 36.5), (True, 4.127, 33.5)])
@pytest.mark.parametrize("name", ["nf4", "fp4"])
def test_bits_per_quantized_weight(name: str, double: bool, bits: float, gigabytes: float) -> None:
    """4 bits, and per block of 64 a float32 scale, or 8 bits and a 256th of a float32; and what
    65 billion weights come to. Mutation: forget the second level's scales."""
    recipe = Recipe(format=name, double=double)
    layer = QuantLinear.empty(4096, 4096, False, recipe, torch.bfloat16)
    found = 8 * layer.nbytes / 4096**2
    assert found == pytest.approx(bits, abs=1e-4)
    assert 65 * found / 8 == pytest.approx(gigabytes, abs=0.1)


def test_bytes_of_an_adapter_file(skeletons: dict[str, Any]) -> None:
    """The course's 109.05 MB: rank 32 on the attention of Llama-3.1-8B. Mutation: 16-bit."""
    skeleton = skeletons["Llama-3.1-8B"]
    attach(skeleton, LoraConfig(r=32, target_modules=QKVO))
    parts = adapter_state(skeleton).values()
    assert sum(p.A.nbytes + p.B.nbytes for p in parts) == 109_051_904
    detach(skeleton)
