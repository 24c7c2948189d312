"""F5: LoRA on the head of a tied model is merged into the embedding too, which is another model.

Head and embedding are one matrix. A delta that was trained for the head alone and is added to it
changes what every token looks like on the way in.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from decal.config import LoraConfig
from decal.model import hf
from decal.model.inject import attach
from decal.verbs.in_place import merge_in_place
from decal.verbs.load import adapter_of, load_base
from decal.verbs.merge import merge
from tests import zoo
from tests.failures.situations import draw, logits, off

IDS = torch.arange(5, 30)[None]
HEAD = LoraConfig(r=3, lora_alpha=7, lora_dropout=0, target_modules=("q_proj", "lm_head"))


def situation(folder: Path) -> tuple[Any, Tensor, Tensor]:
    """A tied model with an adapter on its head; logits with and without the adapter."""
    zoo.save("llama", folder / "base")
    model, _ = load_base(folder / "base", dtype="float32", device="cpu")
    assert model.config.tie_word_embeddings
    bare = logits(model, IDS)
    attach(model, HEAD)
    draw(model)
    adapter_of(model).save_pretrained(folder / "a")
    return model, logits(model, IDS), bare


def reloaded(folder: Path) -> Tensor:
    return logits(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), IDS)


def test_the_merged_folder_is_untied(tmp_path: Path) -> None:
    """Fails when only one tensor is written, or the config still ties."""
    _, wanted, bare = situation(tmp_path)
    report = merge(None, tmp_path / "a", tmp_path / "m").report
    assert report.untied == ("lm_head.weight",)
    assert json.loads((tmp_path / "m" / "config.json").read_text())["tie_word_embeddings"] is False
    assert off(reloaded(tmp_path / "m"), wanted, bare) < 1e-5


def test_merging_in_place_unties_too(tmp_path: Path) -> None:
    """In memory, after transformers ties anew (as resizing does), and after saving and loading."""
    model, wanted, bare = situation(tmp_path)
    merge_in_place(model)
    model.tie_weights()
    assert off(logits(model, IDS), wanted, bare) < 1e-5
    model.save_pretrained(tmp_path / "m")
    assert off(reloaded(tmp_path / "m"), wanted, bare) < 1e-5


def test_without_untying_the_head_is_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The guard away: the next time that transformers ties, the merged head is gone."""
    model, wanted, bare = situation(tmp_path)
    monkeypatch.setattr(hf, "untie", lambda *_: None)
    merge_in_place(model)
    model.tie_weights()
    assert off(logits(model, IDS), wanted, bare) > 0.3


def test_added_to_the_shared_matrix_it_is_off_by_more_than_the_adapter(tmp_path: Path) -> None:
    """What a merge in place into the tied weight gives, by hand."""
    model, wanted, bare = situation(tmp_path)
    merge_in_place(model)
    model.model.embed_tokens.weight = model.lm_head.weight
    assert off(logits(model, IDS), wanted, bare) > 1
