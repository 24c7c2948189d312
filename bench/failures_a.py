"""Rows of docs/failures.md: merging, loading, targets, saving."""

from __future__ import annotations

from pathlib import Path

from safetensors.torch import load_file, save_file

from bench.failures_row import Case, MakeRow, Row, Seen, watched
from decal.model.adapter import Adapter
from decal.model.inject import attach
from tests.peft_adapters import base, logits, theirs


def f7(folder: Path) -> Row:
    """Adapters that load as something else than was trained."""
    import peft

    theirs(folder, "llama")
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    save_file({k.replace("model.layers", "model.blocks"): t for k, t in tensors.items()}, file)
    plain = logits(base("llama"))
    with watched() as heard:
        found = logits(peft.PeftModel.from_pretrained(base("llama"), folder).eval())
    moved = bool((found - plain).abs().max() > 0)
    with watched() as ours:
        attach(base("llama"), Adapter.from_pretrained(folder))
    return Row(
        title="An adapter that loads as nothing, or as another",
        failure="Files whose keys do not match the model are loaded as far as they go.",
        cases=[
            Case(
                what="keys with a wrong prefix",
                seen=[
                    Seen(
                        who="peft",
                        verdict=heard.verdict(moved),
                        text=f"logits of the bare base; {heard.words()}",
                    ),
                    Seen(who="decal", verdict=ours.verdict(False), text=ours.words()),
                ],
            )
        ],
        threads=("peft#2699", "peft#2566", "peft#1323"),
    )


ROWS: dict[str, MakeRow] = {"F7": f7}
