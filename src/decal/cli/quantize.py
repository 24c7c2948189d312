"""decal quantize: a model folder with 4- or 8-bit weights, as bitsandbytes stores them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from decal.cli import console


def quantize(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Folder or hub id, 16 or 32 bits.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for the quantized model.")],
    format: Annotated[
        Literal["nf4", "fp4", "int8"], typer.Option(help="How linear layers are stored.")
    ] = "nf4",
    block_size: Annotated[
        int, typer.Option(help="Weights that share one scale, 32 to 4096; not for int8.")
    ] = 64,
    no_double: Annotated[
        bool, typer.Option("--no-double", help="Keep the scales in 32 bits; not for int8.")
    ] = False,
    skip: Annotated[
        list[str] | None, typer.Option(help="A module that stays 16-bit; may be repeated.")
    ] = None,
    dtype: Annotated[
        Literal["keep", "bf16", "fp16", "fp32"],
        typer.Option(help="Of what is not quantized, and of weights before they are."),
    ] = "keep",
    force: Annotated[bool, typer.Option("--force", help="Replace an existing folder.")] = False,
) -> None:
    """\b
    decal quantize HuggingFaceTB/SmolLM2-135M -o smollm-nf4 --format nf4

    Writes a folder that transformers loads with bitsandbytes, and decal without it.
    """
    from decal.cli.bytes import Bytes
    from decal.config import QuantConfig
    from decal.verbs.quantize import quantize as quantize_model

    settings: dict[str, Any] = {"format": format, "block_size": block_size, "double": not no_double}
    quant = QuantConfig(**settings, skip_modules=tuple(skip or ()))
    with Bytes(console.log(), "quantizing") as progress:
        done = quantize_model(model, out, quant, dtype=dtype, force=force, observe=progress.observe)
    console.facts(done.summary())
