"""decal sweep: many candidates over one base, from a grid to a recommendation."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from decal.cli import console

if TYPE_CHECKING:
    from decal.config import RunConfig
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
    memory: Annotated[
        str | None, typer.Option(help="Memory to take, 15GB or 15GiB; more train in waves.")
    ] = None,
    samples: Annotated[
        int, typer.Option(min=0, help="Evaluation rows that all candidates answer at the end.")
    ] = 4,
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
    result = _swept(
        config,
        _grid(grid or ()),
        memory,
        until_plateau=until_plateau,
        threshold=threshold,
        halving=halving,
        samples=samples,
        resume=resume,
        force=force,
    )
    if as_json:
        console.show_json(result.to_dict())
    else:
        _show(result)
    if result.failed:
        raise typer.Exit(1)


def _swept(
    config: RunConfig, grid: dict[str, list[Any]], memory: str | None, **options: Any
) -> SweepResult:
    from decal.cli.progress import SweepProgress
    from decal.plan.units import parse_memory
    from decal.verbs.sweep import sweep as run_sweep

    size = None if memory is None else parse_memory(memory)
    with SweepProgress(console.log()) as progress:
        options |= {"observe": progress.observe, "say": progress.say}
        return run_sweep(config, grid, memory=size, **options)


def _show(result: SweepResult) -> None:
    console.table(result.rows())
    for line in result.lines():
        console.write(line)


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
