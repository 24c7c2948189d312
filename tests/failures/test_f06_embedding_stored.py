"""F6: LoRA on the embedding stores the whole embedding of the base, and small adapters get huge."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from decal.errors import AdapterError
from decal.model import inject
from decal.model.inject import attach
from decal.store.base import open_base
from tests import zoo
from tests.failures.situations import read, tuned

FILE = "adapter_model.safetensors"
COPY = "base_model.model.model.embed_tokens.base_layer.weight"
"""The name under which peft stores it."""


def situation(folder: Path) -> int:
    """An adapter on the embedding of a tied model; returns how many numbers it trained."""
    zoo.save("llama", folder / "base")
    tuned(folder / "a", folder / "base", target_modules=["q_proj", "embed_tokens"])
    return read(folder / "a").parameters


def numbers(folder: Path) -> int:
    return sum(tensor.numel() for tensor in load_file(folder / FILE).values())


def with_copy(folder: Path, out: Path, wrong: float = 0.0) -> Path:
    """The adapter as peft writes it: the base's embedding beside the factors."""
    embedding = open_base(folder / "base").read("model.embed_tokens.weight")
    out.mkdir()
    (out / "adapter_config.json").write_bytes((folder / "a" / "adapter_config.json").read_bytes())
    tensors = {**load_file(folder / "a" / FILE), COPY: embedding + wrong}
    save_file(tensors, out / FILE, {"format": "pt"})
    return out


def test_the_file_holds_what_was_trained_and_no_more(tmp_path: Path) -> None:
    """Fails when the base's embedding is written beside its factors."""
    trained = situation(tmp_path)
    assert numbers(tmp_path / "a") == trained
    assert not any("base_layer" in key for key in load_file(tmp_path / "a" / FILE))


def test_a_copy_from_elsewhere_is_not_written_again(tmp_path: Path) -> None:
    """With the copy the file is several times as large; read and written again it is not."""
    trained = situation(tmp_path)
    copied = with_copy(tmp_path, tmp_path / "theirs")
    assert numbers(copied) > 4 * trained
    read(copied).save_pretrained(tmp_path / "ours")
    assert numbers(tmp_path / "ours") == trained


def test_a_copy_of_another_base_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The copy tells which base it was: without looking, the adapter goes onto a wrong one."""
    situation(tmp_path)
    adapter = read(with_copy(tmp_path, tmp_path / "theirs", wrong=0.1))
    with pytest.raises(AdapterError, match="1 of 1 base weights stored with it differ"):
        attach(zoo.build("llama"), adapter)
    monkeypatch.setattr(inject, "check_fit", lambda *_, **__: None)
    model = zoo.build("llama")
    attach(model, adapter)
    copy = adapter.base_copies["model.embed_tokens.weight"]
    assert not torch.equal(model.get_input_embeddings().base_layer.weight, copy)
