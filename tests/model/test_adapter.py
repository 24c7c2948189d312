from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig

from decal.config import LoraConfig
from decal.errors import AdapterError, OutputError
from decal.model.adapter import Adapter
from decal.model.inject import adapter_state, attach

CONFIG = LoraConfig(r=3, lora_alpha=5, lora_dropout=0.1, use_rslora=True, init_lora_weights=False)


def model(config: Any = None) -> Any:
    torch.manual_seed(1)
    config = config or LlamaConfig(
        hidden_size=36,
        intermediate_size=52,
        num_hidden_layers=1,
        num_attention_heads=6,
        num_key_value_heads=2,
        vocab_size=61,
    )
    return AutoModelForCausalLM.from_config(config)


def test_round_trip_through_a_model_and_a_folder(tmp_path: Path) -> None:
    """Equal to the bit. Mutation: swap A and B of one module."""
    first, second = model(), model()
    attach(first, CONFIG, "a", seed=3)
    adapter = Adapter.from_model(first, "a", base="org/base", metadata={"decal.base": "{}"})
    adapter.save_pretrained(tmp_path / "out")
    read = Adapter.from_pretrained(tmp_path / "out")
    assert (read.base, read.metadata) == ("org/base", {"decal.base": "{}"})
    assert read.source == str(tmp_path / "out")
    assert read.config.scaling == CONFIG.scaling
    attach(second, read, "b")
    for name, parts in adapter_state(second, "b").items():
        assert torch.equal(parts.A, adapter_state(first, "a")[name].A)
        assert torch.equal(parts.B, adapter_state(first, "a")[name].B)


def test_from_model_copies() -> None:
    """Mutation: hand out the parameters themselves; going on training would change the adapter."""
    net = model()
    attach(net, CONFIG)
    adapter = Adapter.from_model(net)
    name, (A, *_) = next(iter(adapter.tensors.items()))
    before = A.clone()
    with torch.no_grad():
        adapter_state(net)[name].A.add_(1)
    assert torch.equal(A, before)
    assert not A.requires_grad
    with pytest.raises(AdapterError, match="no adapter `x`"):
        Adapter.from_model(net, "x")


def test_conv1d_bases_say_fan_in_fan_out(tmp_path: Path) -> None:
    net = model(GPT2Config(n_embd=36, n_layer=1, n_head=4, vocab_size=61))
    attach(net, CONFIG)
    assert Adapter.from_model(net).fan_in_fan_out
    net = model()
    attach(net, CONFIG)
    assert not Adapter.from_model(net).fan_in_fan_out


def test_saving_does_not_overwrite_unasked(tmp_path: Path) -> None:
    net = model()
    attach(net, CONFIG)
    adapter = Adapter.from_model(net)
    adapter.save_pretrained(tmp_path / "out")
    with pytest.raises(OutputError):
        adapter.save_pretrained(tmp_path / "out")
    adapter.save_pretrained(tmp_path / "out", force=True)


def test_repr_says_what_matters() -> None:
    net = model()
    attach(net, LoraConfig(r=3, lora_alpha=5, target_modules=("q_proj", "v_proj")))
    adapter = Adapter.from_model(net, base="org/<base>")
    text = (
        "Adapter(base=org/<base>, r=3, lora_alpha=5, scaling=1.66667, lora_dropout=0.05, "
        "modules=2 (q_proj, v_proj), parameters=360)"
    )
    assert repr(adapter) == text
    html = adapter._repr_html_()
    assert ">org/&lt;base&gt;</td>" in html
    assert html.count("<tr>") == 7


def test_every_part_is_copied_counted_and_named(tmp_path: Path) -> None:
    """Mutations: hand out the head itself; leave biases out of the count."""
    net = model()
    config = LoraConfig(
        r=3,
        lora_alpha=6,
        target_modules=("q_proj", "v_proj"),
        rank_pattern={"v_proj": 2},
        lora_bias=True,
        modules_to_save=("model.norm",),
    )
    attach(net, config)
    adapter = Adapter.from_model(net, base="org/base", task_type="SEQ_CLS")
    with torch.no_grad():
        net.get_submodule("model.norm").adapters["default"].weight.add_(1)
    assert torch.equal(adapter.full["model.norm.weight"], torch.ones(36))
    assert adapter.parameters == 3 * 72 + 36 + 2 * 48 + 12 + 36
    assert repr(adapter) == (
        "Adapter(base=org/base, r=2 to 3, lora_alpha=6, scaling=2 to 3, lora_dropout=0.05, "
        "modules=2 (q_proj, v_proj), trained whole=model.norm.weight, parameters=396)"
    )
    adapter.save_pretrained(tmp_path / "out")
    read = Adapter.from_pretrained(tmp_path / "out")
    assert (read.task_type, read.parameters) == ("SEQ_CLS", 396)
    (tmp_path / "out" / "notes.txt").write_text("mine")
    adapter.save_into(tmp_path / "out")
    assert (tmp_path / "out" / "notes.txt").exists()
