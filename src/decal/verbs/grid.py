"""What a sweep tries: a grid of settings becomes candidates, each a run of its own.

Knows settings and names; no models and no training.

A candidate is the run that the sweep began from with some settings of its own. Those of the adapter
and of training may differ between candidates that go through the base together; where anything else
does, the base, its quantization, the data, they are separate groups.

`lora_alpha` of 2 r, which is also what a left out one is, stays 2 r when r varies: otherwise the
scaling would change with the rank, and the ranks could not be compared. Another value stays.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from decal.config import FullConfig, LoraConfig, RunConfig
from decal.errors import ConfigError
from decal.problems import config_error, describe

MOST = 64
"""Candidates of one sweep."""
ALONE = ("gradient_checkpointing", "micro_batch_tokens")
"""Settings of training that say how the base is run, and so hold for all that share it."""
_SHORT = {
    "lora_alpha": "alpha",
    "lora_dropout": "dropout",
    "target_modules": "targets",
    "weight_decay": "decay",
    "learning_rate": "lr",
}
"""Settings whose usual name is shorter."""
RESERVED = ("base", "default")
LONGEST = 80
"""Letters of a name; folders have room for 255."""


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """One run of a sweep."""

    name: str
    """Of its adapter and of its folder in the sweep's."""
    changes: dict[str, Any]
    """The settings that are its own, by dotted key."""
    config: RunConfig

    def entry(self, status: str, why: str | None = None) -> dict[str, Any]:
        """Its line in sweep.json."""
        return {"name": self.name, "settings": self.changes, "status": status, "why": why}


def candidates(config: RunConfig, grid: Mapping[str, Sequence[Any]]) -> list[Candidate]:
    """All combinations of the grid's values, in its order, the last key varying fastest.

    Args:
        config: where the sweep begins; `output` is its folder.
        grid: dotted keys of settings and their values.

    Raises:
        ConfigError: no values, unknown keys, values of the wrong type, twice the same, more than
            `MOST` combinations, or something that a sweep cannot vary.
    """
    _refuse(config, grid)
    found: list[Candidate] = []
    for values in product(*grid.values()):
        changes = dict(zip(grid, values, strict=True))
        found.append(candidate(config, changes))
    settings = [each.config.model_copy(update={"output": ""}) for each in found]
    twice = [e.name for e, own in zip(found, settings, strict=True) if settings.count(own) > 1]
    if twice:
        raise ConfigError(
            f"the grid has {len(twice)} candidates with the settings of another",
            details=twice[:1],
            hint="name every value of --grid once",
        )
    return _apart(found)


def _apart(found: list[Candidate]) -> list[Candidate]:
    """Values that differ in signs alone have one name: the later ones get a number."""
    names: list[str] = []
    for i, each in enumerate(found):
        name, number = each.name, 1
        while name.lower() in names:
            number += 1
            name = f"{each.name}_{number}"
        names.append(name.lower())
        if name != each.name:
            output = str(Path(each.config.output).with_name(name))
            own = each.config.model_copy(update={"output": output})
            found[i] = replace(each, name=name, config=own)
    return found


def candidate(config: RunConfig, changes: Mapping[str, Any]) -> Candidate:
    """The run with these settings, in a folder of its own below the sweep's; raises ConfigError."""
    name = _name(changes)
    output = str(Path(config.output) / name)
    return Candidate(
        name=name,
        changes=dict(changes),
        config=varied(config, {**changes, "output": output}),
    )


def varied(config: RunConfig, changes: Mapping[str, Any]) -> RunConfig:
    """The settings with some others, by dotted key.

    Raises ConfigError, as a run.yaml does, for keys and values that are none.
    """
    values: dict[str, Any] = config.model_dump(by_alias=True)
    adapter = config.adapter
    if (
        isinstance(adapter, LoraConfig)
        and adapter.lora_alpha == 2 * adapter.r
        and "adapter.r" in changes
    ):
        values["adapter"]["lora_alpha"] = None
    for key, value in changes.items():
        *path, leaf = key.split(".")
        section = values
        for part in path:
            before = section.get(part)
            section = section.setdefault(part, {})
            if not isinstance(section, dict):
                raise ConfigError(
                    f"`{key}` cannot be varied: `{part}` is {describe(before)} and has no settings"
                    " of its own"
                )
        section[leaf] = value
    try:
        return RunConfig.model_validate(values)
    except ValidationError as error:
        raise config_error(error, RunConfig, "the grid") from None


