"""Settings: strict types, defaults that follow one another, and errors that name the way out."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

import pytest
from pydantic import BaseModel

from decal.config import SHORTHAND, LoraConfig, RunConfig, TrainConfig
from decal.errors import ConfigError
from decal.problems import ALIASES, NEEDLESS

NEEDED = {"base": "b", "data": "d.jsonl", "output": "o"}


def sections(model: type[BaseModel]) -> list[type[BaseModel]]:
    """`model` and every section below it."""
    found = [model]
    for field in model.model_fields.values():
        for part in (field.annotation, *get_args(field.annotation)):
            if isinstance(part, type) and issubclass(part, BaseModel):
                found += sections(part)
    return found


def refused(**values: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        RunConfig(**{**NEEDED, **values})
    return str(caught.value)


def test_seven_keys_and_at_most_seventy_fields() -> None:
    """Fails when an eighth top-level key is added."""
    assert list(RunConfig.model_fields) == [
        "base",
        "quant",
        "adapter",
        "data",
        "objective",
        "train",
        "output",
    ]
    assert sum(len(m.model_fields) for m in sections(RunConfig)) <= 70


def test_every_field_is_documented_and_names_its_choices() -> None:
    """Fails when a docstring under a field is removed, or a choice is added without a word."""
    for model in sections(RunConfig):
        for name, field in model.model_fields.items():
            assert field.description, f"{model.__name__}.{name} has no docstring"
            choices = [c for c in get_args(field.annotation) if isinstance(c, str)]
            missing = [c for c in choices if c not in field.description]
            assert not missing, f"{model.__name__}.{name} does not name {missing}"


def test_lora_alpha_follows_r() -> None:
    """Fails when the default is a number instead of 2 * r."""
    assert LoraConfig(r=5).lora_alpha == 10
    assert LoraConfig(r=5, lora_alpha=3).lora_alpha == 3


def test_scaling() -> None:
    """Fails when the square root is dropped, or r and lora_alpha are swapped."""
    assert LoraConfig(r=4, lora_alpha=6).scaling == 1.5
    assert LoraConfig(r=4, lora_alpha=6, use_rslora=True).scaling == 3.0


def test_a_list_of_target_modules_is_kept_in_order() -> None:
    """Fails when lists are refused by the strict tuple."""
    assert LoraConfig(target_modules=["v_proj", "q_proj"]).target_modules == ("v_proj", "q_proj")


def test_sections_may_be_one_text() -> None:
    """Fails when a shorthand is lost, or stands for another key."""
    given = {"base": "b", "quant": "nf4", "adapter": "full", "data": "d"}
    for section, key in SHORTHAND.items():
        config = RunConfig(**{**NEEDED, section: given[section]})
        assert getattr(getattr(config, section), key) == given[section]


def test_quant_null_is_none() -> None:
    """Fails when null is refused or taken for the default of another format."""
    assert RunConfig(**NEEDED, quant=None).quant.format == "none"


def test_paths_are_text() -> None:
    """Fails when strictness refuses pathlib."""
    config = RunConfig(base=Path("a/b"), data=Path("c.jsonl"), output=Path("o"))
    assert (config.base.path, config.data.path, config.output) == ("a/b", "c.jsonl", "o")


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ({"lr": "1e-4"}, 'lr: expected a number above 0, got "1e-4" (remove the quotes)'),
        ({"batch_size": True}, "batch_size: expected a whole number of at least 1, got true"),
        ({"batch_size": 2.0}, "batch_size: expected a whole number of at least 1, got 2.0"),
        ({"lr": float("inf")}, "lr: expected a number above 0, got inf"),
        ({"lr": float("nan")}, "lr: expected a number above 0, got nan"),
        ({"warmup": 1.0}, "warmup: expected a number of at least 0 and below 1, got 1.0"),
        ({"epoch": 3}, "epoch: unknown key, did you mean `epochs`?"),
        ({"learning_rate": 1e-4}, "learning_rate: unknown key, did you mean `lr`?"),
        ({"zzz": 3}, "zzz: unknown key"),
        ({"schedule": "cosin"}, 'got "cosin", did you mean `cosine`?'),
        ({"eval_every": 0}, "expected a whole number of at least 1 or null, got 0"),
    ],
)
def test_keyword_errors(values: dict[str, Any], text: str) -> None:
    """Fails when types are coerced, bounds are dropped or suggestions are lost."""
    with pytest.raises(ConfigError) as caught:
        TrainConfig(**values)
    assert str(caught.value).startswith("TrainConfig: ")
    assert str(caught.value).endswith(text)


def test_all_problems_come_at_once() -> None:
    """Fails when the first section with a problem hides those of the others."""
    text = refused(adapter={"r": 0}, train={"lr": 0}, outptu="x")
    assert text.splitlines() == [
        "RunConfig has 3 problems",
        "  adapter.r: expected a whole number of at least 1, got 0",
        "  train.lr: expected a number above 0, got 0",
        "  outptu: unknown key, did you mean `output`?",
    ]


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ({"adapter": {"rank": 4}}, "adapter.rank: unknown key, did you mean `r`?"),
        ({"adapter": {"method": "lorra"}}, 'expected one of lora, full, continue, got "lorra"'),
        ({"adapter": {"method": "full", "r": 4}}, "adapter.r: not a key of full"),
        ({"adapter": 3}, "adapter: expected text or a mapping, got 3"),
        ({"adapter": {"target_modules": [1]}}, "expected text or a list of text, got the list [1]"),
        ({"data": {"path": "d", "eval": 5}}, "below 1, text or null, got 5"),
        ({"data": {}}, "data.path: missing, expected text: A file"),
        ({"base": ""}, 'base.path: expected text, got ""'),
        ({"lr": 1e-4}, "lr: unknown key, did you mean `train.lr`?"),
        ({"output_dir": "x"}, "output_dir: unknown key, did you mean `output`?"),
        ({"max_seq_length": 8}, "unknown key, did you mean `data.max_length`?"),
        ({"load_in_8bit": True}, "unknown key, did you mean `quant`?"),
        ({"train": {"packing": True}}, "train.packing: unknown key, leave it out: batches are"),
    ],
)
def test_section_errors_carry_no_union_noise(values: dict[str, Any], text: str) -> None:
    """Fails when pydantic's branch names (`adapter.lora.rank`) reach the user."""
    message = refused(**values)
    assert text in message
    assert "lora.r" not in message
    assert "constrained" not in message
    assert "\n" not in message


