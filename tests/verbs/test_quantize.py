"""`decal quantize` and `decal dequantize` without bitsandbytes: bytes, files, refusals."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from decal.config import QuantConfig
from decal.errors import BaseModelError, DecalError, OutputError, QuantError, StorageError
from decal.model import hf
from decal.quant import FORMATS, Recipe
from decal.quant.linear import QuantLinear
from decal.verbs import quantize as verb
from decal.verbs.quantize import dequantize, quantize
from decal.weights import rewrite


def save(path: Path, family: str = "llama", shard: str = "5GB") -> Path:
    torch.manual_seed(7)
    if family == "gpt2":
        gpt2 = GPT2Config(n_embd=48, n_layer=2, n_head=4, vocab_size=99, n_positions=64)
        model: Any = GPT2LMHeadModel(gpt2)
    else:
        config = LlamaConfig(
            hidden_size=48,
            intermediate_size=80,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            vocab_size=99,
            tie_word_embeddings=False,
        )
        model = LlamaForCausalLM(config)
    model.to(torch.bfloat16).save_pretrained(path, max_shard_size=shard)
    (path / "tokenizer.json").write_text("{}", encoding="utf-8")
    return path


def recipe(quant: QuantConfig) -> Recipe:
    return Recipe(format=quant.format, block_size=quant.block_size, double=quant.double)


@pytest.mark.parametrize("kept", [1 << 30, 0], ids=["kept", "made again"])
@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("format", FORMATS)
def test_the_folder_holds_what_loading_makes(
    family: str, format: str, double: bool, kept: int, tmp_path: Path, monkeypatch: Any
) -> None:
    """Same identity as quantizing while loading, and dequantizing gives the weights it computes
    with. Blocks straddle rows. Fails if a weight is packed in another dtype or orientation, or a
    result that was made again belongs to another weight."""
    monkeypatch.setattr(rewrite, "_KEPT", kept)
    source = save(tmp_path / "m", family)
    quant = QuantConfig(format=format, block_size=128, double=double)  # type: ignore[arg-type]
    done = quantize(source, tmp_path / "q", quant)
    loaded = hf.load_model(str(source), recipe=recipe(quant))
    stored = hf.load_model(str(tmp_path / "q"))
    assert hf.quantizer_identity(stored) == hf.quantizer_identity(loaded)
    assert done.layers == len([m for m in loaded.modules() if isinstance(m, QuantLinear)])
    dequantize(tmp_path / "q", tmp_path / "p")
    plain = hf.load_model(str(tmp_path / "p"))
    for name, layer in loaded.named_modules():
        if isinstance(layer, QuantLinear):
            weight = plain.get_submodule(name).weight
            assert torch.equal(weight.T if family == "gpt2" else weight, layer.weight()), name
    assert "quantization_config" not in json.loads((tmp_path / "p" / "config.json").read_text())


def test_sharded_stays_sharded_and_side_files_come_along(tmp_path: Path) -> None:
    """Fails if the index lists a tensor in a file where it is not, or one is lost."""
    source = save(tmp_path / "m", shard="20KB")
    before = sorted(f.name for f in source.glob("*.safetensors"))
    assert len(before) > 2
    quantize(source, tmp_path / "q", QuantConfig(format="nf4"))
    dequantize(tmp_path / "q", tmp_path / "p")
    for out in (tmp_path / "q", tmp_path / "p"):
        assert sorted(f.name for f in out.glob("*.safetensors")) == before
        assert (out / "tokenizer.json").exists()
        index = json.loads((out / "model.safetensors.index.json").read_text())
        for name in before:
            listed = {key for key, file in index["weight_map"].items() if file == name}
            assert set(load_file(out / name)) == listed
    assert not [f for f in tmp_path.iterdir() if f.name not in ("m", "q", "p")]


def test_dtype_is_what_was_asked_for(tmp_path: Path) -> None:
    """Fails if what is not quantized keeps its dtype, or the config does not say so."""
    source = save(tmp_path / "m")
    quantize(source, tmp_path / "q", QuantConfig(format="fp4"), dtype="fp16")
    tensors = load_file(tmp_path / "q" / "model.safetensors")
    config = json.loads((tmp_path / "q" / "config.json").read_text())
    assert tensors["lm_head.weight"].dtype == torch.float16
    assert config["dtype"] == config["quantization_config"]["bnb_4bit_compute_dtype"] == "float16"
    dequantize(tmp_path / "q", tmp_path / "p", dtype="fp32")
    plain = load_file(tmp_path / "p" / "model.safetensors")
    assert {tensor.dtype for tensor in plain.values()} == {torch.float32}


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("format", FORMATS)
def test_a_stored_model_computes_in_the_dtype_asked_for(
    format: str, family: str, tmp_path: Path
) -> None:
    """Biases, norms and embeddings are cast, codes and scales are not. Fails if what lies beside
    the codes keeps the file's dtype, as transformers leaves it, or float32 scales are rounded."""
    quant = QuantConfig(format=format, double=False)  # type: ignore[arg-type]
    quantize(save(tmp_path / "m", family), tmp_path / "q", quant)
    first, other = (
        hf.load_model(str(tmp_path / "q"), dtype=dtype) for dtype in (torch.bfloat16, torch.float32)
    )
    assert hf.quantizer_identity(first) == hf.quantizer_identity(other)
    ids = torch.arange(3, 20)[None]
    for model, dtype in ((first, torch.bfloat16), (other, torch.float32)):
        assert model(ids).logits.dtype == model.dtype == dtype
        for name, module in model.named_modules():
            if isinstance(module, QuantLinear):
                assert module.compute_dtype == dtype
                assert module.bias is None or module.bias.dtype == dtype
            else:
                own = list(module.parameters(recurse=False))
                assert all(p.dtype == dtype for p in own), name


