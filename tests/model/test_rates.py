"""Factors on the learning rate from names alone."""

from __future__ import annotations

import pytest

from decal.errors import ConfigError
from decal.model.rates import learning_rates, module_of

LAYER = "model.layers.{}.self_attn.{}.adapters.default.{}"
NAMES = [
    *[LAYER.format(i, m, t) for i in (0, 1, 11) for m in ("q_proj", "v_proj") for t in "AB"],
    LAYER.format(0, "q_proj", "B_bias"),
    LAYER.format(0, "q_proj", "bias"),
    "lm_head.adapters.default.weight",
    "classifier.adapters.default.dense.weight",
    "model.norm.base_layer.weight",
]


@pytest.mark.parametrize(
    ("parameter", "module"),
    [
        (LAYER.format(3, "q_proj", "A"), "model.layers.3.self_attn.q_proj"),
        ("lm_head.adapters.a-1.weight", "lm_head"),
        ("classifier.adapters.default.dense.weight", "classifier.dense"),
        ("h.0.attn.c_attn.base_layer.bias", "h.0.attn.c_attn"),
        ("model.embed_tokens.weight", "model.embed_tokens"),
    ],
)
def test_a_parameter_belongs_to_a_module_of_the_base(parameter: str, module: str) -> None:
    """Fails when a wrapper's part of the name stays."""
    assert module_of(parameter) == module


def test_lora_plus_is_for_b_alone() -> None:
    """Fails when A, a bias of the base or a whole module gets the ratio, or B_bias does not."""
    rates = learning_rates(NAMES, ratio=16.0, patterns={})
    assert set(rates.values()) == {16.0}
    assert set(rates) == {n for n in NAMES if n.endswith((".B", ".B_bias"))}
    assert learning_rates(NAMES, ratio=1.0, patterns={}) == {}


def test_patterns_fit_the_ends_of_names_and_multiply_with_the_ratio() -> None:
    """The first pattern counts; `1` is not `11`; `proj` is no end of a name.

    Fails when the last pattern wins, when the ratio replaces a factor, or when the match is open
    at either side.
    """
    patterns = {r"layers\.1\.self_attn\.q_proj": 0.5, "q_proj": 0.25, "lm_head": 3.0}
    rates = learning_rates(NAMES, ratio=8.0, patterns=patterns)
    assert rates[LAYER.format(1, "q_proj", "A")] == 0.5
    assert rates[LAYER.format(1, "q_proj", "B")] == 4.0
    assert rates[LAYER.format(11, "q_proj", "A")] == 0.25
    assert rates[LAYER.format(0, "q_proj", "bias")] == 0.25
    assert rates["lm_head.adapters.default.weight"] == 3.0
    assert rates[LAYER.format(0, "v_proj", "B")] == 8.0
    assert LAYER.format(0, "v_proj", "A") not in rates


def test_a_pattern_that_fits_nothing_is_an_error() -> None:
    """Count first, then the pattern with the nearest name. Fails when it is passed over."""
    with pytest.raises(ConfigError, match=r"2 of 3 patterns in `train.lr_pattern`") as caught:
        learning_rates(NAMES, ratio=1.0, patterns={"q_prj": 2.0, "v_proj": 1.0, "zz": 2.0})
    assert caught.value.details == ("q_prj: the nearest is q_proj",)
    with pytest.raises(ConfigError, match="1 of 1") as caught:
        learning_rates(NAMES, ratio=1.0, patterns={"attn.q_proj": 2.0})
    assert caught.value.details == ("attn.q_proj: the nearest is self_attn.q_proj",)


def test_a_ratio_without_b_is_an_error() -> None:
    """Fails when full fine-tuning ignores the ratio."""
    with pytest.raises(ConfigError, match="is 16, but no LoRA"):
        learning_rates(["model.embed_tokens.weight"], ratio=16.0, patterns={})
