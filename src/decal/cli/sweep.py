"""decal sweep: many candidates over one base, from a grid to a recommendation."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from decal.cli import console

if TYPE_CHECKING:
    from decal.verbs.sweep import SweepResult


def sweep(
    run: Annotated[Path, typer.Argument(metavar="RUN.yaml", help="The run that is varied.")],
    grid: Annotated[
        list[str] | None,
        typer.Option("--grid", metavar="KEY=V,V,…", help="Values to try: adapter.r=4,8,16"),
    ] = None,
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Replace one setting for all."),
    ] = None,
    until_plateau: Annotated[
        bool,
        typer.Option("--until-plateau", help="Double r until the evaluation loss stops improving."),
    ] = False,
    threshold: Annotated[
        float | None,
        typer.Option(help="Improvement that counts, as a share of the loss, instead of two seeds."),
    ] = None,
    halving: Annotated[
        bool, typer.Option("--halving", help="End losing candidates early, never the last two.")
    ] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the sweep.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace an existing sweep.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Results for programs.")] = False,
) -> None:
    """\b
    decal sweep run.yaml --grid adapter.r=4,8,16,32,64
    decal sweep run.yaml --grid adapter.r=8,16 --grid train.lr=1e-4,2e-4 --halving
    decal sweep run.yaml --until-plateau

    Trains all combinations side by side over one base. Each leaves a run folder of its own in the
    output folder, with an adapter that is what it would have been alone.
    """
    from decal.runfile import load_run

    config = load_run(run, overrides or [])
    if threshold is not None:
        _check_threshold(threshold, until_plateau)

    from decal.cli.progress import SweepProgress
    from decal.verbs.sweep import Ways
    from decal.verbs.sweep import sweep as run_sweep

    ways = Ways(until_plateau=until_plateau, threshold=threshold, halving=halving)
    values = _grid(grid or ())
    with SweepProgress(console.log()) as progress:
        result = run_sweep(
            config,
            values,
            ways,
            resume=resume,
            force=force,
            observe=progress.observe,
            say=progress.say,
        )
    _print(result, as_json)
    if result.failed:
        raise typer.Exit(1)


def _print(result: SweepResult, as_json: bool) -> None:
    if as_json:
        console.show_json(result.to_dict())
        return
    console.table(result.rows())
    for line in result.lines():
        console.write(line)


def _check_threshold(share: float, until_plateau: bool) -> None:
    from decal.errors import ConfigError

    if not (until_plateau and 0 < share < 1):
        raise ConfigError(
            "--threshold is a share between 0 and 1 that goes with --until-plateau",
            hint="--until-plateau --threshold 0.01",
        )


def _grid(texts: Sequence[str]) -> dict[str, list[Any]]:
    """All --grid options; a key that comes twice has the values of both."""
    grid: dict[str, list[Any]] = {}
    for text in texts:
        key, values = _values(text)
        grid.setdefault(key, []).extend(values)
    return grid


def _values(text: str) -> tuple[str, list[Any]]:
    """`adapter.r=4,8` -> key and values, which are YAML: a list is one value in its brackets."""
    from ruamel.yaml import YAML
    from ruamel.yaml.error import YAMLError

    from decal.errors import ConfigError

    key, equals, listed = text.partition("=")
    try:
        values = YAML(typ="safe", pure=True).load(f"[{listed}]")
    except YAMLError:
        values = None
    if not equals or not key.strip() or not values:
        raise ConfigError(f"--grid `{text}` is not KEY=VALUE,VALUE", hint="--grid adapter.r=4,8,16")
    return key.strip(), list(values)
