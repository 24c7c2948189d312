"""The base and the data of a run are those it began with, or it is said."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import GenerationConfig, GPT2Config, GPT2LMHeadModel

from decal import demo
from decal.errors import AdapterError, ConfigError, Interrupted
from decal.train.events import StepDone
from decal.verbs.load import load
from decal.verbs.text import complete, encode_prompt
from decal.verbs.train import RunResult, train
from tests.verbs.conftest import settings


def test_an_adapter_is_not_loaded_onto_a_base_with_one_other_norm(
    finished: RunResult, tmp_path: Path
) -> None:
    """The norm is not quantized, so the quantizer's identity does not see it.

    Mutation: check the identity only.
    """
    other = tmp_path / "base"
    shutil.copytree(demo.base_path(), other)
    tensors = load_file(other / "model.safetensors")
    name = next(key for key in tensors if key.endswith("norm.weight"))
    tensors[name] = tensors[name] * 2
    save_file(tensors, other / "model.safetensors", {"format": "pt"})
    with pytest.raises(AdapterError, match="its weights differ"):
        load(finished.weights, base=str(other))


def test_a_run_does_not_resume_on_other_rows(tmp_path: Path) -> None:
    """Mutation: compare settings only; the file's name is the same."""
    config = settings(tmp_path, quant="none")

    def stop(event: Any) -> None:
        if isinstance(event, StepDone) and event.step == 4:
            raise Interrupted("enough")

    with pytest.raises(Interrupted):
        train(config, observe=stop)
    data = tmp_path / "train.jsonl"
    rows = data.read_text(encoding="utf-8").splitlines()
    data.write_text("\n".join(reversed(rows)) + "\n", encoding="utf-8")
    with pytest.raises(ConfigError, match="began with another data"):
        train(config, resume=True)
    assert json.loads((tmp_path / "run" / "info.json").read_text())["data"]


class _Closing:
    """A tokenizer that puts bos before and eos after every text, unless told not to."""

    bos_token_id, eos_token_id, pad_token_id, chat_template = 1, 2, 0, None

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        ids = [3 + ord(letter) % 20 for letter in text]
        return {"input_ids": [1, *ids, 2] if add_special_tokens else ids}

    def decode(self, ids: torch.Tensor, **_: Any) -> str:
        return " ".join(map(str, ids.tolist()))


def test_a_plain_prompt_is_not_closed_by_eos() -> None:
    """Mutation: take the ids that the tokenizer gives by itself."""
    ids = encode_prompt(_Closing(), "ab")  # type: ignore[arg-type]
    assert ids == [1, 3 + 97 % 20, 3 + 98 % 20]


def test_greedy_knows_no_penalty_of_the_models_own() -> None:
    """Mutation: leave the model's generation_config in place."""
    torch.manual_seed(1)
    model = GPT2LMHeadModel(GPT2Config(n_embd=12, n_layer=1, n_head=3, vocab_size=29))
    plain = complete(model, _Closing(), ["abc"], max_new_tokens=9)  # type: ignore[arg-type]
    own = GenerationConfig(repetition_penalty=50.0)
    model.generation_config = own
    assert complete(model, _Closing(), ["abc"], max_new_tokens=9) == plain  # type: ignore[arg-type]
    assert model.generation_config is own
