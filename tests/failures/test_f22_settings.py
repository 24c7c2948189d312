"""F22: `1e-5` in a YAML file arrives as text, and settings with a typing error are ignored."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from decal.config import LoraConfig, RunConfig, TrainConfig
from decal.errors import ConfigError
from decal.runfile import parse_run

RUN = "base: b\nadapter: {r: 8}\ndata: {path: t.jsonl}\noutput: out\ntrain: {lr: 1e-5}\n"


@pytest.mark.parametrize(
    ("written", "number"), [("1e-5", 1e-5), ("2E-4", 2e-4), ("1.e-3", 1e-3), ("5e-05", 5e-5)]
)
def test_numbers_are_numbers(written: str, number: float) -> None:
    """YAML 1.2 with and without a point. By hand: the usual reader gives text.

    Fails when the file is read as YAML 1.1.
    """
    config = parse_run(RUN.replace("1e-5", written))
    assert config.train.lr == number
    theirs = yaml.safe_load(f"lr: {written}")["lr"]
    assert theirs == (number if written == "1.e-3" else written)


def test_words_are_words() -> None:
    """`no` is a folder's name like any other. By hand: the usual reader gives False."""
    assert parse_run(RUN.replace("output: out", "output: no")).output == "no"
    assert yaml.safe_load("output: no") == {"output": False}


@pytest.mark.parametrize("written", ['"1e-5"', "1e-5x", "true", "[1e-5]"])
def test_what_is_no_number_is_refused_with_its_line(written: str) -> None:
    """Fails when text, a switch or a list passes for a number."""
    with pytest.raises(ConfigError, match=r"run.yaml:5: train\.lr"):
        parse_run(RUN.replace("1e-5", written))


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("adapter: {rank: 64}", "adapter.rank"),
        ("adapter: {lora_aplha: 64}", "did you mean `lora_alpha`"),
        ("adapter: {target_module: q_proj}", "did you mean `target_modules`"),
        ("adapters: {r: 64}", "did you mean `adapter`"),
    ],
)
def test_unknown_keys_are_refused(line: str, said: str) -> None:
    """Named with their line and the nearest key. Fails when they are ignored."""
    with pytest.raises(ConfigError) as error:
        parse_run(RUN.replace("adapter: {r: 8}", line))
    assert "run.yaml:2" in str(error.value)
    assert said in str(error.value)


def test_ignored_they_leave_the_default() -> None:
    """The guard away: with unknown keys ignored another rank is trained, in silence."""

    class Loose(LoraConfig, extra="ignore"):
        pass

    assert Loose.model_validate({"rank": 64, "lora_aplha": 128}) == Loose()
    with pytest.raises(ConfigError, match="rank"):
        LoraConfig(rank=64, lora_aplha=128)  # type: ignore[call-arg]


def test_keyword_arguments_and_overrides_obey_the_same_rules() -> None:
    """Fails when Python or the command line may say what the file may not."""
    with pytest.raises(ConfigError, match="learning_rate"):
        TrainConfig(learning_rate=1e-5)  # type: ignore[call-arg]
    with pytest.raises(ConfigError, match="lr"):
        TrainConfig(lr="1e-5")  # type: ignore[arg-type]
    assert parse_run(RUN, overrides=["train.lr=3e-5"]).train.lr == 3e-5
    with pytest.raises(ConfigError, match=r"train\.lrr"):
        parse_run(RUN, overrides=["train.lrr=3e-5"])


def test_all_of_them_at_once(tmp_path: Path) -> None:
    """Counted, in one error. Fails when the first problem hides the second."""
    text = RUN.replace("{r: 8}", "{rank: 8}").replace("{lr: 1e-5}", "{lr: fast}")
    with pytest.raises(ConfigError) as error:
        parse_run(text)
    assert "rank" in str(error.value)
    assert "lr" in str(error.value)
    assert "2" in error.value.message
    assert RunConfig.model_fields.keys() >= {"base", "adapter", "data", "train", "output"}
