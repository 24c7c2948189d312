"""decal init: a run.yaml with every setting and its documentation."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer

from decal.cli import console
from decal.errors import OutputError


def init(
    path: Annotated[Path, typer.Argument(help="The file to write; `-` prints it.")] = Path(
        "run.yaml"
    ),
    base: Annotated[
        str, typer.Option(help="Hub id or folder of the base model.")
    ] = "HuggingFaceTB/SmolLM2-135M-Instruct",
    data: Annotated[str, typer.Option(help="A .jsonl file or hub data set.")] = "train.jsonl",
    output: Annotated[str, typer.Option(help="The run folder.")] = "runs/first",
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Any other setting: adapter.r=8"),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an existing file.")] = False,
) -> None:
    """\b
    decal init run.yaml --data tickets.jsonl --set quant=nf4

    Writes the settings of a run, every one with its default and its documentation.
    """
    from decal.runfile import dump_run, parse_run
    from decal.store.files import write_text

    to_stdout = str(path) == "-"
    if not to_stdout:
        _refuse_occupied(path, force)
    given = [f"base={_quoted(base)}", f"data={_quoted(data)}", f"output={_quoted(output)}"]
    text = dump_run(parse_run("{}", name="decal init", overrides=[*given, *(overrides or [])]))
    if to_stdout:
        console.write(text, end="")
        return
    write_text(path, text)
    console.say(f"wrote {path}; next: decal train {shlex.quote(str(path))}")


def _refuse_occupied(path: Path, force: bool) -> None:
    if path.is_dir():
        hint = f"name the file in it: decal init {shlex.quote(str(path / 'run.yaml'))}"
        raise OutputError(f"`{path}` is a folder, not a file", hint=hint)
    if not path.parent.is_dir():
        raise OutputError(f"there is no folder `{path.parent}` to write into", hint="make it first")
    if path.exists() and not force:
        raise OutputError(f"`{path}` exists", hint="--force replaces it")


def _quoted(text: str) -> str:
    """`text` as a YAML text, so that `--base 1e5` is not a number."""
    return "'" + text.replace("'", "''") + "'"
