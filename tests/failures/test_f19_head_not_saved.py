"""F19: a classification head is trained, and not saved or not restored; the scores are luck."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from decal.config import LoraConfig
from decal.errors import AdapterError, VerificationError
from decal.model import inject
from decal.model.inject import attach
from decal.store import peft
from decal.verbs.load import adapter_of, load, load_base
from tests import zoo
from tests.failures.situations import draw, logits, read

LABELS = ("cold", "hot", "mild")
"""Not those of the zoo's classifiers, whose heads are then not taken."""
IDS = torch.arange(5, 30)[None]
FILE = "adapter_model.safetensors"
BASES = ("llama", "bert", "roberta")
EXTRAS: dict[str, dict[str, Any]] = {
    "biases": {"bias": "all"},
    "biases of the layers": {"bias": "lora_only"},
    "a norm": {"modules_to_save": ["norm"]},
    "a head": {"modules_to_save": ["lm_head"]},
    "biases of B": {"lora_bias": True},
    "an embedding": {"target_modules": ["q_proj", "embed_tokens"]},
}


def classifier(folder: Path, name: str) -> Tensor:
    """A classifier with a trained head in `a`, the base without one in `base`; its logits."""
    zoo.save(name, folder / "base")
    model, _ = load_base(folder / "base", dtype="float32", device="cpu", labels=LABELS)
    head = next(n for n, _ in model.named_children() if n in ("score", "classifier"))
    targets = ("query", "value") if head == "classifier" else ("q_proj", "v_proj")
    settings = {"r": 3, "lora_alpha": 7, "lora_dropout": 0, "modules_to_save": (head,)}
    attach(model, LoraConfig(**settings, target_modules=targets))
    draw(model)
    adapter_of(model).save_pretrained(folder / "a")
    return logits(model, IDS)


def without_head(folder: Path) -> Path:
    """The adapter as a tool saves it that knows of the factors alone."""
    out = folder / "factors"
    out.mkdir()
    tensors = load_file(folder / "a" / FILE)
    facts = peft.read_adapter(folder / "a").metadata
    kept = {k: t for k, t in tensors.items() if "lora_" in k}
    assert len(kept) < len(tensors)
    save_file(kept, out / FILE, {"format": "pt", **facts})
    config = json.loads((folder / "a" / "adapter_config.json").read_text())
    (out / "adapter_config.json").write_text(json.dumps({**config, "modules_to_save": None}))
    return out


@pytest.mark.parametrize("name", BASES)
def test_the_head_comes_back(name: str, tmp_path: Path) -> None:
    """The same logits from the files. Fails when the head is not saved, or starts anew."""
    wanted = classifier(tmp_path, name)
    model, _ = load(tmp_path / "a")
    assert torch.equal(logits(model, IDS), wanted)
    assert tuple(model.config.id2label.values()) == LABELS


@pytest.mark.parametrize("name", BASES)
def test_an_adapter_without_its_head_is_refused(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the guard away, the head is another one and the logits say something else."""
    wanted = classifier(tmp_path, name)
    lost = without_head(tmp_path)
    with pytest.raises(AdapterError, match="of the classifier's head are missing"):
        load(lost)
    monkeypatch.setattr(inject, "check_fit", lambda *_, **__: None)
    model, _ = load(lost)
    found = logits(model, IDS)
    assert float((found - wanted).norm() / wanted.norm()) > 0.5


@pytest.mark.parametrize("name", EXTRAS)
def test_everything_that_was_trained_comes_back(name: str, tmp_path: Path) -> None:
    """Number by number, and in the logits. Fails when any kind of trained tensor is left out."""
    zoo.save("llama", tmp_path / "base")
    model, _ = load_base(tmp_path / "base", dtype="float32", device="cpu")
    settings = {"r": 3, "lora_alpha": 7, "lora_dropout": 0, "target_modules": ["q_proj", "v_proj"]}
    attach(model, LoraConfig(**{**settings, **EXTRAS[name]}))
    draw(model)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    adapter_of(model).save_pretrained(tmp_path / "a")
    assert sum(t.numel() for t in load_file(tmp_path / "a" / FILE).values()) == trained
    again, _ = load(tmp_path / "a")
    assert torch.equal(logits(again, IDS), logits(model, IDS))


@pytest.mark.parametrize("loses", ["drop", "zero"])
def test_what_was_not_written_is_noticed(
    loses: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file is read again before it counts. The guard away: the head is gone, in silence."""
    real = peft.save_tensors

    def losing(path: Path, tensors: dict[str, Tensor], *rest: Any, **more: Any) -> Any:
        head = {k for k in tensors if "score" in k}
        assert head
        if loses == "drop":
            written = {k: t for k, t in tensors.items() if k not in head}
        else:
            written = {k: t * 0 if k in head else t for k, t in tensors.items()}
        return real(path, written, *rest, **more)

    wanted = classifier(tmp_path, "llama")
    adapter = read(tmp_path / "a")
    monkeypatch.setattr(peft, "save_tensors", losing)
    with pytest.raises((VerificationError, AdapterError)):
        adapter.save_pretrained(tmp_path / "b")
    assert not (tmp_path / "b").exists()
    if loses == "zero":
        monkeypatch.setattr(peft, "_verify", lambda *_: None)
        adapter.save_pretrained(tmp_path / "b")
        model, _ = load(tmp_path / "b")
        assert float((logits(model, IDS) - wanted).norm() / wanted.norm()) > 0.5
