"""Which layers are quantized, what stays 16-bit and is said, and what is refused for it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.pytorch_utils import Conv1D

from decal.errors import QuantError
from decal.model import hf
from decal.model.quantizer import quantizable_modules, quantize_skeleton, unpacked
from decal.model.unquantized import left_unquantized
from decal.quant import FORMATS, Recipe, quant_format
from decal.quant.linear import QuantLinear
from tests.zoo import ZOO, build, save

NF4 = Recipe(format="nf4", block_size=32)


@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize("format", FORMATS)
def test_gpt2_is_packed_in_logical_orientation(format: str, double: bool, tmp_path: Path) -> None:
    """Conv1D's files hold [in, out]; the layer computes what the plain one does with its
    dequantized weight, and says that its source was transposed. Fails if the stored matrix is
    packed as it lies (half of GPT-2's are not square), or the start-up of GPT-2 overwrites it."""
    recipe = Recipe(format=format, double=double)
    model = hf.load_model(str(save("gpt2", tmp_path)), recipe=recipe, dtype=torch.float32)
    plain = build("gpt2")
    names = quantizable_modules(model)
    assert len(names) == 8
    for name in names:
        layer, source = model.get_submodule(name), plain.get_submodule(name)
        assert isinstance(source, Conv1D)
        assert isinstance(layer, QuantLinear)
        assert layer.transposed_source
        fmt = quant_format(format)
        meant = fmt.quantize(source.weight.T.contiguous(), recipe)
        assert all(torch.equal(layer.packed.parts[k], part) for k, part in meant.parts.items())
        assert torch.equal(layer.bias, source.bias)
        source.weight.data = layer.weight().T.contiguous()
    ids = torch.arange(3, 30)[None]
    model.train()  # int8 quantizes activations in evaluation
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    assert torch.allclose(model(ids).logits, plain(ids).logits, rtol=1e-4, atol=1e-4)


def test_unpacked_layers_are_what_stood_there() -> None:
    """A Conv1D for a Conv1D: a saved GPT-2 would be read transposed. Fails if every layer becomes a
    linear one, or the weight is not turned."""
    linear = nn.Linear(33, 20)
    layer = QuantLinear.from_linear(linear, NF4)
    plain = unpacked(layer, torch.float32)
    assert type(plain) is nn.Linear
    layer.transposed_source = True
    conv = unpacked(layer, torch.float32)
    assert isinstance(conv, Conv1D)
    assert conv.weight.shape == (33, 20)
    x = torch.randn(4, 33)
    assert torch.allclose(conv(x), plain(x), rtol=1e-5, atol=1e-5)
    assert torch.equal(conv.weight.T, layer.weight())


SKIPS = [
    (("down_proj",), 12, lambda n: n.endswith("down_proj")),
    (("mlp",), 8, lambda n: ".mlp." in n),
    (("layers.0", "q_proj"), 6, lambda n: ".layers.0." in n or n.endswith("q_proj")),
    (("lm_head",), 14, lambda n: False),
]


@pytest.mark.parametrize(("skip", "left", "skipped"), SKIPS)
def test_skipped_modules_stay_plain(
    skip: tuple[str, ...], left: int, skipped: object, tmp_path: Path
) -> None:
    """By the ends of their names, or of the modules around them. Fails if a name matches as a part
    of a word, or the head (skipped anyway) counts as a name that fits nothing."""
    assert callable(skipped)
    folder = save("llama", tmp_path)
    model = hf.load_model(str(folder), recipe=NF4, skip=skip, dtype=torch.float32)
    packed = [n for n, m in model.named_modules() if isinstance(m, QuantLinear)]
    assert len(packed) == left
    assert not [name for name in packed if skipped(name)]
    assert model.decal_base.skip_modules == skip
    assert quantizable_modules(build("llama"), skip) == packed


@pytest.mark.parametrize(
    ("skip", "message", "hint"),
    [
        (("up_porj",), r"1 of 1 names .* `up_porj`", "did you mean `up_proj`?"),
        (("mlp", "proj"), r"1 of 2 names .* `proj`", "_proj`?"),
        (("embed_tokens",), r"1 of 1 names .* `embed_tokens`", "its layers are"),
    ],
)
def test_a_skip_that_fits_nothing_is_refused(
    skip: tuple[str, ...], message: str, hint: str, tmp_path: Path
) -> None:
    """Fails if a typo leaves everything quantized and nothing is said."""
    with pytest.raises(QuantError, match=message) as caught:
        hf.load_model(str(save("llama", tmp_path)), recipe=NF4, skip=skip)
    assert hint in (caught.value.hint or "")


def test_fused_experts_are_refused_with_their_share(tmp_path: Path) -> None:
    """F26: of a small mixture most parameters would stay 16-bit, and elsewhere nothing says so.
    Fails if the experts' parameters of three dimensions are not counted, or the refusal comes after
    the weights were read."""
    folder = save("qwen3_moe", tmp_path)
    held = sum(p.numel() for n, p in build("qwen3_moe").named_parameters() if p.ndim == 3)
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(QuantError, match=rf"would stay 16-bit|\({held:,} of") as caught:
        quantize_skeleton(build("qwen3_moe").to("meta"), NF4)
    assert f"({held:,} of" in caught.value.message
    assert "Experts" in caught.value.details[0]
    save("qwen3_moe", folder)
    with pytest.raises(QuantError, match="would stay 16-bit"):
        hf.load_model(str(folder), recipe=NF4)


def test_experts_that_were_meant_to_stay_are_no_error(tmp_path: Path) -> None:
    """Named in skip_modules they keep 16 bits, and what is left is said. Fails if there is no way
    to quantize the rest."""
    folder = save("qwen3_moe", tmp_path)
    model = hf.load_model(str(folder), recipe=NF4, skip=("experts",), dtype=torch.float32)
    assert any(isinstance(m, QuantLinear) for m in model.modules())
    (line,) = left_unquantized(model)
    assert "experts" in line


def test_what_stays_16_bit_is_said_above_five_percent() -> None:
    """A large vocabulary on a small model. Fails if tied weights count twice, or norms are named
    that hold nothing."""
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    shape = {**sizes, "num_attention_heads": 4, "num_key_value_heads": 4}
    said = {}
    for vocabulary in (8, 1024):
        config = LlamaConfig(**shape, vocab_size=vocabulary, tie_word_embeddings=True)
        with torch.device("meta"):
            model = LlamaForCausalLM(config)
        model.tie_weights()
        assert left_unquantized(model) == []
        quantize_skeleton(model, NF4)
        said[vocabulary] = left_unquantized(model)
    linear = 2 * (4 * 64 * 64 + 3 * 64 * 128)
    rest = 1024 * 64 + 5 * 64
    assert said[8] == []
    share, embedding = (100 * n / (rest + linear) for n in (rest, 1024 * 64))
    assert said[1024] == [
        f"not quantized: {share:.0f} % of the parameters (model.embed_tokens {embedding:.0f} %)"
    ]


@pytest.mark.parametrize("name", [n for n, tiny in ZOO.items() if tiny.causal and not tiny.experts])
def test_every_architecture_is_quantized_whole(name: str) -> None:
    """All linear layers but the head. Fails if an architecture's layers are of a class that is not
    known, and stay 16-bit unsaid."""
    model = build(name)
    head = model.get_output_embeddings()
    linear = [
        n
        for n, m in model.named_modules()
        if (isinstance(m, nn.Linear) or type(m) is Conv1D) and m is not head
    ]
    assert quantizable_modules(model) == linear
    assert linear


@pytest.mark.parametrize("name", [n for n, tiny in ZOO.items() if not tiny.causal])
def test_the_head_of_a_classifier_stays_plain(name: str) -> None:
    """It is trained whole. Fails if BERT's pooler, which lies in the model proper, is packed."""
    names = quantizable_modules(build(name))
    assert names
    assert not [n for n in names if "pooler" in n or n.startswith(("classifier", "score"))]
