"""use, mixed, disabled: which of the attached adapters act.

Choosing moves no tensor. `use` and `mixed` make the chosen adapters trainable, too.

Knows no settings and no files.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import groupby, permutations
from types import TracebackType
from typing import Any

from torch import nn

from decal.adapters import Routing, current_routing, routed
from decal.errors import AdapterError
from decal.model.state import (
    activate,
    adapted_layers,
    full_state,
    known,
    replaced_modules,
    require,
    train_only,
)
from decal.model.survey import unwrapped


class Use:
    """What `use` returns: as a context manager it brings back what was in use before."""

    def __init__(self, model: nn.Module, before: Routing):
        self._model, self._before = model, before

    def __enter__(self) -> Use:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        activate(self._model, self._before)


def use(model: nn.Module, which: str | Mapping[str, float]) -> Use:
    """Takes one adapter or a weighted set into use, at once; the adapters in use are trainable.

    `use(model, {"a": 0.7, "b": 0.3})` adds 0.7 times a's delta and 0.3 times b's. The returned
    object is a context manager that brings back what was in use before.

    Raises:
        AdapterError: unknown names, weights that are no finite numbers, or an adapter in a weighted
            set that holds modules whole.
    """
    attached = require(model)
    wanted = {which: 1.0} if isinstance(which, str) else dict(which)
    for name, weight in wanted.items():
        known(attached, name)
        if not math.isfinite(weight):
            raise AdapterError(f"adapter `{name}` has the weight {weight}")
    if not wanted:
        raise AdapterError("no adapter named", hint="`disabled(model)` runs the base alone")
    routing = Routing(tuple((n, float(w)) for n, w in wanted.items()))
    _refuse_shared(model, routing)
    before = attached.state.routing
    activate(model, routing)
    return Use(model, before)


@contextmanager
def mixed(model: nn.Module, names: Sequence[str | None]) -> Iterator[None]:
    """Inside the block every row of a padded batch runs with its own adapter, or none.

    The base runs once on all rows. With gradient checkpointing, backward belongs into the block.

    Args:
        names: one per row of the batch: an adapter, or None for the base alone.

    Raises:
        AdapterError: unknown names, or an adapter that cannot serve some of the rows: it holds
            modules whole, or sits on an embedding that is looked up once for all rows.
    """
    attached = require(model)
    for name in names:
        if name is not None:
            known(attached, name)
    if not names:
        raise AdapterError("no rows named", hint="give one name, or None, per row of the batch")
    running = current_routing()
    segments = tuple((name, len(list(rows))) for name, rows in groupby(names))
    routing = Routing(dropout=running.dropout if running else None, segments=segments)
    _refuse_shared(model, routing)
    _refuse_positions(model, routing)
    before = attached.state.routing
    train_only(model, routing.names)
    try:
        with routed(routing):
            yield
    finally:
        train_only(model, before.names)


@contextmanager
def disabled(model: nn.Module) -> Iterator[None]:
    """Inside the block the model computes what its base computes."""
    state = require(model).state
    before = state.routing
    state.routing = Routing()
    try:
        # A routing that is set for the running pass would win over the model's own.
        with routed(None if current_routing() is None else Routing()):
            yield
    finally:
        state.routing = before


def active_routing(model: nn.Module) -> Routing:
    """What the next forward pass of the model will use."""
    return current_routing() or require(model).state.routing


def _refuse_shared(model: nn.Module, routing: Routing) -> None:
    """A module that is held whole serves one adapter, and no other one trains a part of it.

    Biases of target modules are shares like factors are: two of them add up.
    """
    for wrapper in replaced_modules(model).values():
        wrapper.acting(routing)
    adapted = adapted_layers(model).items()
    held = {name: full_state(model, name).keys() for name in sorted(routing.names)}
    for name, other in permutations(held, 2):
        shares = {f"{module}.bias" for module, layer in adapted if name in layer.adapters}
        both = sorted((held[name] - shares) & held[other])
        if both:
            raise AdapterError(
                f"adapters {' and '.join(f'`{n}`' for n in sorted((name, other)))} both train"
                f" {both[0]}",
                hint="use them one at a time",
            )


def _refuse_positions(model: nn.Module, routing: Routing) -> None:
    """Positions and the like are looked up once for all rows, so they are no rows of the batch."""
    get: Any = getattr(model, "get_input_embeddings", None)
    if get is None or len({name for name, _ in routing.segments}) == 1:
        return
    tokens = unwrapped(get())
    for module, layer in adapted_layers(model).items():
        names = sorted(routing.names & layer.adapters.keys())
        if names and layer.base.kind == "embedding" and layer.base_layer is not tokens:
            raise AdapterError(
                f"adapter `{names[0]}` sits on the embedding {module}, which may be looked up once"
                " for all rows",
                hint="run the adapters one by one",
            )
