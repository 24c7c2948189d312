"""peft's rules for names, and what of a config is kept."""

from __future__ import annotations

from typing import Any

import pytest

from decal.config import LoraConfig
from decal.store.peft_config import DEFAULTS, dotted, misnamed, rest, saved_by, to_json, unsaved

Q = "model.layers.1.mlp.experts.0.q_proj"
NORMS = ["model.norm.weight", "model.layers.0.input_layernorm.weight"]


def _config(**settings: Any) -> LoraConfig:
    return LoraConfig(**{"r": 3, "lora_alpha": 7, "target_modules": ("q_proj",), **settings})


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({}, None),
        ({"target_modules": "all-linear"}, None),
        ({"target_modules": r".*\.q_proj"}, None),
        ({"target_modules": "q_proj"}, "is not named by target_modules"),
        ({"target_modules": ("proj",)}, "is not named by target_modules"),
        ({"exclude_modules": ("experts.0.q_proj",)}, "is named by exclude_modules"),
        ({"exclude_modules": r".*experts.*"}, "is named by exclude_modules"),
        ({"exclude_modules": ("experts",)}, None),
        ({"modules_to_save": ("mlp",)}, "is named by modules_to_save, it is trained whole"),
        ({"layers_to_transform": 1}, None),
        ({"layers_to_transform": (0, 1)}, None),
        ({"layers_to_transform": (0,)}, "is in no layer of layers_to_transform"),
        ({"layers_to_transform": 1, "layers_pattern": "layers"}, None),
        ({"layers_to_transform": 0, "layers_pattern": ("h", "experts")}, None),
        (
            {"layers_to_transform": 1, "layers_pattern": "h"},
            "is in no layer of layers_to_transform",
        ),
    ],
    ids=str,
)
def test_which_modules_are_chosen(settings: dict[str, Any], reason: str | None) -> None:
    """The layer's number is the first, not the expert's. Fails if the last number is taken."""
    assert misnamed(Q, _config(**settings)) == reason


def test_modules_to_save_are_ends_of_names_in_peft() -> None:
    assert saved_by(NORMS[0], ["norm"]) == "model.norm"
    assert saved_by(NORMS[1], ["norm"]) == "model.layers.0.input_layernorm"
    assert saved_by("model.layers.0.mlp.up_proj.weight", ["mlp"]) == "model.layers.0.mlp"
    assert saved_by(NORMS[0], ["weight"]) is None
    assert saved_by(NORMS[0], []) is None


def test_what_peft_reached_is_named_whole() -> None:
    """Ends after a dot must reach the same. Fails if a norm inside the layers is forgotten."""
    assert dotted(["norm"], NORMS) == ("norm", "model.layers.0.input_layernorm")
    assert dotted(["norm"], NORMS[:1]) == ("norm",)


def test_what_is_written_reaches_no_more() -> None:
    """Fails if `norm` is written for the last norm alone: peft would want all of them."""
    config = _config(modules_to_save=("norm", "lm_head", "embed_tokens"))
    names = [NORMS[0], "lm_head.weight", "model.embed_tokens.weight"]
    raw = to_json(config, [Q], names, {})
    assert raw["modules_to_save"] == ["model.norm", "lm_head", "embed_tokens"]


def test_heads_that_peft_names_by_itself() -> None:
    heads = ["classifier", "score"]
    assert unsaved(heads, ["score.weight"], "SEQ_CLS") == ([], ["classifier"])
    assert unsaved(heads, ["score.weight"], "CAUSAL_LM") == (["classifier"], [])
    assert unsaved(["mlp", "score"], [], "SEQ_CLS") == (["mlp"], ["score"])


def test_settings_that_peft_refuses_together_are_not_written() -> None:
    """A layers_pattern alone, another start beside lora_bias, an expression with layers."""
    raw = to_json(_config(layers_pattern="h"), [Q], [], {})
    assert raw["layers_pattern"] is None
    raw = to_json(_config(lora_bias=True, init_lora_weights="gaussian"), [Q], [], {})
    assert raw["init_lora_weights"] is True
    raw = to_json(_config(target_modules=r".*q_proj", layers_to_transform=(1,)), [Q], [], {})
    assert (raw["target_modules"], raw["layers_to_transform"]) == ([Q], [1])


def test_numbers_keep_their_kind() -> None:
    raw = to_json(_config(lora_alpha=7.0, alpha_pattern={"a": 4.0, "b": 4.5}), [Q], [], {})
    assert [type(v) for v in (raw["lora_alpha"], *raw["alpha_pattern"].values())] == [
        int, int, float,
    ]  # fmt: skip


def test_what_has_no_field_is_kept() -> None:
    raw = {
        **DEFAULTS, "r": 4, "init_lora_weights": "eva", "eva_config": {"rho": 2.0}, "newer": [],
        "task_type": "CAUSAL_LM", "revision": "main", "peft_version": "0.99",
    }  # fmt: skip
    kept = {"init_lora_weights": "eva", "eva_config": {"rho": 2.0}, "newer": []}
    assert rest(raw) == kept
    assert rest({**raw, "init_lora_weights": "gaussian"}).keys() == {"eva_config", "newer"}
    again = to_json(_config(), [Q], [], kept)
    assert {key: again[key] for key in kept} == kept
    assert to_json(_config(init_lora_weights="gaussian"), [Q], [], kept)["init_lora_weights"] == (
        "gaussian"
    )
