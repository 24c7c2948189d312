"""decal train: one run, from its settings to its adapter."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from decal.cli import console


def train(
    run: Annotated[Path, typer.Argument(metavar="RUN.yaml", help="The settings of the run.")],
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Replace one setting: train.lr=1e-4"),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the last checkpoint.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check everything, show the plan, train nothing.")
    ] = False,
    no_check: Annotated[
        bool, typer.Option("--no-check", help="Train in spite of what `decal check` warns of.")
    ] = False,
    allow_other_base: Annotated[
        bool,
        typer.Option("--allow-other-base", help="Warn where adapter.from had another base."),
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace an existing run folder.")] = False,
) -> None:
    """\b
    decal train run.yaml --set train.lr=1e-4 --set output=runs/lower-lr

    Trains what RUN.yaml describes and leaves settings, metrics, checkpoints and a PEFT adapter in
    its output folder. Ctrl-C finishes the step and saves; --resume goes on from there.
    `decal init` writes a RUN.yaml with every setting explained.
    """
    from decal.runfile import load_run

    config = load_run(run, overrides or [])

    from decal.cli.progress import TrainingProgress
    from decal.verbs.train import train as train_run

    with TrainingProgress(console.log()) as progress:
        result = train_run(
            config,
            resume=resume,
            force=force,
            dry_run=dry_run,
            check=not no_check,
            allow_other_base=allow_other_base,
            observe=progress.observe,
            say=progress.say,
        )
    if result is not None:
        console.facts(result.summary())
