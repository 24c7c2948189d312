"""A grid becomes runs: their settings, names and groups, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from decal.config import LoraConfig, RunConfig
from decal.errors import ConfigError
from decal.verbs.grid import MOST, candidates, groups, joinable, lines


def run(**changes: Any) -> RunConfig:
    return RunConfig(**{"base": "b", "data": "d.jsonl", "output": "out/s", **changes})


def names(config: RunConfig, **grid: Any) -> list[str]:
    found = candidates(config, {key.replace("__", "."): values for key, values in grid.items()})
    assert all(Path(each.config.output) == Path("out/s") / each.name for each in found)
    return [each.name for each in found]


def test_all_combinations_in_order() -> None:
    """Fails when the first key varies fastest, or a setting does not arrive."""
    found = candidates(run(), {"adapter.r": [4, 8], "train.lr": [1e-4, 0.05]})
    assert [each.name for each in found] == ["r4-lr1e-4", "r4-lr0_05", "r8-lr1e-4", "r8-lr0_05"]
    assert found[3].changes == {"adapter.r": 8, "train.lr": 0.05}
    assert isinstance(found[3].config.adapter, LoraConfig)
    assert (found[3].config.adapter.r, found[3].config.train.lr) == (8, 0.05)


@pytest.mark.parametrize(
    ("key", "value", "name"),
    [
        ("adapter.lora_alpha", 16, "alpha16"),
        ("adapter.lora_dropout", 0.0, "dropout0"),
        ("adapter.use_rslora", True, "use_rslora_true"),
        ("adapter.target_modules", "all-linear", "targets_all-linear"),
        ("adapter.target_modules", ["q_proj", "v_proj"], "targets_the_list_q_proj_v_proj"),
        ("train.early_stopping", None, "early_stopping_null"),
        ("train.seed", 12345678, "seed12345678"),
        ("train.schedule", "constant", "schedule_constant"),
        ("train.weight_decay", 1e-30, "decay1e-30"),
    ],
)
def test_names_can_be_folders_and_adapters(key: str, value: Any, name: str) -> None:
    """Fails when a name cannot be read, or holds what a path or an adapter may not."""
    config = run(data={"path": "d.jsonl", "eval": 0.1})
    [each] = candidates(config, {key: [value]})
    assert each.name == name
    assert each.name.replace("-", "_").isidentifier()


def test_values_that_differ_in_signs_alone_keep_apart() -> None:
    """Fails when two candidates share a folder, or are taken for one."""
    found = names(run(), adapter__target_modules=[".*q_proj", ".*q.proj", "Q_proj"])
    assert len({name.lower() for name in found}) == 3
    assert len(names(run(), train__lr=[1.2345671e-4, 1.2345674e-4])) == 2
    long = names(run(), adapter__target_modules=["a" * 400, "a" * 401])
    assert len(set(long)) == 2
    assert max(map(len, long)) < 100


@pytest.mark.parametrize("values", [[4, 4], [4, 8, 4]])
def test_the_same_twice_is_refused(values: list[int]) -> None:
    with pytest.raises(ConfigError, match="settings of another"):
        candidates(run(), {"adapter.r": values})
    with pytest.raises(ConfigError, match="settings of another"):
        candidates(run(), {"adapter.lora_alpha": [16, 16.0]})


def test_alpha_follows_the_rank_where_it_did() -> None:
    """Fails when a named alpha moves, or one that was left out stays."""
    for adapter, alphas in ((None, [8, 128]), ({"r": 8, "lora_alpha": 20}, [20, 20])):
        config = run() if adapter is None else run(adapter=adapter)
        found = [each.config.adapter for each in candidates(config, {"adapter.r": [4, 64]})]
        assert [a.lora_alpha for a in found if isinstance(a, LoraConfig)] == alphas
    both = candidates(run(), {"adapter.r": [4, 8], "adapter.lora_alpha": [10]})
    assert [getattr(each.config.adapter, "lora_alpha", None) for each in both] == [10, 10]
    assert lines(run(), {"adapter.r": [4]}) == ["lora_alpha is 2 r for every r"]
    [line] = lines(run(adapter={"r": 8, "lora_alpha": 20}), {"adapter.r": [4]})
    assert "lora_alpha stays 20" in line


def test_groups_share_a_base() -> None:
    """Fails when settings that say how the base is run are mixed, or seeds need a base each."""
    config = run()
    joined: dict[str, list[Any]] = {
        "adapter.r": [4, 8],
        "train.lr": [1e-4, 1e-3],
        "train.seed": [0, 1],
        "train.schedule": ["linear", "cosine"],
        "train.batch_size": [4, 8],
    }
    for key, values in joined.items():
        assert len(list(groups(candidates(config, {key: values})))) == 1, key
    apart: dict[str, list[Any]] = {
        "quant": ["nf4", "none"],
        "base.dtype": ["float32", "bfloat16"],
        "data.max_length": [64, 128],
        "train.micro_batch_tokens": [512, 1024],
        "train.gradient_checkpointing": [True, False],
    }
    for key, values in apart.items():
        grid = {"adapter.r": [4, 8], key: values}
        found = list(groups(candidates(config, grid)))
        assert [len(group) for group in found] == [2, 2], key


def test_what_is_trained_whole_is_not_joined() -> None:
    assert joinable(run())
    assert joinable(run(adapter={"bias": "lora_only"}))
    assert not joinable(run(adapter={"from": "x"}))  # it may hold modules whole
    assert not joinable(run(adapter={"modules_to_save": ["lm_head"]}))
    assert not joinable(run(adapter={"bias": "all"}))
    assert not joinable(run(objective="classify"))


@pytest.mark.parametrize(
    ("grid", "says"),
    [
        ({}, "needs something to vary"),
        ({"adapter.r": []}, "`adapter.r` has no values"),
        ({"adapter.rr": [1]}, "unknown key, did you mean `r`?"),
        ({"rank": [1]}, "did you mean `adapter.r`"),
        ({"trian.lr": [1e-3]}, "did you mean `train`"),
        ({"adapter.r": [0]}, "a whole number of at least 1, got 0"),
        ({"adapter.r": [4.5]}, "a whole number of at least 1, got 4.5"),
        ({"train.lr": ["big"]}, 'a number above 0, got "big"'),
        ({"train.lr": [None]}, "a number above 0, got null"),
        ({"output": ["x", "y"]}, "`output` cannot be varied"),
        ({"adapter.method": ["lora", "full"]}, "`adapter.method` cannot be varied"),
        ({"adapter.r.x": [1]}, "`adapter.r.x` cannot be varied: `r` is 16"),
        ({"objective.x": [1]}, '`objective.x` cannot be varied: `objective` is "sft"'),
        ({"train.seed": list(range(MOST + 1))}, f"at most {MOST}"),
    ],
)
def test_what_is_no_grid(grid: dict[str, list[Any]], says: str) -> None:
    """Fails when a wrong key or value is found by pydantic alone, or not at all."""
    with pytest.raises(ConfigError) as caught:
        candidates(run(), grid)
    assert says in str(caught.value)


def test_full_fine_tuning_has_no_adapter_to_compare() -> None:
    with pytest.raises(ConfigError, match="trains the base itself"):
        candidates(run(adapter={"method": "full"}), {"train.lr": [1e-4]})
