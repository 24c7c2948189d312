"""decal verify: whether an adapter, model or run is still what was written."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from decal.cli import console


def verify(
    path: Annotated[
        str,
        typer.Argument(help="A run, adapter or model: folder, or hub id owner/name[@revision]."),
    ],
    base: Annotated[
        str | None, typer.Option(help="The base, if it is not where it was recorded.")
    ] = None,
    adapter: Annotated[
        str | None, typer.Option(help="Of a merged model the adapter, if it is not where it was.")
    ] = None,
    full: Annotated[
        bool, typer.Option("--full", help="Also pack the base again and compare the codes.")
    ] = False,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run code that comes with the base.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="JSON for programs.")] = False,
) -> None:
    """\b
    decal verify runs/tickets

    Checks again what is stored: headers, numbers, hashes, the base, and of a merged model every
    number against base and adapter. Exit code 1 if anything is wrong; all of it is listed.
    """
    from rich.progress import TaskProgressColumn

    from decal.cli.waiting import Waiting
    from decal.verbs.verify import verify as verify_path

    with Waiting(console.log(), TaskProgressColumn()) as progress:
        found = verify_path(
            path,
            base=base,
            adapter=adapter,
            full=full,
            trust_remote_code=trust_remote_code,
            observe=progress.observe,
        )
    if as_json:
        console.show_json(found)
    else:
        _show(found)
    if found["problems"]:
        raise typer.Exit(1)


def _show(found: dict[str, Any]) -> None:
    problems, checks = found["problems"], found["checks"]
    console.table(checks)
    if len(problems) > sum(row["result"] == "PROBLEM" for row in checks):
        console.write("\nall problems")
        for problem in problems:
            console.write(f"  {problem}")
    made = sum(row["result"] != "not checked" for row in checks)
    verdict = f"{len(problems)} problems" if problems else "no problems"
    console.write(f"\n{found['kind']} {found['path']}: {verdict} in {made} checks")
