"""decal plan: what a training will need, before any of it is spent."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from decal.cli import console


def plan(
    what: Annotated[
        str,
        typer.Argument(metavar="MODEL|RUN.yaml", help="A well-known model, hub id, folder or run."),
    ],
    memory: Annotated[
        str | None, typer.Option(metavar="AMOUNT", help="What there is: 15GB, 15GiB or 24G (2^30).")
    ] = None,
    device: Annotated[
        str | None, typer.Option(metavar="NAME", help="A GPU by name: t4, 4090, a100-80, h100.")
    ] = None,
    seq: Annotated[int | None, typer.Option(min=8, help="Tokens of a sample; 2048.")] = None,
    batch: Annotated[int | None, typer.Option(min=1, help="Samples of a step; 8.")] = None,
    r: Annotated[int | None, typer.Option("--r", min=1, help="Rank; 16.")] = None,
    targets: Annotated[
        str | None, typer.Option(help="Target modules: all-linear, attention, q_proj,v_proj.")
    ] = None,
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Of RUN.yaml, replace one setting."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="JSON for programs.")] = False,
) -> None:
    """\b
    decal plan llama-3.1-8b --memory 24GB
    decal plan run.yaml --device t4 --set adapter.r=64

    Memory, disk, operations and time of full fine-tuning, LoRA and QLoRA, from config.json alone.
    Well-known models need no network. Exit code 1 if the run, or every way, needs more than AMOUNT.
    """
    from pathlib import Path

    from decal.runfile import load_run
    from decal.verbs.plan import plan as plan_for

    chosen = {"seq": seq, "batch": batch, "r": r, "targets": _targets(targets)}
    options = {key: value for key, value in chosen.items() if value is not None}
    run = what.endswith((".yaml", ".yml"))
    _refuse_mixed(what, run, list(options), overrides)
    asked = load_run(Path(what), overrides or []) if run else what
    found = plan_for(asked, memory=memory, device=device, **options)
    if as_json:
        console.show_json(found.to_dict())
    else:
        console.write("\n".join(found.lines()))
    if found.fits is False:
        raise typer.Exit(1)


def _targets(text: str | None) -> Any:
    """`q_proj,v_proj` as a list, a word for several layers (all-linear, attention) as it is."""
    if text is None or ("," not in text and "_" not in text):
        return text
    return [name for name in text.split(",") if name]


def _refuse_mixed(what: str, run: bool, options: list[str], overrides: list[str] | None) -> None:
    """A run.yaml has settings of its own, and a model has none to replace."""
    from decal.errors import ConfigError

    if run and options:
        raise ConfigError(
            f"--{options[0]} is of a model, and `{what}` has settings of its own",
            hint="use --set: data.max_length, train.batch_size, adapter.r, adapter.target_modules",
        )
    if overrides and not run:
        raise ConfigError(
            f"--set replaces a setting of a run.yaml, and `{what}` is a model",
            hint="use --seq, --batch, --r and --targets",
        )
