"""Names in files and names in the module tree are brought together, for old hub files too."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from decal.errors import BaseModelError
from decal.model import names
from tests import zoo

EXPERT = "model.layers.1.mlp.experts.3.gate_proj.weight"


def stored(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def labels_of(name: str) -> tuple[str, ...] | None:
    return None if zoo.ZOO[name].causal else zoo.LABELS


@pytest.mark.parametrize(
    ("name", "historic"),
    [(name, False) for name in zoo.ZOO] + [(name, True) for name in zoo.HISTORIC],
)
def test_every_weight_of_a_file_has_its_name_in_the_model(
    name: str, historic: bool, tmp_path: Path
) -> None:
    """The renamed tensors are the model's, value by value; only leftovers keep unknown names.

    Mutation: leave a renaming out (gamma, `transformer.`, `embed_out`).
    """
    (zoo.save_historic if historic else zoo.save)(name, tmp_path)
    skeleton = names.skeleton(str(tmp_path), labels=labels_of(name))
    tensors = stored(tmp_path)
    found = names.name_map(skeleton, tensors)
    fused = names.fused_keys(skeleton, tensors)
    weights = zoo.build(name).state_dict()
    named = {found[key]: tensor for key, tensor in tensors.items() if found[key] in weights}
    tied = set(skeleton.all_tied_weights_keys)
    missing = weights.keys() - named.keys() - tied - set(fused.values())
    assert not missing
    for key, tensor in named.items():
        assert torch.equal(tensor, weights[key]), key
    unknown = {key.rpartition(".")[2] for key in tensors if found[key] not in weights}
    leftovers = {"masked_bias", "inv_freq", "position_ids", "bias"} if historic else set()
    assert unknown <= (leftovers | {"weight"} if fused else leftovers)


def test_experts_are_fused_keys_and_keep_their_names(tmp_path: Path) -> None:
    """Mutation: map a fused key onto the parameter that it becomes a part of."""
    zoo.save("qwen3_moe", tmp_path)
    skeleton, keys = names.skeleton(str(tmp_path)), sorted(stored(tmp_path))
    fused = names.fused_keys(skeleton, keys)
    assert len(fused) == 15
    assert fused[EXPERT] == "model.layers.1.mlp.experts.gate_up_proj"
    assert names.name_map(skeleton, keys)[EXPERT] == EXPERT
    router = "model.layers.1.mlp.gate.weight"
    assert router not in fused
    assert names.name_map(skeleton, keys)[router] == router


def test_a_head_of_another_task_is_no_weight_of_a_classifier(tmp_path: Path) -> None:
    zoo.save("qwen2", tmp_path)
    skeleton: Any = names.skeleton(str(tmp_path), labels=("no", "yes"))
    assert skeleton.config.id2label == {0: "no", 1: "yes"}
    assert skeleton.get_parameter("score.weight").shape == (2, 60)
    found = names.name_map(skeleton, sorted(stored(tmp_path)))
    known = set(skeleton.state_dict())
    assert [key for key, name in found.items() if name not in known] == ["lm_head.weight"]


def test_transposed_layers_are_the_conv1d_ones() -> None:
    found = names.transposed_modules(zoo.build("gpt2"))
    assert len(found) == 8
    assert "transformer.h.1.attn.c_attn" in found
    assert not names.transposed_modules(zoo.build("llama"))


def test_a_skeleton_of_nothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BaseModelError):
        names.skeleton(str(tmp_path))
