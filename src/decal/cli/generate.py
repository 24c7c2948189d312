"""decal generate: one prompt, one completion."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from decal.cli import console
from decal.errors import DataError, DecalError, Interrupted

Target = Annotated[
    str, typer.Argument(help="A run, adapter or model: folder or hub id, owner/name[@revision].")
]
Prompt = Annotated[str | None, typer.Argument(help="The prompt; `-` reads it from stdin.")]
File = Annotated[Path | None, typer.Option(help="Read the prompt from this text file.")]
Adapter = Annotated[str | None, typer.Option(help="An adapter to put on TARGET.")]
System = Annotated[str | None, typer.Option(help="A system message before the prompt.")]
Chat = Annotated[
    bool | None,
    typer.Option(
        "--chat/--plain", help="Use the chat template, or not; by default if there is one."
    ),
]
MaxNewTokens = Annotated[int, typer.Option(min=1, help="Most tokens to generate.")]
Temperature = Annotated[float, typer.Option(min=0.0, help="0 always takes the likeliest token.")]
TopP = Annotated[
    float,
    typer.Option(min=0.0, max=1.0, help="Sample among the likeliest with this probability."),
]
TopK = Annotated[int | None, typer.Option(min=1, help="Sample among so many of the likeliest.")]
Seed = Annotated[int, typer.Option(min=0, help="For temperatures above 0.")]
RemoteCode = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run code that comes with the model.")
]
OtherBase = Annotated[
    bool,
    typer.Option("--allow-other-base", help="Warn where the base is not that of the training."),
]
Json = Annotated[bool, typer.Option("--json", help="JSON for programs.")]


def generate(
    target: Target,
    prompt: Prompt = None,
    file: File = None,
    adapter: Adapter = None,
    system: System = None,
    chat: Chat = None,
    max_new_tokens: MaxNewTokens = 256,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    top_k: TopK = None,
    seed: Seed = 0,
    trust_remote_code: RemoteCode = False,
    allow_other_base: OtherBase = False,
    as_json: Json = False,
) -> None:
    """\b
    decal generate runs/tickets "The invoice shows the wrong amount."

    Completes a prompt with a model or a trained adapter; the text streams to stdout. A model that
    classifies answers with a label and its probability.
    """
    text = _prompt(prompt, file)
    from decal.verbs.generate import generate as complete

    streamed: list[str] = []

    def show(piece: str) -> None:
        streamed.append(piece)
        console.write(piece, end="")

    try:
        made = complete(
            target,
            text,
            adapter=adapter,
            system=system,
            chat=chat,
            stream=None if as_json else show,
            trust_remote_code=trust_remote_code,
            allow_other_base=allow_other_base,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_p=top_p,
            top_k=top_k,
            seed=seed,
        )
    except KeyboardInterrupt:
        if streamed:
            console.write("")
        raise Interrupted("the text ends before the model was done") from None
    if as_json:
        console.show_json(_facts(target, text, made))
    elif made.probability is not None:
        console.write(f"{made}  {made.probability:.1%}")
    else:
        console.write("")


def _prompt(given: str | None, file: Path | None) -> str:
    """The prompt from the one place that was named."""
    if (given is None) == (file is None):
        what = "there is no prompt" if given is None else "there are two prompts"
        raise DecalError(what, hint="give PROMPT, or `-` to read stdin, or --file FILE")
    if file is None:
        return sys.stdin.read() if given == "-" else str(given)
    try:
        return file.read_text(encoding="utf-8")
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise DataError(f"the prompt file `{file}` cannot be read: {reason}") from None
    except UnicodeDecodeError:
        raise DataError(f"the prompt file `{file}` is not UTF-8 text") from None


def _facts(target: str, prompt: str, made: Any) -> dict[str, Any]:
    if made.probability is not None:
        return {
            "target": target,
            "prompt": prompt,
            "label": str(made),
            "probability": made.probability,
        }
    return {
        "target": target,
        "prompt": prompt,
        "completion": str(made),
        "prompt_tokens": made.prompt_tokens,
        "new_tokens": made.new_tokens,
        "finished": made.finished,
    }
