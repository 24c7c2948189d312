"""The base of the training, asked for in every verb: refused, or said where that is allowed."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from decal import demo
from decal.config import LoraConfig
from decal.errors import AdapterError, BaseModelError, DecalWarning
from decal.model.adapter import Adapter
from decal.model.inject import adapters_of, attach
from decal.verbs import same_base
from decal.verbs.compare import compare
from decal.verbs.generate import generate
from decal.verbs.in_place import merge_in_place
from decal.verbs.load import adapter_of, load, load_base, save_adapter
from decal.verbs.merge import merge
from decal.verbs.target import BASE
from decal.verbs.train import RunResult, train
from tests.verbs.conftest import settings

KEY = "model.layers.1.self_attn.k_proj.weight"


def changed(folder: Path) -> None:
    """One tensor of the base is a little different."""
    tensors = load_file(folder / "model.safetensors")
    tensors[KEY] = tensors[KEY] + 0.1
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


@pytest.fixture
def other(tmp_path: Path) -> Path:
    """A base of the same shapes."""
    shutil.copytree(demo.base_path(), tmp_path / "other")
    changed(tmp_path / "other")
    return tmp_path / "other"


Verb = Callable[[Path, RunResult, bool], Any]
VERBS: dict[str, Verb] = {
    "load": lambda base, run, ok: load(base, adapter=run.run, allow_other_base=ok),
    "merge": lambda base, run, ok: merge(
        str(base), run.run, base.parent / "out", allow_other_base=ok
    ),
    "compare": lambda base, run, ok: compare(
        str(base), {"a": str(run.run)}, prompts=["Hi"], max_new_tokens=1, allow_other_base=ok
    ),
    "generate": lambda base, run, ok: generate(
        str(base), "Hi", adapter=str(run.run), max_new_tokens=1, allow_other_base=ok
    ),
    "train": lambda base, run, ok: train(
        settings(
            base.parent, base=str(base), adapter={"from": str(run.run)}, train={"max_steps": 1}
        ),
        dry_run=True,
        allow_other_base=ok,
    ),
    "attach": lambda base, run, ok: attach(
        load_base(base, quant="nf4")[0],
        Adapter.from_pretrained(run.weights),
        allow_other_base=ok,
    ),
}


@pytest.mark.parametrize("verb", VERBS)
def test_another_base_is_refused_or_said(verb: str, other: Path, finished: RunResult) -> None:
    """Fails when a verb loses the check, or does not hand the permission on."""
    with pytest.raises(AdapterError, match="is not the one that adapter") as error:
        VERBS[verb](other, finished, False)
    assert "allow_other_base" in str(error.value.hint)
    assert not (other.parent / "out").exists()
    with pytest.warns(DecalWarning, match="weights differ") as said:
        VERBS[verb](other, finished, True)
    texts = [str(w.message) for w in said if issubclass(w.category, DecalWarning)]
    texts = [text for text in texts if "trained on" in text and "found" in text]
    assert len(texts) == 2  # its files, and what was packed of them


def test_tensors_must_fit_any_base(finished: RunResult) -> None:
    """Fails when the permission covers shapes too."""
    adapter = Adapter.from_pretrained(finished.weights)
    module = next(iter(adapter.tensors))
    parts = adapter.tensors[module]
    adapter.tensors[module] = parts._replace(A=parts.A[:, 1:].contiguous())  # type: ignore[index]
    model, _ = load_base(demo.base_path(), quant="nf4")
    with pytest.raises(AdapterError, match="wrong shape"):
        attach(model, adapter, allow_other_base=True)


def test_another_packing_is_said(finished: RunResult, finished_plain: RunResult) -> None:
    """Fails when a QLoRA adapter goes onto 16-bit weights, or the reverse, without a word."""
    plain, _ = load_base(demo.base_path())
    with pytest.warns(DecalWarning, match="quantized to nf4, here the base is 16 or 32-bit"):
        attach(plain, Adapter.from_pretrained(finished.weights))
    packed, _ = load_base(demo.base_path(), quant="int8")
    with pytest.warns(DecalWarning, match="32-bit weights, here the base is weights quantized to"):
        attach(packed, Adapter.from_pretrained(finished_plain.weights))


def test_foreign_adapters_are_taken_as_they_are(finished: RunResult) -> None:
    """Fails when an adapter without metadata, as peft writes it, is refused."""
    adapter = Adapter.from_pretrained(finished.weights)
    foreign = Adapter(config=adapter.config, tensors=adapter.tensors)
    model, _ = load_base(demo.base_path())
    attach(model, foreign)
    assert list(adapters_of(model)) == ["default"]


def test_the_fingerprint_is_that_of_the_loaded_files(tmp_path: Path) -> None:
    """Fails when it is computed from whatever lies there by the time of saving."""
    folder = tmp_path / "base"
    shutil.copytree(demo.base_path(), folder)
    model, _ = load_base(folder)
    attach(model, LoraConfig(r=2, lora_alpha=3, init_lora_weights=False))
    kept, _ = load_base(folder)
    attach(kept, LoraConfig(r=2, lora_alpha=3, init_lora_weights=False))
    before = json.loads(adapter_of(kept).metadata[BASE])["fingerprint"]
    changed(folder)
    assert json.loads(adapter_of(kept).metadata[BASE])["fingerprint"] == before
    with pytest.warns(DecalWarning, match="changed or removed after it was loaded"):
        save_adapter(model, tmp_path / "adapter")
    read = Adapter.from_pretrained(tmp_path / "adapter")
    assert json.loads(read.metadata[BASE])["fingerprint"] is None
    shutil.rmtree(folder)
    assert json.loads(adapter_of(kept).metadata[BASE])["fingerprint"] == before


def test_a_merged_model_is_no_longer_its_base(finished: RunResult, tmp_path: Path) -> None:
    """Fails when an adapter that is trained on top of another one names the plain base."""
    model, _ = load(finished.weights)
    merge_in_place(model)
    attach(model, LoraConfig(r=2, lora_alpha=3, init_lora_weights=False))
    adapter = save_adapter(model, tmp_path / "a")
    assert adapter.base is None
    assert BASE not in adapter.metadata


def test_files_that_change_while_they_are_loaded_are_refused() -> None:
    """Fails when the hash of one file is taken for a model that was read from another."""
    with same_base.hashing(str(demo.base_path())) as keep:
        model, _ = load_base(demo.base_path())
    model.decal_base = replace(model.decal_base, files=("another",))
    with pytest.raises(BaseModelError, match="changed while"):
        keep(model)


def test_hashing_beside_the_loading_gives_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails when the worker's result is not kept, and the files are read a second time."""
    with same_base.hashing(str(demo.base_path())) as keep:
        model, _ = load_base(demo.base_path())
        keep(model)
    monkeypatch.setattr(same_base, "base_fingerprint", lambda *_: pytest.fail("hashed again"))
    found = same_base.fingerprint_of(model)
    monkeypatch.undo()
    assert found == same_base.base_fingerprint(str(demo.base_path()), None)


def test_an_error_in_loading_ends_the_hashing(tmp_path: Path) -> None:
    """Fails when a worker outlives the block, or its own error hides the loading's."""
    with pytest.raises(RuntimeError, match="mine"), same_base.hashing(str(tmp_path)):
        raise RuntimeError("mine")


def test_torch_random_state_is_left_alone() -> None:
    """Fails when a check draws numbers that training would have drawn."""
    model, _ = load_base(demo.base_path(), quant="nf4")
    state = torch.random.get_rng_state()
    attach(model, LoraConfig(r=2, lora_alpha=3))
    assert torch.equal(torch.random.get_rng_state(), state)
