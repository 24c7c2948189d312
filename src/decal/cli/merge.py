"""decal merge: an adapter folded into its base, tensor by tensor."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from decal.cli import console
from decal.errors import DecalError


def merge(
    paths: Annotated[
        list[str],
        typer.Argument(metavar="[BASE] ADAPTER", help="Folders or hub ids, owner/name[@revision]."),
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for the merged model.")],
    dtype: Annotated[
        Literal["keep", "bf16", "fp16", "fp32"], typer.Option(help="Of the written weights.")
    ] = "keep",
    onto: Annotated[
        Literal["trained", "original"] | None,
        typer.Option(help="For QLoRA: the dequantized weights of training, or the base's own."),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an existing folder.")] = False,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run code that comes with the base.")
    ] = False,
    allow_other_base: Annotated[
        bool,
        typer.Option("--allow-other-base", help="Warn where the base is not that of the training."),
    ] = False,
) -> None:
    """\b
    decal merge runs/tickets -o merged

    Writes the base with the adapter's update added, as a plain model folder that needs no decal.
    BASE may be left out where the adapter says what it was trained on.
    """
    from decal.cli.bytes import Bytes
    from decal.verbs.merge import merge as merge_adapter

    if len(paths) > 2:
        raise DecalError(
            f"merge takes [BASE] ADAPTER, got {len(paths)} paths: {', '.join(paths)}",
            hint="decal merge BASE ADAPTER -o OUT",
        )
    base = paths[0] if len(paths) == 2 else None
    with Bytes(console.log(), "merging") as progress:
        merged = merge_adapter(
            base,
            paths[-1],
            out,
            dtype=dtype,
            onto=onto,
            force=force,
            trust_remote_code=trust_remote_code,
            allow_other_base=allow_other_base,
            observe=progress.observe,
        )
    console.facts(merged.summary())
