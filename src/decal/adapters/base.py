"""What adapters see of a base layer, what an adapter is, and how a forward pass picks adapters.

Knows no quantization format and no transformers model: a base layer is whatever satisfies
`BaseLayer`, an adapter is data plus pure functions.

Routing is one immutable value per forward pass. A layer reads the current one when its forward
begins and hands it to the autograd function; recomputation under gradient checkpointing restores
it (`routed`). Nothing reads mutable state in backward.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import NamedTuple, Protocol, runtime_checkable

from torch import Tensor


@runtime_checkable
class BaseLayer(Protocol):
    """A frozen layer that an adapter can sit on."""

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
    """The parts of a low-rank adapter: delta W = scale * B @ A."""

    A: Tensor
    """[r, in]"""
    B: Tensor
    """[out, r]"""
    scale: float
    dropout: float


@dataclass(frozen=True)
class DropoutKey:
    """What a dropout bit depends on besides adapter, layer input and feature.

    `seed` and `epoch` are the run's; `sample_ids` and `positions` are int64 [T], one per row of
    the flattened input: the sample's id in the data set and the token's position in its sample.
    """

    seed: int
    epoch: int
    sample_ids: Tensor
    positions: Tensor


@dataclass(frozen=True)
class Routing:
    """Which adapters act in one forward pass.

    `weights` maps adapter names to factors (one active adapter: {"default": 1.0}; none: {}).
    `dropout` is None outside training.
    """

    weights: tuple[tuple[str, float], ...] = ()
    dropout: DropoutKey | None = None


class Adapter(Protocol):
    """A small trainable delta on one base layer."""

    def forward(self, x: Tensor, y_base: Tensor, base: BaseLayer, factor: float = 1.0) -> Tensor:
        """The adapted output. `factor` is the adapter's share in a weighted set.

        `y_base` is consumed: it may be the tensor that comes back.
        """
        ...

    def merged(self, weight: Tensor) -> Tensor:
        """W' in float32 for a [out, in] weight in logical orientation."""
        ...

    def low_rank(self) -> LowRank | None:
        """The factors if the delta is exactly scale * B @ A, else None."""
        ...


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
