"""decal compare: base and adapters on the same prompts or the same data."""

from __future__ import annotations

from collections.abc import Sequence
from os.path import expanduser
from pathlib import Path
from typing import Annotated, Any

import typer

from decal.cli import console
from decal.errors import DecalError

COLUMN = 24
"""Least width in characters at which an answer is readable beside others."""

Adapters = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[BASE] [NAME=]ADAPTER...", help="Folders, or hub ids owner/name[@revision]."
    ),
]
More = Annotated[
    list[str] | None, typer.Option("--adapter", help="NAME=ADAPTER, the same in another place.")
]
Base = Annotated[
    str | None, typer.Option(help="The base, if it is not the one they were trained on.")
]
Prompt = Annotated[
    list[str] | None, typer.Option("--prompt", help="Complete this prompt with each.")
]
Prompts = Annotated[
    Path | None,
    typer.Option(help="A file of prompts: lines, or rows with `prompt` or `messages`."),
]
Data = Annotated[str | None, typer.Option(help="Rows with known answers to measure each on.")]
Limit = Annotated[int | None, typer.Option(min=1, help="Use only so many rows.")]
MaxNewTokens = Annotated[int, typer.Option(min=1, help="Most tokens per answer.")]
RemoteCode = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run code that comes with the base.")
]
OtherBase = Annotated[
    bool,
    typer.Option("--allow-other-base", help="Warn where the base is not that of the training."),
]
Json = Annotated[bool, typer.Option("--json", help="JSON for programs.")]


def compare(
    adapters: Adapters = None,
    more: More = None,
    base: Base = None,
    prompt: Prompt = None,
    prompts: Prompts = None,
    data: Data = None,
    limit: Limit = None,
    max_new_tokens: MaxNewTokens = 64,
    trust_remote_code: RemoteCode = False,
    allow_other_base: OtherBase = False,
    as_json: Json = False,
) -> None:
    """\b
    decal compare r8=runs/r8 r32=runs/r32 --data test.jsonl

    Puts the base and every adapter to the same prompts or rows, in one process, and shows them
    side by side.
    """
    base, named = _sorted_out(adapters or [], more or [], base)
    from decal.cli.waiting import Waiting
    from decal.verbs.compare import compare as compare_adapters
    from decal.verbs.prompts import read_prompts

    asked = [*(prompt or []), *(read_prompts(prompts) if prompts else [])]
    with Waiting(console.log()) as progress:
        found = compare_adapters(
            base,
            named,
            prompts=asked,
            data=data,
            limit=limit,
            max_new_tokens=max_new_tokens,
            trust_remote_code=trust_remote_code,
            allow_other_base=allow_other_base,
            observe=progress.observe,
        )
    if as_json:
        console.show_json(found)
    else:
        _show(found)


def _sorted_out(
    given: Sequence[str], more: Sequence[str], base: str | None
) -> tuple[str | None, dict[str, str]]:
    """The base, if a model is among the paths without a name, and the adapters by name.

    A first path that is no folder here may be a model on the hub. Names are looked at before that:
    asking the hub costs time.
    """
    if base is not None or len(given) + len(more) < 2:
        return base, _named([*given, *more])
    for path in (path for path in given if "=" not in path):
        if Path(expanduser(path)).is_dir() and _is_model(path):
            return path, _named([*(p for p in given if p != path), *more])
    named = _named([*given, *more])
    first = given[0] if given and "=" not in given[0] else None
    if first is not None and not Path(expanduser(first)).exists() and _is_model(first):
        return first, _named([*given[1:], *more])
    return base, named


def _is_model(path: str) -> bool:
    from decal.verbs.target import resolve

    return resolve(path).kind == "model"


def _named(adapters: Sequence[str]) -> dict[str, str]:
    """`NAME=PATH` or PATH, which is named after its folder, a run's `adapter` after the run."""
    named: dict[str, str] = {}
    for given in adapters:
        name, equals, path = given.partition("=")
        if not equals:
            folder = Path(given)
            path, name = given, folder.parent.name if folder.name == "adapter" else folder.name
        if not name or not path:
            raise DecalError(f"`{given}` needs a name and a path", hint="NAME=ADAPTER")
        if name in named:
            raise DecalError(
                f"two adapters are called `{name}`: {named[name]} and {path}",
                hint=f"name them: first={named[name]} second={path}",
            )
        named[name] = path
    return named


def _show(found: dict[str, Any]) -> None:
    """Answers under their prompts, then one line of numbers per model."""
    results: dict[str, dict[str, Any]] = found["results"]
    for i, prompt in enumerate(found.get("prompts", [])):
        answers = {name: values["outputs"][i] for name, values in results.items()}
        if console.out().is_terminal:
            _draw(prompt, answers)
        else:
            _write(prompt, answers)
    measured = [k for k in next(iter(results.values())) if k != "outputs"]
    if measured:
        console.table(
            [{"model": name, **{k: v[k] for k in measured}} for name, v in results.items()]
        )


def _write(prompt: str, answers: dict[str, str]) -> None:
    width = max(len(name) for name in answers)
    console.write(f"prompt: {' '.join(prompt.split())}")
    for name, answer in answers.items():
        console.write(f"  {name:<{width}}  {' '.join(answer.split())}".rstrip())


def _draw(prompt: str, answers: dict[str, str]) -> None:
    """Answers side by side where each has room, else one below the other."""
    from rich.table import Table
    from rich.text import Text

    table = Table(title=Text(f"prompt: {prompt}"), title_justify="left", expand=True)
    if console.out().width // len(answers) >= COLUMN:
        for name in answers:
            table.add_column(Text(name), ratio=1, overflow="fold")
        table.add_row(*(Text(answer) for answer in answers.values()))
    else:
        table.show_lines = True
        table.add_column("model", no_wrap=True, overflow="ellipsis", max_width=COLUMN)
        table.add_column("answer", ratio=1, overflow="fold")
        for name, answer in answers.items():
            table.add_row(Text(name), Text(answer))
    console.out().print(table)
