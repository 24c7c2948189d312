"""PEFT's own files are read by us, ours are read by PEFT, with the same tensors and scaling."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from decal.config import LoraConfig
from decal.errors import AdapterError
from decal.store.peft import LoraTensors, PeftAdapter, read_adapter, write_adapter

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.interop

TARGETS = ("q_proj", "v_proj", "down_proj")


def _model() -> PreTrainedModel:
    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=61,
        hidden_size=36,
        intermediate_size=51,
        num_hidden_layers=2,
        num_attention_heads=3,
        num_key_value_heads=1,
    )
    return AutoModelForCausalLM.from_config(config)


def _theirs(folder: Path, **settings: Any) -> Any:
    defaults = {
        "r": 3,
        "lora_alpha": 7,
        "lora_dropout": 0.1,
        "target_modules": list(TARGETS),
        "task_type": "CAUSAL_LM",
        "init_lora_weights": False,
    }
    model = peft.get_peft_model(_model(), peft.LoraConfig(**{**defaults, **settings}))
    model.save_pretrained(folder)
    return model


def _layers(model: Any) -> dict[str, Any]:
    return {
        name.removeprefix("base_model.model."): module
        for name, module in model.named_modules()
        if hasattr(module, "lora_A") and len(module.lora_A)
    }


def _same(model: Any, adapter: PeftAdapter) -> None:
    layers = _layers(model)
    assert layers.keys() == adapter.tensors.keys()
    for name, layer in layers.items():
        assert torch.equal(layer.lora_A["default"].weight, adapter.tensors[name].A)
        assert torch.equal(layer.lora_B["default"].weight, adapter.tensors[name].B)
        assert layer.scaling["default"] == adapter.config.scaling


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"use_rslora": True},
        {"target_modules": "all-linear"},
        {"target_modules": r".*layers\.1.*(q|k)_proj"},
        {"layers_to_transform": [1], "exclude_modules": ["v_proj"]},
        {"task_type": None, "lora_alpha": 7.5},
        {"r": 4, "lora_alpha": 8, "init_lora_weights": "orthogonal"},
        {"target_modules": ["q_proj", "does_not_exist"]},
    ],
    ids=str,
)
def test_theirs_is_read_by_us(tmp_path: Path, settings: dict[str, Any]) -> None:
    """Fails if the scaling ignores use_rslora, or if A and B are swapped."""
    model = _theirs(tmp_path / "a", **settings)
    _same(model, read_adapter(tmp_path / "a"))


def _ours(**changes: Any) -> PeftAdapter:
    settings = {"r": 3, "lora_alpha": 7, "lora_dropout": 0.1, "target_modules": TARGETS}
    config = LoraConfig(**{**settings, **changes})
    shapes = {"q_proj": (36, 36), "v_proj": (12, 36), "down_proj": (36, 51)}
    tensors = {}
    for i in range(2):
        for name, (out, inner) in shapes.items():
            part = "mlp" if name == "down_proj" else "self_attn"
            pair = LoraTensors(torch.randn(3, inner), torch.randn(out, 3))
            tensors[f"model.layers.{i}.{part}.{name}"] = pair
    return PeftAdapter(
        config=config,
        tensors=tensors,
        metadata={"decal.base": "abc"},
        base_model_name_or_path="org/base",
    )


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"use_rslora": True},
        {"target_modules": "all-linear"},
        {"target_modules": r".*\.(q|v|down)_proj"},
        {"lora_alpha": 7.5},
    ],
    ids=str,
)
def test_ours_is_read_by_peft(
    tmp_path: Path, changes: dict[str, Any], recwarn: pytest.WarningsRecorder
) -> None:
    """Fails if the prefix is left out: peft then loads nothing and only warns."""
    adapter = _ours(**changes)
    write_adapter(tmp_path / "a", adapter)
    config = peft.PeftConfig.from_pretrained(tmp_path / "a")
    assert config.base_model_name_or_path == "org/base"
    assert (config.r, config.lora_alpha) == (3, adapter.config.lora_alpha)
    model = peft.PeftModel.from_pretrained(_model(), tmp_path / "a")
    _same(model, adapter)
    told = [str(w.message) for w in recwarn if "is_gradient_checkpointing" not in str(w.message)]
    assert not [t for t in told if "adapter" in t or "keyword" in t or "missing" in t]


def test_there_and_back_again_computes_the_same(tmp_path: Path) -> None:
    """theirs -> ours -> theirs, to the bit in the logits. Fails if any setting is lost on the
    way that changes what is computed (use_rslora here)."""
    model = _theirs(tmp_path / "a", use_rslora=True).eval()
    write_adapter(tmp_path / "b", read_adapter(tmp_path / "a"))
    again = peft.PeftModel.from_pretrained(_model(), tmp_path / "b").eval()
    ids = torch.arange(1, 13)[None]
    with torch.no_grad():
        expected, found, plain = (m(ids).logits for m in (model, again, _model()))
    assert torch.equal(found, expected)
    assert (expected - plain).abs().max() > 0.1


@pytest.mark.parametrize(
    ("settings", "word"),
    [
        ({"use_dora": True}, "use_dora"),
        ({"bias": "lora_only"}, "bias"),
        ({"lora_bias": True}, "lora_bias"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"rank_pattern": {"q_proj": 5}}, "rank_pattern"),
        ({"alpha_pattern": {"q_proj": 5}}, "alpha_pattern"),
        ({"trainable_token_indices": [1, 2]}, "trainable_token_indices"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights"),
        ({"init_lora_weights": "olora"}, "init_lora_weights"),
        ({"target_modules": ["embed_tokens", "q_proj"]}, "on an embedding"),
        ({"target_modules": ["lm_head", "q_proj"]}, "a copy of the base's own weight"),
    ],
    ids=str,
)
def test_variants_of_theirs_are_refused_by_name(
    tmp_path: Path, settings: dict[str, Any], word: str
) -> None:
    _theirs(tmp_path / "a", **settings)
    with pytest.raises(AdapterError, match=word):
        read_adapter(tmp_path / "a")


def test_their_other_methods_are_refused(tmp_path: Path) -> None:
    config = peft.IA3Config(task_type="CAUSAL_LM")
    peft.get_peft_model(_model(), config).save_pretrained(tmp_path / "a")
    with pytest.raises(AdapterError, match="peft_type 'IA3'"):
        read_adapter(tmp_path / "a")


def test_a_named_adapter_lies_in_a_folder_below(tmp_path: Path) -> None:
    config = peft.LoraConfig(r=3, target_modules=["q_proj"], task_type="CAUSAL_LM")
    peft.get_peft_model(_model(), config, adapter_name="sql").save_pretrained(tmp_path / "a")
    with pytest.raises(AdapterError) as caught:
        read_adapter(tmp_path / "a")
    assert "sql" in str(caught.value.hint)
    assert len(read_adapter(tmp_path / "a" / "sql").tensors) == 2
