"""F8: target_modules match nothing, or no layers, or leave most of a model frozen unsaid."""

from __future__ import annotations

from typing import Any

import pytest

from decal.config import LoraConfig
from decal.errors import TargetError
from decal.model import targets
from decal.model.inject import adapted_layers, attach
from decal.model.state import trainable_parameters
from decal.model.survey import module_infos
from tests import zoo


def settings(*names: str, **more: Any) -> LoraConfig:
    return LoraConfig(r=3, lora_alpha=7, target_modules=names, **more)


def test_the_table_says_what_each_pattern_came_to() -> None:
    """Fails when a row counts or measures anything but what was adapted."""
    model = zoo.build("llama")
    table = attach(model, settings("q_proj", "down_proj"))
    assert [(row.pattern, row.count, row.shapes) for row in table.rows] == [
        ("q_proj", 2, ((60, 54),)),
        ("down_proj", 2, ((54, 75),)),
    ]
    assert table.parameters == trainable_parameters(model)[0] == 2 * 3 * (60 + 54 + 54 + 75)
    lines = table.lines()
    assert "60 x 54" in lines[1]
    assert f"{table.parameters:,}" in lines[-1]


@pytest.mark.parametrize(
    ("architecture", "names", "text"),
    [
        ("llama", ["query"], "1 of 1 target_modules match"),
        ("llama", ["q_proj", "gate_porj"], "`gate_proj`"),
        ("bert", ["query", "dropout"], "Dropout"),
        ("llama", ["q_proj", "input_layernorm"], "LlamaRMSNorm"),
        ("qwen3_moe", ["q_proj", "experts"], "name experts"),
    ],
)
def test_what_cannot_be_adapted_is_refused(architecture: str, names: list[str], text: str) -> None:
    """Nothing matched, nothing near, no layer, experts. Fails when one of them passes."""
    with pytest.raises(TargetError) as error:
        attach(zoo.build(architecture), settings(*names))
    assert text in str(error.value)


def test_without_the_guard_it_would_train_less_than_was_asked(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The guard away: attach succeeds, and what was named second is not there."""
    monkeypatch.setattr(targets, "_refuse_unmatched", lambda *_, **__: None)
    model = zoo.build("llama")
    attach(model, settings("q_proj", "gate_porj"))
    assert {name.rpartition(".")[2] for name in adapted_layers(model)} == {"q_proj"}


def test_frozen_experts_are_said_with_their_share() -> None:
    """Fails when the note is dropped: the table alone reads as if all was adapted."""
    model = zoo.build("qwen3_moe")
    experts = sum(p.numel() for n, p in model.named_parameters() if ".experts." in n)
    share = 100 * experts / trainable_parameters(model)[1]
    table = attach(model, LoraConfig(r=3, target_modules="all-linear"))
    note = table.lines()[-1]
    assert note.startswith("note: expert weights are no linear layers and stay frozen: 1 ")
    assert f"({share:.0f} %" in note
    assert not any("expert" in line for line in table.lines()[:-1])


def test_all_linear_means_all() -> None:
    """Beside experts too: the dense layer's projections, which a translation of the names for the
    experts would lose. Fails when one linear layer is left out."""
    model = zoo.build("qwen3_moe")
    infos = module_infos(model)
    linear = {n for n, info in infos.items() if info.kind == "linear" and not info.is_head}
    table = attach(model, LoraConfig(r=3, target_modules="all-linear"))
    assert {n for n in table.names if infos[n].kind == "linear"} == linear
    assert {f"model.layers.0.mlp.{n}_proj" for n in ("gate", "up", "down")} <= linear