def test_full_training_of_a_quantized_base_is_refused() -> None:
    """Fails when the contradiction is found only after the base was loaded."""
    assert "quant nf4 freezes them" in refused(adapter="full", quant="nf4")
    assert RunConfig(**NEEDED, adapter="full").adapter.method == "full"


def test_aliases_lead_to_keys_that_exist() -> None:
    """Fails when a field is renamed and the table still names the old one."""
    known = {
        field.alias or name
        for model in sections(RunConfig)
        for name, field in model.model_fields.items()
    }
    assert set(ALIASES.values()) <= known
    assert not {*ALIASES, *NEEDLESS} & known


def test_a_module_has_the_rank_and_scaling_of_the_first_pattern_that_fits() -> None:
    """Fails when patterns match anywhere in a name, or when alpha's pattern uses the default r."""
    config = LoraConfig(
        r=8,
        lora_alpha=12,
        rank_pattern={"q_proj": 4, r"layers\.[12]\.mlp\.up_proj": 2, "mlp.up_proj": 6},
        alpha_pattern={"q_proj": 10},
    )
    assert config.rank_of("model.layers.0.self_attn.q_proj") == 4
    assert config.rank_of("model.layers.0.self_attn.xq_proj") == 8
    assert config.rank_of("model.layers.1.mlp.up_proj") == 2
    assert config.rank_of("model.layers.3.mlp.up_proj") == 6
    assert config.scaling_of("model.layers.0.self_attn.q_proj") == 2.5
    assert config.scaling_of("model.layers.3.mlp.up_proj") == 2.0
    assert config.scaling_of("model.layers.3.mlp.down_proj") == 1.5


def test_an_adapter_to_go_on_with() -> None:
    """Fails when `from` is dropped by the alias, or r is accepted beside it."""
    adapter = RunConfig(**NEEDED, adapter={"from": Path("a/b")}).adapter
    assert adapter.method == "continue"
    assert adapter.from_ == "a/b"
    assert "adapter.r: not a key of continue" in refused(adapter={"from": "a", "r": 4})


def test_patterns_must_be_regular_expressions() -> None:
    """Fails when a broken expression first shows when layers are matched."""
    assert "`(` is no regular expression" in refused(adapter={"rank_pattern": {"(": 4}})
    assert "mapping from text to a whole number" in refused(adapter={"rank_pattern": 4})


def test_streaming_needs_a_limit() -> None:
    """Fails when an endless data set may be asked for."""
    assert "data.limit" in refused(data={"path": "a/b", "streaming": True})
