"""Loading: what transformers loads, quantized or not, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

from decal.errors import BaseModelError, DecalError
from decal.model import hf, names
from decal.model.quantizer import quantizable_modules
from decal.quant import quant_format
from decal.quant.base import Recipe
from decal.quant.linear import QuantLinear

NF4 = Recipe(format="nf4")
SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 99,
}


@pytest.fixture(scope="module", params=["llama", "qwen2"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(3)
    if request.param == "llama":
        model: Any = LlamaForCausalLM(LlamaConfig(**SIZES, tie_word_embeddings=True))
    else:
        model = Qwen2ForCausalLM(Qwen2Config(**SIZES, tie_word_embeddings=False))
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                nn.init.normal_(parameter)
    path = tmp_path_factory.mktemp(request.param)
    model.to(torch.bfloat16).save_pretrained(path)
    return path


def test_quantized_weights_are_the_files_weights_packed(folder: Path) -> None:
    """Every quantized layer holds exactly the packed file tensor, biases stay as they are.

    Mutation: quantize before the cast to the compute dtype, or skip a layer.
    """
    model = hf.load_model(str(folder), recipe=NF4)
    stored = load_file(folder / "model.safetensors")
    names = quantizable_modules(model)
    assert len(names) == 14
    for name in names:
        layer = model.get_submodule(name)
        assert isinstance(layer, QuantLinear)
        meant = quant_format("nf4").quantize(stored[f"{name}.weight"], NF4)
        for part, tensor in meant.parts.items():
            assert torch.equal(layer.packed.parts[part], tensor), (name, part)
        bias = stored.get(f"{name}.bias")
        assert (layer.bias is None) == (bias is None)
        if bias is not None:
            assert torch.equal(layer.bias, bias)
    assert not isinstance(model.lm_head, QuantLinear)
    assert model.get_input_embeddings().weight.dtype == torch.bfloat16


def test_quantized_model_computes_with_the_dequantized_weights(folder: Path) -> None:
    """Logits equal those of a plain model with dequantized weights, to float32 rounding.

    Mutation: return W^T from matmul, or drop the bias.
    """
    quantized = hf.load_model(str(folder), recipe=NF4, dtype=torch.float32)
    plain = hf.load_model(str(folder), dtype=torch.float32)
    with torch.no_grad():
        for name in quantizable_modules(quantized):
            layer = quantized.get_submodule(name)
            plain.get_submodule(name).weight.copy_(layer.weight())
        ids = torch.arange(12)[None]
        torch.testing.assert_close(quantized(ids).logits, plain(ids).logits, rtol=1e-5, atol=1e-6)


def test_same_modules_are_quantized_on_a_skeleton(folder: Path) -> None:
    skeleton = names.skeleton(str(folder))
    assert all(p.device.type == "meta" for p in skeleton.parameters())
    assert quantizable_modules(skeleton) == quantizable_modules(hf.load_model(str(folder)))


def test_quantizing_a_base_twice_gives_one_identity(folder: Path) -> None:
    """Mutation: hash without names or recipe."""
    first = hf.quantizer_identity(hf.load_model(str(folder), recipe=NF4))
    again = hf.quantizer_identity(hf.load_model(str(folder), recipe=NF4))
    other = hf.quantizer_identity(
        hf.load_model(str(folder), recipe=Recipe(format="nf4", block_size=32))
    )
    assert first == again
    assert first != other
    assert hf.quantizer_identity(hf.load_model(str(folder))) is None


def test_loading_is_quiet(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    hf.load_model(str(folder), recipe=NF4)
    captured = capfd.readouterr()
    assert captured.out == ""
    assert captured.err == ""


def _copy(folder: Path, out: Path, change: Any) -> Path:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    out.mkdir()
    save_file(tensors, out / "model.safetensors", {"format": "pt"})
    (out / "config.json").write_text((folder / "config.json").read_text())
    return out


LAYER = "model.layers.0.mlp.up_proj.weight"


@pytest.mark.parametrize("recipe", [None, NF4])
def test_a_missing_tensor_is_an_error(folder: Path, tmp_path: Path, recipe: Recipe | None) -> None:
    """transformers would fill the layer with random numbers and go on."""
    broken = _copy(folder, tmp_path / "m", lambda t: t.pop(LAYER))
    with pytest.raises(BaseModelError, match="does not fill") as caught:
        hf.load_model(str(broken), recipe=recipe)
    assert LAYER in str(caught.value)


def test_a_left_over_tensor_is_an_error(folder: Path, tmp_path: Path) -> None:
    broken = _copy(
        folder, tmp_path / "m", lambda t: t.update({"model.layers.0.odd": torch.ones(2)})
    )
    with pytest.raises(BaseModelError, match="does not fill"):
        hf.load_model(str(broken))


@pytest.mark.parametrize("recipe", [None, NF4])
def test_a_misshapen_tensor_is_an_error(folder: Path, tmp_path: Path, recipe: Any) -> None:
    broken = _copy(folder, tmp_path / "m", lambda t: t.update({LAYER: torch.ones(3, 64)}))
    with pytest.raises(BaseModelError) as caught:
        hf.load_model(str(broken), recipe=recipe)
    assert "[3, 64]" in str(caught.value)
    assert "[160, 64]" in str(caught.value)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda p: p / "nowhere", "no model at"),
        (lambda p: p / "file.txt", "is a file"),
        (lambda p: p / "empty", "no config.json"),
        (lambda p: p / "adapter", "is an adapter"),
    ],
)
def test_wrong_paths_are_named(tmp_path: Path, make: Any, says: str) -> None:
    (tmp_path / "file.txt").write_text("x")
    (tmp_path / "empty").mkdir()
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    with pytest.raises(BaseModelError, match=says):
        hf.load_model(str(make(tmp_path)))


def test_a_typo_in_the_path_is_answered_with_the_nearest_name(tmp_path: Path) -> None:
    (tmp_path / "smollm").mkdir()
    with pytest.raises(BaseModelError, match="did you mean") as caught:
        hf.load_model(str(tmp_path / "smolm"))
    assert "smollm" in str(caught.value)


def test_an_unknown_hub_id_without_network_says_so() -> None:
    with pytest.raises(BaseModelError, match="neither a folder nor") as caught:
        hf.load_model("nobody/nothing-at-all")
    assert caught.value.hint


def test_a_folder_that_only_says_it_is_quantized_is_refused(folder: Path, tmp_path: Path) -> None:
    """Fails if 16-bit weights pass as quantized ones, or are packed on the word of the config."""
    copied = _copy(folder, tmp_path / "m", lambda t: None)
    config = json.loads((copied / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (copied / "config.json").write_text(json.dumps(config))
    with pytest.raises(BaseModelError, match="says that it is stored quantized"):
        hf.load_model(str(copied), recipe=NF4)


def test_an_unknown_device_is_named() -> None:
    with pytest.raises(DecalError, match="is not a device"):
        hf.pick_device("gpu please")


def test_name_map_follows_historic_names(folder: Path) -> None:
    """gpt2 on the hub has no `transformer.` prefix; the map finds the weights all the same."""
    from transformers import GPT2Config, GPT2LMHeadModel

    with torch.device("meta"):
        gpt2 = GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=64, n_head=4, vocab_size=99))
    found = names.name_map(gpt2, ["h.0.attn.c_attn.weight", "wte.weight"])
    assert found["h.0.attn.c_attn.weight"] == "transformer.h.0.attn.c_attn.weight"
    assert found["wte.weight"] == "transformer.wte.weight"
    assert names.transposed_modules(gpt2) >= {"transformer.h.0.attn.c_attn"}
    skeleton = names.skeleton(str(folder))
    keys = sorted(load_file(folder / "model.safetensors"))
    assert names.name_map(skeleton, keys) == {key: key for key in keys}
