"""A small model in plain numbers, of which everything can be counted by hand."""

from __future__ import annotations

from typing import Any

from decal.plan.setup import Load, Setup
from decal.plan.structure import Layer, Linear, Structure, Trained, Weight

H, INNER, VOCABULARY = 64, 192, 1000
SHAPES = {
    "q_proj": (64, 64, "q"),
    "k_proj": (32, 64, "q"),
    "v_proj": (32, 64, "q"),
    "o_proj": (64, 64, "o"),
    "gate_proj": (192, 64, "g"),
    "up_proj": (192, 64, "g"),
    "down_proj": (64, 192, "d"),
}


def structure(layers: int = 2, fused: bool = True) -> Structure:
    """A Llama of two layers with a tied head."""
    weights = [Weight(name="embed", shape=(VOCABULARY, H), used=0.0)]
    built = []
    for i in range(layers):
        linears = []
        for leaf, (out, columns, group) in SHAPES.items():
            name = f"layers.{i}.{leaf}"
            weights.append(Weight(name=f"{name}.weight", shape=(out, columns), packs=True))
            linears.append(Linear(name=name, out=out, columns=columns, group=f"{i}.{group}"))
        built.append(Layer(linears=tuple(linears), fused=fused))
        weights.append(Weight(name=f"layers.{i}.norm", shape=(H,)))
    return Structure(
        name="tiny",
        weights=tuple(weights),
        layers=tuple(built),
        hidden=H,
        heads=4,
        key_heads=2,
        head_dim=16,
        vocabulary=VOCABULARY,
        kept={"lora": 5000.0, "full": 6000.0},
    )


def setup(r: int = 8, **changes: Any) -> Setup:
    """QLoRA on it, without a format; `changes` replace fields."""
    found = structure()
    ranks = {linear.name: r for layer in found.layers for linear in layer.linears}
    count = sum(
        r * (linear.out + linear.columns) for layer in found.layers for linear in layer.linears
    )
    values: dict[str, Any] = {
        "structure": found,
        "trained": Trained(ranks=ranks, parameters=count),
        "load": Load(tokens=128, trained=100, several=False),
        "process": 10_000_000,
    }
    return Setup(**{**values, **changes})
