"""What must not stay behind: half an attach, a shared head, a share of dropout, a path's `~`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from decal.config import LoraConfig
from decal.errors import AdapterError, QuantError
from decal.model import hf, inject, switches
from decal.model.inject import attach, detach
from decal.quant.base import Recipe
from decal.verbs.in_place import merge_in_place

CONFIG = LoraConfig(r=3, lora_alpha=7, init_lora_weights=False)


def tiny(tied: bool = True) -> Any:
    torch.manual_seed(4)
    config = LlamaConfig(
        hidden_size=36,
        intermediate_size=52,
        num_hidden_layers=1,
        num_attention_heads=6,
        num_key_value_heads=2,
        vocab_size=61,
        tie_word_embeddings=tied,
    )
    return LlamaForCausalLM(config).eval()


def test_a_word_of_torchs_is_no_name() -> None:
    """Mutation: drop the check; ModuleDict then raises KeyError half way."""
    with pytest.raises(AdapterError, match="keys"):
        attach(tiny(), CONFIG, "keys")


def test_a_failed_attach_leaves_the_model_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    """Mutation: drop the except branch of attach."""
    model = tiny()
    before = [(name, type(module)) for name, module in model.named_modules()]

    def full(*_: Any) -> None:
        raise MemoryError

    monkeypatch.setattr(inject, "_check_attached", full)
    with pytest.raises(MemoryError):
        attach(model, CONFIG)
    assert [(name, type(module)) for name, module in model.named_modules()] == before
    assert all(p.requires_grad for p in model.parameters())
    assert "decal_adapters" not in model.__dict__


def test_a_wrapped_model_is_not_saved_whole(tmp_path: Path) -> None:
    """Mutation: leave save_pretrained as it is; it writes `base_layer.weight`."""
    model = tiny()
    attach(model, CONFIG)
    model.save_pretrained(tmp_path / "out")
    files = sorted(file.name for file in (tmp_path / "out").iterdir())
    assert files == ["adapter_config.json", "adapter_model.safetensors"]
    assert not any("base_layer" in key for key in load_file(tmp_path / "out" / files[1]))
    detach(model)
    model.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").exists()


def test_merging_a_tied_head_leaves_the_embedding(tmp_path: Path) -> None:
    """Mutation: write the sum into the shared parameter."""
    model = tiny().double()
    ids = torch.arange(9)[None]
    attach(model, CONFIG.model_copy(update={"target_modules": ("lm_head",)}))
    with torch.no_grad():
        wanted = model(ids).logits
        merge_in_place(model)
        assert float((model(ids).logits - wanted).abs().max()) < 1e-9 * float(wanted.abs().max())
        model.save_pretrained(tmp_path)
        again = LlamaForCausalLM.from_pretrained(tmp_path, dtype=torch.float64)
        assert torch.equal(again(ids).logits, model(ids).logits)


def test_dropout_of_any_name_is_off_and_comes_back() -> None:
    """Mutation: know `dropout` and `attention_dropout` only."""
    module = nn.Module()
    module.hidden_dropout, module.attn_pdrop = 0.1, 0.2  # type: ignore[assignment]
    with switches.without_dropout(module):
        assert module.hidden_dropout == module.attn_pdrop == 0.0
    assert (module.hidden_dropout, module.attn_pdrop) == (0.1, 0.2)


def test_home_is_written_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Mutation: give transformers the path as it is."""
    tiny().save_pretrained(tmp_path / "base")
    monkeypatch.setenv("HOME", str(tmp_path))
    model = hf.load_model("~/base", dtype=torch.float32, device="cpu")
    assert torch.equal(model.lm_head.weight, tiny().lm_head.weight)


def test_a_weight_that_cannot_be_packed_is_named(tmp_path: Path) -> None:
    """Mutation: let the error pass through transformers, which drops its text."""
    model = tiny()
    model.model.layers[0].mlp.up_proj.weight.data[3, 5] = torch.nan
    model.save_pretrained(tmp_path)
    with pytest.raises(QuantError, match="1 weights") as error:
        hf.load_model(str(tmp_path), device="cpu", recipe=Recipe(format="nf4"))
    assert "up_proj" in error.value.details[0]
