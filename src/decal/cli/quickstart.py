"""decal quickstart: the whole way once, on a small embedded base, without the network."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from decal.cli import console


def quickstart(
    out: Annotated[Path, typer.Option("--out", help="Folder for what it leaves.")] = Path(
        "quickstart"
    ),
    as_json: Annotated[bool, typer.Option("--json", help="JSON for programs.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace an earlier quickstart.")] = False,
) -> None:
    """\b
    decal quickstart

    Quantizes an embedded base, trains a QLoRA adapter on it, scores both, merges, and checks that
    the saved, the reloaded and the merged model predict the same. Downloads nothing.
    """
    from decal.cli.progress import TrainingProgress
    from decal.verbs.quickstart import quickstart as show

    with TrainingProgress(console.log()) as progress:
        found = show(
            out,
            force=force,
            say=progress.say,
            observe=progress.observe,
            colour=console.log().color_system is not None,
        )
    if as_json:
        console.show_json(found)
        return
    console.write(
        f"""
run       {found["run"]}  (report.html, settings, metrics)
adapter   {found["adapter"]}  (a PEFT adapter)
merged    {found["merged"]}  (a plain transformers model)

next:
  decal inspect {found["adapter"]}
  decal generate {found["run"]} "Route this ticket:\\nThe app cannot find my lamp."
  decal compare qlora={found["run"]} --data {out / "test.jsonl"} --limit 200
  decal init run.yaml        then name your own base and data in it"""
    )
