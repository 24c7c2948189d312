"""What goes into the merged folder beside the weights, and whose code may be run for it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from decal.config import LoraConfig
from decal.errors import BaseModelError
from decal.model.adapter import Adapter
from decal.store.peft import LoraTensors
from decal.verbs.merge import merge
from tests import zoo

CODE = """
from transformers import LlamaConfig, LlamaForCausalLM

class OddConfig(LlamaConfig):
    model_type = "odd"

class OddForCausalLM(LlamaForCausalLM):
    config_class = OddConfig
"""


def _adapter(folder: Path, **facts: Any) -> Path:
    tensors = {
        f"model.layers.{i}.self_attn.q_proj": LoraTensors(torch.randn(3, 54), torch.randn(60, 3))
        for i in range(2)
    }
    config = LoraConfig(r=3, lora_alpha=7, target_modules=("q_proj",))
    Adapter(config=config, tensors=tensors, **facts).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("own", ["none", "file", "settings"])
def test_the_template_of_training_comes_along(tmp_path: Path, own: str) -> None:
    """Where the base has one of its own, that stays. Fails if it is overwritten, or if the merged
    model has none."""
    base = zoo.save("llama", tmp_path / "base")
    zoo.tokenizer(chat=False).save_pretrained(base)
    (base / "chat_template.jinja").unlink(missing_ok=True)
    settings = base / "tokenizer_config.json"
    if own == "file":
        (base / "chat_template.jinja").write_text("own")
    elif own == "settings":
        settings.write_text(
            json.dumps({**json.loads(settings.read_text()), "chat_template": "own"})
        )
    adapter = _adapter(tmp_path / "a", metadata={"decal.chat_template": "trained {{ messages }}"})
    merge(str(base), adapter, tmp_path / "m")
    found = AutoTokenizer.from_pretrained(tmp_path / "m").chat_template
    assert found == ("trained {{ messages }}" if own == "none" else "own")


def test_the_facts_say_what_rounding_did(tmp_path: Path) -> None:
    base = zoo.save("llama", tmp_path / "base", torch.bfloat16)
    facts = merge(str(base), _adapter(tmp_path / "a"), tmp_path / "m").summary()
    assert facts["targeted"] == 2
    assert facts["replaced"] == 0
    assert facts["delta_kept_by_rounding"] == pytest.approx(1, abs=0.01)
    assert 0 <= facts["weights_unmoved_by_rounding"] < 0.05


def test_code_of_the_base_is_run_only_where_it_is_trusted(tmp_path: Path) -> None:
    """Its names come from its code. Fails if the flag does not reach the skeleton."""
    base = zoo.save("llama", tmp_path / "base")
    (base / "modeling_odd.py").write_text(CODE)
    config = json.loads((base / "config.json").read_text())
    config |= {
        "model_type": "odd",
        "auto_map": {
            "AutoConfig": "modeling_odd.OddConfig",
            "AutoModelForCausalLM": "modeling_odd.OddForCausalLM",
        },
    }
    (base / "config.json").write_text(json.dumps(config))
    adapter = _adapter(tmp_path / "a")
    with pytest.raises(BaseModelError):
        merge(str(base), adapter, tmp_path / "m")
    merge(str(base), adapter, tmp_path / "m", trust_remote_code=True)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "m", trust_remote_code=True)
    assert type(merged).__name__ == "OddForCausalLM"
