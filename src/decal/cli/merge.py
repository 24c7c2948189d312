"""decal merge: an adapter folded into its base, tensor by tensor."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from decal.cli import console
from decal.errors import DecalError

Paths = Annotated[
    list[str],
    typer.Argument(metavar="[BASE] ADAPTER", help="Folders or hub ids, owner/name[@revision]."),
]
Out = Annotated[Path, typer.Option("--out", "-o", help="Folder for the merged model.")]
Dtype = Annotated[
    Literal["keep", "bf16", "fp16", "fp32"], typer.Option(help="Of the written weights.")
]
Onto = Annotated[
    Literal["trained", "original"] | None,
    typer.Option(help="For QLoRA: the dequantized weights of training, or the base's own."),
]
Quantize = Annotated[
    Literal["nf4", "fp4", "int8"] | None,
    typer.Option(help="Pack the merged weights again, if the update outlives it."),
]
Verify = Annotated[
    str | None,
    typer.Option(
        metavar="logits|DATA",
        help="Also compare the merged model with base + adapter, on random tokens or rows.",
    ),
]
Force = Annotated[bool, typer.Option("--force", help="Replace an existing folder.")]
RemoteCode = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run code that comes with the base.")
]
OtherBase = Annotated[
    bool,
    typer.Option("--allow-other-base", help="Warn where the base is not that of the training."),
]
Json = Annotated[bool, typer.Option("--json", help="JSON for programs.")]


def merge(
    paths: Paths,
    out: Out,
    dtype: Dtype = "keep",
    onto: Onto = None,
    quantize: Quantize = None,
    verify: Verify = None,
    force: Force = False,
    trust_remote_code: RemoteCode = False,
    allow_other_base: OtherBase = False,
    as_json: Json = False,
) -> None:
    """\b
    decal merge runs/tickets -o merged

    Writes the base with the adapter's update added, as a plain model folder that needs no decal.
    What was written is read again and held against base and adapter before it gets its name.
    BASE may be left out where the adapter says what it was trained on.
    """
    from rich.progress import TaskProgressColumn

    from decal.cli.waiting import Waiting
    from decal.verbs.merge import merge as merge_adapter

    if len(paths) > 2:
        raise DecalError(
            f"merge takes [BASE] ADAPTER, got {len(paths)} paths: {', '.join(paths)}",
            hint="decal merge BASE ADAPTER -o OUT",
        )
    base = paths[0] if len(paths) == 2 else None
    with Waiting(console.log(), TaskProgressColumn()) as progress:
        merged = merge_adapter(
            base,
            paths[-1],
            out,
            dtype=dtype,
            onto=onto,
            quantize=quantize,
            verify=verify,
            force=force,
            trust_remote_code=trust_remote_code,
            allow_other_base=allow_other_base,
            observe=progress.observe,
        )
    if as_json:
        console.show_json(merged.summary())
    else:
        console.facts(merged.readable())
