"""Switches on a transformers model while it trains: no dropout of its own, recomputed layers.

Knows no adapters' settings and no batches.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from decal.adapters import Lora


@contextmanager
def without_dropout(model: nn.Module) -> Iterator[None]:
    """Inside the block the model's own dropout is off; the adapters' is not touched.

    A frozen base needs no regularization, and torch draws these masks per micro-batch, so that
    the result of a training would depend on how its steps are cut.
    """
    found: list[tuple[nn.Module, str, float]] = []
    for module in model.modules():
        if isinstance(module, Lora):
            continue
        # Architectures keep the share in attributes of many names: hidden_dropout, attn_pdrop, …
        names = (
            ["p"] if isinstance(module, nn.Dropout) else [n for n in vars(module) if "drop" in n]
        )
        for name in names:
            value = getattr(module, name)
            if isinstance(value, float):
                found.append((module, name, value))
                setattr(module, name, 0.0)
    try:
        yield
    finally:
        for module, name, value in found:
            setattr(module, name, value)


@contextmanager
def checkpointed(model: Any, contexts: Callable[[], tuple[Any, Any]]) -> Iterator[None]:
    """Inside the block layers keep no activations and run again in backward.

    `contexts` is called in forward and gives the contexts of the forward and of the second run.
    """
    settings = {"use_reentrant": False, "context_fn": contexts}
    if hasattr(model, "activation_checkpointing_enable"):
        model.activation_checkpointing_enable(settings)
    else:  # older transformers
        model.gradient_checkpointing_enable(settings)
    try:
        yield
    finally:
        if hasattr(model, "activation_checkpointing_disable"):
            model.activation_checkpointing_disable()
        else:
            model.gradient_checkpointing_disable()
