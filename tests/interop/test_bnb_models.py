"""Whole models against the real transformers + bitsandbytes on the CPU, in both directions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

from decal.config import QuantConfig
from decal.errors import DecalError, QuantError
from decal.model import hf
from decal.model.quantizer import quantizable_modules
from decal.quant.base import Recipe
from decal.quant.linear import QuantLinear
from decal.verbs.quantize import dequantize, quantize

bnb = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
pytestmark = [
    pytest.mark.interop,
    pytest.mark.filterwarnings("ignore:.*MatMul8bitLt.*"),
]

WAYS: dict[str, dict[str, Any]] = {
    "nf4 double": {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
    },
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "fp4 double": {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "fp4",
        "bnb_4bit_use_double_quant": True,
    },
    "int8": {"load_in_8bit": True},
}
RECIPES = {
    "nf4 double": Recipe(format="nf4"),
    "nf4": Recipe(format="nf4", double=False),
    "fp4 double": Recipe(format="fp4"),
    "int8": Recipe(format="int8"),
}
FAMILIES = ["llama", "gpt2"]


def build(family: str) -> Any:
    torch.manual_seed(5)
    if family == "gpt2":
        config = GPT2Config(n_embd=64, n_layer=2, n_head=4, vocab_size=99, n_positions=64)
        model: Any = GPT2LMHeadModel(config)
    else:
        llama = LlamaConfig(
            hidden_size=64,
            intermediate_size=192,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            vocab_size=99,
            tie_word_embeddings=False,
        )
        model = LlamaForCausalLM(llama)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter, std=0.1)
    return model.to(torch.bfloat16)


@pytest.fixture(scope="module", params=FAMILIES)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path: Path = tmp_path_factory.mktemp("plain") / request.param
    build(request.param).save_pretrained(path)
    return path


def theirs(path: Path, **settings: Any) -> Any:
    """What transformers and bitsandbytes load from `path`, quantizing it if asked."""
    # None would be taken for "not quantized", whatever the folder says.
    asked = {"quantization_config": BitsAndBytesConfig(**settings)} if settings else {}
    return AutoModelForCausalLM.from_pretrained(
        path, dtype=torch.bfloat16, device_map="cpu", **asked
    )


def their_weight(module: Any) -> torch.Tensor:
    """A bitsandbytes layer's dequantized [out, in] weight in bfloat16."""
    F = bnb.functional
    if isinstance(module, bnb.nn.Linear4bit):
        return F.dequantize_4bit(module.weight.data, module.weight.quant_state)
    scales = module.weight.SCB if module.weight.SCB is not None else module.state.SCB
    return F.int8_vectorwise_dequant(module.weight.data, scales).to(torch.bfloat16)


def compare(ours: Any, other: Any) -> None:
    """Same layers quantized, same dequantized weights bit for bit, everything else equal."""
    kinds = (bnb.nn.Linear4bit, bnb.nn.Linear8bitLt)
    packed = {n for n, m in other.named_modules() if isinstance(m, kinds)}
    assert packed
    assert {n for n, m in ours.named_modules() if isinstance(m, QuantLinear)} == packed
    for name in packed:
        layer = ours.get_submodule(name)
        module = other.get_submodule(name)
        assert torch.equal(layer.weight(), their_weight(module)), name
        assert (layer.bias is None) == (module.bias is None)
        if layer.bias is not None:
            assert torch.equal(layer.bias, module.bias), name
            assert layer.bias.dtype == torch.bfloat16
    rest = {n: p for n, p in ours.named_parameters() if n.rpartition(".")[0] not in packed}
    for name, parameter in rest.items():
        given = other.get_parameter(name)
        assert torch.equal(parameter, given), name
        assert parameter.dtype == given.dtype == torch.bfloat16


@pytest.mark.parametrize("way", WAYS)
def test_their_folder_is_loaded_as_it_is(folder: Path, way: str, tmp_path: Path) -> None:
    """Every layer holds the file's weights to the bit, and the recipe is told. Fails if a weight is
    quantized anew, Conv1D is transposed twice, or plain tensors are taken for quantized ones."""
    model = theirs(folder, **WAYS[way])
    model.save_pretrained(tmp_path / "q")
    ours = hf.load_model(str(tmp_path / "q"))
    compare(ours, model)
    assert ours.decal_base.recipe == RECIPES[way]
    gpt2 = folder.name == "gpt2"
    packed = [m for m in ours.modules() if isinstance(m, QuantLinear)]
    assert all(m.transposed_source == gpt2 for m in packed)
    same = hf.load_model(str(tmp_path / "q"), recipe=RECIPES[way])
    assert hf.quantizer_identity(same) == hf.quantizer_identity(ours)
    ids = torch.arange(1, 30)[None]
    with torch.no_grad():
        a, b = ours(input_ids=ids).logits.float(), model(input_ids=ids).logits.float()
    assert (a - b).norm() <= 0.03 * b.norm()


