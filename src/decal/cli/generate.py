"""decal generate: one prompt, one completion."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from decal.cli import console


def generate(
    target: Annotated[str, typer.Argument(help="A run, an adapter, a model folder or a hub id.")],
    prompt: Annotated[str, typer.Argument(help="The prompt; `-` reads it from stdin.")],
    adapter: Annotated[str | None, typer.Option(help="An adapter to put on TARGET.")] = None,
    chat: Annotated[
        bool | None,
        typer.Option(
            "--chat/--plain", help="Use the chat template, or not; by default if there is one."
        ),
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Most tokens to generate.")] = 256,
    temperature: Annotated[
        float, typer.Option(min=0.0, help="0 always takes the likeliest.")
    ] = 0.0,
    seed: Annotated[int, typer.Option(min=0, help="For temperatures above 0.")] = 0,
) -> None:
    """\b
    decal generate runs/tickets "The invoice shows the wrong amount."

    Completes a prompt with a model or a trained adapter; the text streams to stdout.
    """
    from decal.verbs.generate import generate as complete

    complete(
        target,
        sys.stdin.read() if prompt == "-" else prompt,
        adapter=adapter,
        chat=chat,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        seed=seed,
        stream=lambda text: console.write(text, end=""),
    )
    console.write("")
