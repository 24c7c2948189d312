"""F7: an adapter loads as nothing, in part, or onto the wrong base, and nothing says so."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from decal.config import LoraConfig
from decal.errors import AdapterError, DecalWarning, TargetError
from decal.model import inject, targets
from decal.model.adapter import Adapter
from decal.model.inject import adapted_layers, adapter_state, attach
from decal.verbs.load import load, load_base
from tests import zoo
from tests.failures.situations import draw, logits, off, read, tuned, with_fused_mlps

IDS = torch.arange(5, 30)[None]
QV = ("q_proj", "v_proj")
LAYER_1 = "model.layers.1.self_attn.q_proj.lora_"

Change = Callable[[dict[str, Tensor]], dict[str, Tensor]]
CHANGES: dict[str, tuple[Change, str]] = {
    "wrong prefix": (
        lambda tensors: {k.replace("model.layers", "model.blocks"): t for k, t in tensors.items()},
        "4 of 4 modules are not in the base",
    ),
    "without peft's prefix": (
        lambda tensors: {k.replace("base_model.model.", ""): t for k, t in tensors.items()},
        "8 tensors do not fit",
    ),
    "a layer too many": (
        lambda tensors: {
            **tensors,
            **{
                k.replace("layers.1", "layers.7"): t.clone()
                for k, t in tensors.items()
                if LAYER_1 in k
            },
        },
        "1 of 5 modules are not in the base",
    ),
    "a layer too few": (
        lambda tensors: {k: t for k, t in tensors.items() if LAYER_1 not in k},
        "1 of 4 target modules have no tensors",
    ),
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A base and an adapter on it."""
    zoo.save("llama", tmp_path / "base")
    tuned(tmp_path / "a", tmp_path / "base", target_modules=QV)
    return tmp_path


def changed(folder: Path, change: Change) -> Path:
    shutil.copytree(folder / "a", folder / "changed")
    file = folder / "changed" / "adapter_model.safetensors"
    save_file(change(load_file(folder / "a" / file.name)), file, {"format": "pt"})
    return folder / "changed"


@pytest.mark.parametrize("name", CHANGES)
def test_what_does_not_pair_off_is_refused(folder: Path, name: str) -> None:
    """File keys and slots are a bijection. Fails when either side may have something over."""
    change, text = CHANGES[name]
    with pytest.raises(AdapterError, match=text):
        load(changed(folder, change), device="cpu")


def test_loaded_as_far_as_it_goes_it_is_half_an_adapter(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The guards away: what fits is loaded, the rest starts at zero, and the logits are wrong."""
    base = zoo.build("llama")
    bare = logits(base, IDS)
    attach(base, read(folder / "a"))
    wanted = logits(base, IDS)
    adapter = read(changed(folder, CHANGES["a layer too few"][0]))
    monkeypatch.setattr(inject, "check_fit", lambda *_, **__: None)
    monkeypatch.setattr(inject, "load_state", load_what_fits)
    model = zoo.build("llama")
    attach(model, adapter)
    assert off(logits(model, IDS), wanted, bare) > 0.1


@torch.no_grad()
def load_what_fits(model: Any, name: str, tensors: dict[str, Any], _: object) -> None:
    for module, parts in adapter_state(model, name).items():
        if module in tensors:
            parts.A.copy_(tensors[module][0])
            parts.B.copy_(tensors[module][1])


def test_another_base_of_the_same_shape_is_refused(folder: Path) -> None:
    """Loaded all the same, on request and with a warning, its logits are those of no training.

    Fails when the fingerprint is not compared.
    """
    zoo.save("llama", folder / "other", seed=5)
    with pytest.raises(AdapterError, match="its weights differ"):
        load(folder / "a", base=str(folder / "other"), device="cpu")
    right, _ = load(folder / "a", device="cpu")
    bare = logits(load_base(folder / "base", dtype="float32", device="cpu")[0], IDS)
    with pytest.warns(DecalWarning, match="is not the one"):
        wrong, _ = load(
            folder / "a", base=str(folder / "other"), device="cpu", allow_other_base=True
        )
    assert off(logits(wrong, IDS), logits(right, IDS), bare) > 1


def test_a_base_loaded_by_hand_is_compared_too(folder: Path) -> None:
    """Fails when only `load` looks: attach meets bases and adapters in any pairing."""
    zoo.save("llama", folder / "other", seed=5)
    model, _ = load_base(folder / "other", dtype="float32", device="cpu")
    with pytest.raises(AdapterError, match="its weights differ"):
        attach(model, read(folder / "a"))
    with pytest.warns(DecalWarning, match="its weights differ"):
        attach(model, read(folder / "a"), allow_other_base=True)


def test_one_typo_among_several_targets_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the guard half of what was asked for is trained, and nothing says so."""
    settings = LoraConfig(r=3, target_modules=("q_proj", "v_porj"))
    with pytest.raises(TargetError, match="1 of 2 target_modules") as error:
        attach(zoo.build("llama"), settings)
    assert "v_proj" in str(error.value)
    monkeypatch.setattr(targets, "_refuse_unmatched", lambda *_, **__: None)
    model = zoo.build("llama")
    attach(model, settings)
    assert [name.rpartition(".")[2] for name in adapted_layers(model)] == ["q_proj", "q_proj"]


def test_an_adapter_that_the_model_computes_past_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its wrappers stand in their places and nobody calls them: without the trial pass it loads,
    and the logits are those of the bare base."""
    targets = ("gate_proj", "up_proj", "down_proj")
    healthy = zoo.build("llama")
    bare = logits(healthy, IDS)
    attach(healthy, LoraConfig(r=3, lora_alpha=7, lora_dropout=0, target_modules=targets))
    draw(healthy)
    wanted, adapter = logits(healthy, IDS), Adapter.from_model(healthy)
    model = with_fused_mlps(zoo.build("llama"))
    with pytest.raises(AdapterError, match="does not act on 6 of 6 modules"):
        attach(model, adapter)
    monkeypatch.setattr(inject, "probe", lambda *_, **__: ())
    attach(model, adapter)
    assert off(logits(model, IDS), wanted, bare) == pytest.approx(1, abs=1e-4)
    assert off(bare, wanted, bare) == 1