def test_another_format_than_the_stored_is_refused(folder: Path, tmp_path: Path) -> None:
    """Fails if codes are quantized a second time, or the wish is ignored."""
    theirs(folder, **WAYS["nf4"]).save_pretrained(tmp_path / "q")
    with pytest.raises(QuantError, match="is stored as nf4, it cannot be loaded as int8"):
        hf.load_model(str(tmp_path / "q"), recipe=RECIPES["int8"])
    with pytest.raises(QuantError, match=r"stored as nf4, .* as nf4 with double quantization"):
        hf.load_model(str(tmp_path / "q"), recipe=RECIPES["nf4 double"])


def test_their_skipped_modules_stay_plain(folder: Path, tmp_path: Path) -> None:
    """Fails if a layer that the file holds in 16 bits is expected to be quantized."""
    skip = ["lm_head", "mlp"]
    model = theirs(folder, **WAYS["nf4 double"], llm_int8_skip_modules=skip)
    model.save_pretrained(tmp_path / "q")
    ours = hf.load_model(str(tmp_path / "q"))
    compare(ours, model)
    with pytest.raises(QuantError, match=r"layers that quant\.skip_modules names are stored"):
        hf.load_model(str(tmp_path / "q"), recipe=RECIPES["nf4 double"], skip=["attn", "self_attn"])


@pytest.mark.parametrize("way", ["nf4", "int8"])
def test_quantizing_a_model_is_the_same_as_theirs(folder: Path, way: str) -> None:
    """Ours from the 16-bit folder against theirs, without double quantization (whose scales differ
    by design). Fails if Conv1D is packed as it lies in the file."""
    ours = hf.load_model(str(folder), recipe=RECIPES[way])
    other = theirs(folder, **WAYS[way])
    compare(ours, other)
    assert len(quantizable_modules(ours)) == len(
        [m for m in ours.modules() if isinstance(m, QuantLinear)]
    )


@pytest.mark.parametrize("way", WAYS)
def test_our_folder_is_loaded_by_them(folder: Path, way: str, tmp_path: Path) -> None:
    """`quantize` writes what transformers + bitsandbytes load, to the bit; ours reads it too, and
    its identity is that of quantizing while loading. Fails if a key, the JSON or the config is not
    theirs, or a weight is stored in the orientation of the plain file."""
    recipe = RECIPES[way]
    quant = QuantConfig(format=recipe.format, double=recipe.double)
    quantize(folder, tmp_path / "q", quant)
    other = theirs(tmp_path / "q")
    ours = hf.load_model(str(tmp_path / "q"))
    compare(ours, other)
    loaded = hf.load_model(str(folder), recipe=recipe)
    assert hf.quantizer_identity(ours) == hf.quantizer_identity(loaded)
    ids = torch.arange(1, 30)[None]
    with torch.no_grad():
        a, b = ours(input_ids=ids).logits.float(), other(input_ids=ids).logits.float()
    assert (a - b).norm() <= 0.03 * b.norm()


@pytest.mark.parametrize("way", WAYS)
def test_their_folder_is_dequantized(folder: Path, way: str, tmp_path: Path) -> None:
    """The plain folder holds their dequantized weights to the bit. Fails if GPT-2's weights stay
    [out, in], or the config still says quantized."""
    model = theirs(folder, **WAYS[way])
    model.save_pretrained(tmp_path / "q")
    dequantize(tmp_path / "q", tmp_path / "plain")
    plain = theirs(tmp_path / "plain")
    for name, module in plain.named_modules():
        other = model.get_submodule(name)
        if isinstance(other, (bnb.nn.Linear4bit, bnb.nn.Linear8bitLt)):
            weight = module.weight.T if type(module).__name__ == "Conv1D" else module.weight
            assert torch.equal(weight, their_weight(other)), name
    assert torch.equal(plain.lm_head.weight, model.lm_head.weight)


def test_a_folder_of_another_tool_is_refused(folder: Path, tmp_path: Path) -> None:
    """Fails if any quantization_config is taken for bitsandbytes'."""
    model = build(folder.name)
    model.config.quantization_config = {"quant_method": "gptq", "bits": 4}
    model.config.save_pretrained(tmp_path)
    build(folder.name).save_pretrained(tmp_path / "m")
    (tmp_path / "config.json").rename(tmp_path / "m" / "config.json")
    with pytest.raises(DecalError, match=r"stored quantized \(gptq\)"):
        hf.load_model(str(tmp_path / "m"))