def groups(found: Sequence[Candidate]) -> Iterator[list[Candidate]]:
    """Candidates that may share a base, in order of the first of each group."""
    by_key: dict[str, list[Candidate]] = {}
    for each in found:
        by_key.setdefault(shared(each.config), []).append(each)
    yield from by_key.values()


def joinable(config: RunConfig) -> bool:
    """Whether its rows can go through the base beside others'.

    A module that is trained whole has one set of parameters for all rows.
    """
    adapter = config.adapter
    if not isinstance(adapter, LoraConfig) or config.objective == "classify":
        return False
    return not adapter.modules_to_save and adapter.bias != "all"


def lines(config: RunConfig, grid: Mapping[str, Sequence[Any]]) -> list[str]:
    """What should be known of a grid before it is trained."""
    found = []
    if "train.seed" in grid and isinstance(config.data.eval, float):
        found.append(
            "every seed holds out other rows for evaluation: compare losses of one seed, or name a"
            " file in data.eval"
        )
    return [*found, *_of_alpha(config, grid)]


def _of_alpha(config: RunConfig, grid: Mapping[str, Sequence[Any]]) -> list[str]:
    adapter = config.adapter
    if "adapter.r" not in grid or not isinstance(adapter, LoraConfig):
        return []
    if "adapter.lora_alpha" in grid or adapter.use_rslora:
        return []
    if adapter.lora_alpha == 2 * adapter.r:
        return ["lora_alpha is 2 r for every r"]
    return [
        f"lora_alpha stays {adapter.lora_alpha:g}, so the scaling lora_alpha / r falls as r rises;"
        " leave lora_alpha out to have 2 r"
    ]


def _refuse(config: RunConfig, grid: Mapping[str, Sequence[Any]]) -> None:
    if isinstance(config.adapter, FullConfig):
        raise ConfigError(
            "a sweep compares adapters, and adapter.method full trains the base itself",
            hint="set adapter.method: lora, or train the runs one by one",
        )
    if not grid:
        raise ConfigError("a sweep needs something to vary", hint="--grid adapter.r=4,8,16")
    count = 1
    for key, values in grid.items():
        if not values:
            raise ConfigError(f"`{key}` has no values", hint=f"--grid {key}=VALUE,VALUE")
        if key == "output" or key == "adapter.method":
            raise ConfigError(f"`{key}` cannot be varied in a sweep")
        count *= len(values)
    if count > MOST:
        raise ConfigError(
            f"the grid has {count:,} candidates, a sweep takes at most {MOST}",
            hint="fewer values, or several sweeps",
        )


def shared(config: RunConfig) -> str:
    """What candidates of one group have in common."""
    values = config.model_dump(mode="json", exclude={"adapter", "output"})
    train = values["train"]
    values["train"] = {key: train[key] for key in ALONE}
    return repr(values)


def _number(value: float) -> str:
    """0.0002 -> 2e-4, 0.05 -> 0_05: letters that a folder and an adapter may have."""
    text = f"{value:e}" if 0 < abs(value) < 0.01 else f"{value:g}"
    digits, _, power = text.partition("e")
    digits = digits.rstrip("0").rstrip(".") if "." in digits else digits
    return f"{digits}e{int(power)}" if power else digits


def _name(changes: Mapping[str, Any]) -> str:
    parts = []
    for key, value in changes.items():
        leaf = key.rpartition(".")[2]
        text = f"_{describe(value)}"
        if isinstance(value, int | float) and not isinstance(value, bool):
            text = _number(value) if isinstance(value, float) else str(value)
        parts.append(_SHORT.get(leaf, leaf) + re.sub(r"[^A-Za-z0-9-]+", "_", text).rstrip("_"))
    name = "-".join(parts)[:LONGEST].rstrip("_-") or "candidate"
    return f"{name}_" if name in RESERVED else name
