"""decal dequantize: a 16-bit model folder from one that bitsandbytes stored quantized."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from decal.cli import console


def dequantize(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A quantized folder or hub id.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for the plain model.")],
    dtype: Annotated[
        Literal["bf16", "fp16", "fp32"], typer.Option(help="Of the written weights.")
    ] = "bf16",
    force: Annotated[bool, typer.Option("--force", help="Replace an existing folder.")] = False,
) -> None:
    """\b
    decal dequantize smollm-nf4 -o smollm-plain

    Writes the weights that the quantized model computes with; what rounding took is not in them.
    """
    from decal.cli.bytes import Bytes
    from decal.verbs.quantize import dequantize as dequantize_model

    with Bytes(console.log(), "dequantizing") as progress:
        done = dequantize_model(model, out, dtype=dtype, force=force, observe=progress.observe)
    console.facts(done.summary())