def test_skipped_modules_stay_plain_and_are_named(tmp_path: Path) -> None:
    """Fails if transformers would expect them quantized, or a wrong name passes."""
    source = save(tmp_path / "m")
    quantize(source, tmp_path / "q", QuantConfig(format="nf4", skip_modules=("mlp", "layers.0")))
    config = json.loads((tmp_path / "q" / "config.json").read_text())
    skipped = config["quantization_config"]["llm_int8_skip_modules"]
    assert "model.layers.0.self_attn.q_proj" in skipped
    assert "model.layers.1.mlp.up_proj" in skipped
    assert "lm_head" in skipped
    assert len(skipped) == 1 + 7 + 3
    loaded = hf.load_model(str(tmp_path / "q"))
    packed = {name for name, m in loaded.named_modules() if isinstance(m, QuantLinear)}
    assert packed == {f"model.layers.1.self_attn.{x}_proj" for x in "qkvo"}
    with pytest.raises(QuantError, match=r"1 of 2 names .* `mpl`") as caught:
        quantize(source, tmp_path / "x", QuantConfig(format="nf4", skip_modules=("mpl", "mlp")))
    assert caught.value.hint == "did you mean `mlp`?"


def test_what_cannot_be_done_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    """Fails if codes are quantized again, or a folder is replaced unasked."""
    source = save(tmp_path / "m")
    quantize(source, tmp_path / "q", QuantConfig(format="nf4"))
    refusals: list[tuple[type[DecalError], str, Any]] = [
        (
            BaseModelError,
            "quantized already",
            lambda: quantize(tmp_path / "q", tmp_path / "x", NF4),
        ),
        (BaseModelError, "not stored quantized", lambda: dequantize(source, tmp_path / "x")),
        (QuantError, "needs a format", lambda: quantize(source, tmp_path / "x", QuantConfig())),
        (OutputError, "not empty", lambda: quantize(source, tmp_path / "q", NF4)),
        (OutputError, "not empty", lambda: dequantize(tmp_path / "q", source)),
        (OutputError, "holds the model", lambda: quantize(source, source, NF4, force=True)),
    ]
    for kind, message, call in refusals:
        with pytest.raises(kind, match=message):
            call()
    assert not (tmp_path / "x").exists()
    quantize(source, tmp_path / "q", QuantConfig(format="int8"), force=True)
    assert hf.load_model(str(tmp_path / "q")).decal_base.recipe.format == "int8"


NF4 = QuantConfig(format="nf4")


@pytest.mark.parametrize(("kept", "times"), [(1 << 30, 1), (0, 2)])
def test_a_weight_is_packed_at_most_twice(
    kept: int, times: int, tmp_path: Path, monkeypatch: Any
) -> None:
    """Once for its wide tensors and once for its bytes where nothing can be kept between. Fails if
    it is packed anew for each of its six tensors."""
    source, count = save(tmp_path / "m"), 0
    real = verb.to_bnb

    def counted(*args: Any, **settings: Any) -> Any:
        nonlocal count
        count += 1
        return real(*args, **settings)

    monkeypatch.setattr(verb, "to_bnb", counted)
    monkeypatch.setattr(rewrite, "_KEPT", kept)
    done = quantize(source, tmp_path / "q", NF4)
    assert count == times * done.layers


def test_a_full_disk_is_said_before_writing(tmp_path: Path, monkeypatch: Any) -> None:
    """Fails if the space is not asked for."""

    def refuse(_out: Path, needed: int) -> None:
        raise StorageError(f"{needed} bytes needed")

    source = save(tmp_path / "m")
    monkeypatch.setattr(rewrite, "require_space", refuse)
    with pytest.raises(StorageError, match="bytes needed"):
        quantize(source, tmp_path / "q", NF4)
    assert not (tmp_path / "q").exists()


def test_the_way_is_reported_in_bytes(tmp_path: Path) -> None:
    """Fails if reading again is not counted, or a tensor twice."""
    seen: list[tuple[int, int]] = []
    done = quantize(save(tmp_path / "m"), tmp_path / "q", NF4, observe=lambda *x: seen.append(x))
    assert seen[-1] == (2 * done.nbytes, 2 * done.nbytes)
    assert seen == sorted(seen)
    stored = load_file(tmp_path / "q" / "model.safetensors")
    assert done.nbytes == sum(t.nbytes for t in stored.values())
    assert 4 < done.bits_per_weight < 9
    assert "lm_head" in done.left[0]


def test_a_weight_that_cannot_be_held_leaves_nothing(tmp_path: Path) -> None:
    """Fails if a half-written folder stays, or the weight is not named."""
    source = save(tmp_path / "m")
    model = LlamaForCausalLM.from_pretrained(source, dtype=torch.float32)
    model.model.layers[1].mlp.up_proj.weight.data[3, 5] = 1e6
    model.save_pretrained(source)
    with pytest.raises(QuantError, match=r"layers\.1\.mlp\.up_proj\.weight` cannot be quantized"):
        quantize(source, tmp_path / "q", QuantConfig(format="int8"))
    assert [f.name for f in tmp_path.iterdir()] == ["m"]
