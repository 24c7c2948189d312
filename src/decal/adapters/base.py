"""What adapters see of a base layer, what an adapter is, and how a forward pass picks adapters.

Knows no quantization format and no transformers model: a base layer is whatever satisfies
`BaseLayer`, an adapter is data plus pure functions.

Routing is one immutable value per forward pass. A layer reads the current one when its forward
begins and hands it to the autograd function; recomputation under gradient checkpointing restores
it (`routed`). Nothing reads mutable state in backward.

A pass either gives all rows to one weighted set of adapters, or cuts the batch into segments of
consecutive rows with one adapter, or none, each.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor

from decal.errors import AdapterError


@runtime_checkable
class BaseLayer(Protocol):
    """A frozen layer that an adapter can sit on.

    One of kind `embedding` also has `gain`, which forward multiplies its rows with, and
    `padding_idx`.
    """

    @property
    def kind(self) -> str:
        """linear | embedding | experts"""
        ...

    @property
    def shape(self) -> tuple[int, int]:
        """[out, in] in logical orientation, whatever the storage."""
        ...

    @property
    def bias(self) -> Tensor | None: ...

    def weight(self) -> Tensor:
        """The weight as [out, in], dequantized if it was quantized."""
        ...

    def forward(self, x: Tensor) -> Tensor: ...


class LowRank(NamedTuple):
    """The parts of a low-rank adapter: delta W = scale * B @ A, and scale * bias beside it."""

    A: Tensor
    """[r, in]"""
    B: Tensor
    """[out, r]"""
    scale: float
    dropout: float
    bias: Tensor | None = None
    """[out], B's own (`lora_bias`)."""


class Piece(NamedTuple):
    """Consecutive rows of a layer's flattened input, and how many rows that has."""

    start: int
    rows: int
    total: int
    segment: int = 0
    """Which of the routing's segments they are, where it has any."""


@dataclass(frozen=True)
class DropoutKey:
    """What a dropout bit depends on besides adapter, layer input and feature.

    `seed` and `epoch` are the run's; `sample_ids` and `positions` are int64 [T], one per row of
    the flattened input: the sample's id in the data set and the token's position in its sample.
    `kept` are the indices into these T rows that reach the head, where it sees only some.
    """

    seed: int
    epoch: int
    sample_ids: Tensor
    positions: Tensor
    kept: Tensor | None = None

    def of(self, piece: Piece, module: str) -> DropoutKey:
        """The key of some rows of a layer's input, which has all rows or the kept ones.

        Raises AdapterError, naming the layer `module`, where the input has other rows.
        """
        ids, positions = self.sample_ids.flatten(), self.positions.flatten()
        if self.kept is not None and piece.total == self.kept.numel():
            ids, positions = ids[self.kept], positions[self.kept]
        elif piece.total != positions.numel():
            raise AdapterError(
                f"dropout on {module} cannot tell its rows apart: the layer got "
                f"{piece.total}, the batch has {positions.numel()} tokens",
                hint="leave this module out of target_modules or set lora_dropout: 0",
            )
        rows = slice(piece.start, piece.start + piece.rows)
        return replace(self, sample_ids=ids[rows], positions=positions[rows], kept=None)


@dataclass(frozen=True)
class Routing:
    """Which adapters act in one forward pass.

    `weights` maps adapter names to factors (one active adapter: {"default": 1.0}; none: {}).
    `dropout` says how dropout is drawn; without it torch draws, in training mode.

    `segments` gives consecutive rows of the batch to adapters, instead of `weights`: (name or
    None, count) each. Counts are in units of which a layer's flattened rows are a whole multiple:
    samples of a padded batch (or of a pooled head), or tokens of a flat one. `kept` are the rows of
    each segment that reach the head, where it sees only some. `keys` say for each segment, instead
    of `dropout`, how it is dropped; they know its own rows alone.
    """

    weights: tuple[tuple[str, float], ...] = ()
    dropout: DropoutKey | None = None
    segments: tuple[tuple[str | None, int], ...] = ()
    kept: tuple[int, ...] = ()
    keys: tuple[DropoutKey | None, ...] = ()

    @property
    def names(self) -> frozenset[str]:
        """The adapters that act on any row."""
        named = [name for name, _ in self.segments if name is not None]
        return frozenset([*named, *(name for name, _ in self.weights)])

    def key_of(self, piece: Piece, module: str) -> DropoutKey | None:
        """How some rows of a layer's input are dropped in this pass; None where torch draws.

        Raises AdapterError, naming the layer `module`, where they are not rows of the key.
        """
        if not self.keys:
            return None if self.dropout is None else self.dropout.of(piece, module)
        key = self.keys[piece.segment]
        return None if key is None else key.of(Piece(0, piece.rows, piece.rows), module)

    def row_counts(self, x: Tensor, rows: int) -> list[tuple[str | None, int]]:
        """`segments` in rows of one layer's input `x` with `rows` flattened rows.

        Raises AdapterError where the input's rows are not the batch's.
        """
        units = sum(count for _, count in self.segments)
        if self.kept and rows == sum(self.kept):
            return [(name, kept) for (name, _), kept in zip(self.segments, self.kept, strict=True)]
        if rows != units and (rows % units or x.shape[0] % units):
            raise AdapterError(
                f"a layer got an input of the shape {list(x.shape)}; its rows are not those of the"
                f" {units} rows or tokens that were given to adapters",
                hint="leave the module out of target_modules, or run the adapters one by one",
            )
        return [(name, count * (rows // units)) for name, count in self.segments]


class Adapter(Protocol):
    """A small trainable delta on one base layer."""

    def forward(
        self,
        x: Tensor,
        y_base: Tensor,
        base: BaseLayer,
        factor: float = 1.0,
        piece: Piece | None = None,
    ) -> Tensor:
        """The adapted output. `factor` is the adapter's share in a weighted set.

        `piece` says which rows x and y_base are, where they are not all of the layer's.

        x is the layer's own input: [.., in], or integer ids [..] of an embedding. `y_base` is
        consumed: it may be the tensor that comes back.
        """
        ...

    def merged(self, weight: Tensor) -> Tensor:
        """W' in float32 for a [out, in] weight in logical orientation."""
        ...

    def low_rank(self) -> LowRank | None:
        """The factors if the delta is exactly scale * B @ A, else None."""
        ...


def as_master(parameter: Tensor) -> Tensor:
    """A copy of a parameter of the base to be trained: float32, or float64 of float64."""
    wide = torch.promote_types(parameter.dtype, torch.float32)
    return parameter.detach().to(wide, copy=True)


def keeping_masters(fn: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """`fn` of `nn.Module._apply` for float32 masters: moved as ever, but never narrowed."""

    def moved(tensor: Tensor) -> Tensor:
        new = fn(tensor)
        narrowed = new.dtype.itemsize < min(4, tensor.dtype.itemsize)
        return tensor.to(new.device) if narrowed else new

    return moved


_ROUTING: ContextVar[Routing | None] = ContextVar("decal_routing", default=None)


def current_routing() -> Routing | None:
    """The routing of the forward pass that is running, None where the model's own default holds."""
    return _ROUTING.get()


@contextmanager
def routed(routing: Routing | None) -> Iterator[None]:
    """Makes `routing` the current one inside the block, in this thread."""
    token = _ROUTING.set(routing)
    try:
        yield
    finally:
        _ROUTING.reset(token)
