"""AdaptedLayer: one frozen base layer and the named adapters on it.

Knows no method and no model. The base layer is the original module object, untouched, so that
taking the wrapper off gives back the very model there was. Which adapters act is decided once, when
forward begins: by the routing of the running pass, or else by the default that all wrappers of one
model share.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from decal.adapters import lines
from decal.adapters.base import BaseLayer, Piece, Routing, current_routing
from decal.adapters.lines import Factors, Group, Line, Segment
from decal.adapters.lora import Drawn, Dropout, Lora
from decal.adapters.views import base_view
from decal.kernels.stored import stacked

_OWN = ("kind", "shape")
"""What makes a `BaseLayer`, which a wrapper is not."""
_PLAIN = (Tensor, nn.Parameter)
"""A weight of another type computes in its own way."""


class RoutingState:
    """The default routing of one model, shared by its wrappers; `use` replaces it."""

    def __init__(self) -> None:
        self.routing = Routing()


class BaseProxy(nn.Module):
    """A wrapper: what model code reads of the module under it without calling it is there."""

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name in _OWN or "base_layer" not in self.__dict__.get("_modules", {}):
                raise
            return getattr(self.base_layer, name)


class AdaptedLayer(BaseProxy):
    """A base layer with adapters.

    Args:
        base_layer: any module that `base_view` knows.
        state: the default routing of the model that the layer belongs to.
    """

    def __init__(self, base_layer: nn.Module, state: RoutingState):
        super().__init__()
        view = base_view(base_layer)
        if view is None:
            raise TypeError(f"{type(base_layer).__name__} is no layer an adapter can sit on")
        self.base_layer = base_layer
        self.adapters = nn.ModuleDict()
        self.state = state
        # In a tuple: a view that is a module must not register twice.
        self._view = (view, base_layer)
        self.training = base_layer.training

    def forward(self, x: Tensor) -> Tensor:
        """The base layer's output plus what the routed adapters add to it."""
        routing = current_routing() or self.state.routing
        if not routing.names.isdisjoint(self.adapters):
            exact = self.base_layer.training or (torch.is_grad_enabled() and x.requires_grad)
            rows = x.numel() // max(1, x.shape[-1])
            group = group_of([self], routing, rows, x, exact=exact)
            if group is not None and group.segments:
                return lines.apply(group, x)
        y: Tensor = self.base_layer(x)
        if routing.segments:
            return self._by_rows(x, y, routing)
        for name, factor in routing.weights:
            if name in self.adapters:
                y = self.adapters[name](x, y, self.base, factor)
        return y

    def _by_rows(self, x: Tensor, y: Tensor, routing: Routing) -> Tensor:
        """Each segment's rows through its own adapter; the base has run on all of them at once."""
        if routing.names.isdisjoint(self.adapters):
            return y
        rows = y.numel() // y.shape[-1]
        flat_x, flat_y = x.reshape(rows, *x.shape[y.ndim - 1 :]), y.reshape(rows, y.shape[-1])
        parts, start = [], 0
        for i, (name, count) in enumerate(routing.row_counts(x, rows)):
            part = flat_y[start : start + count]
            if name is not None and name in self.adapters and count:
                piece = Piece(start, count, rows, i)
                adapter = self.adapters[name]
                part = adapter(flat_x[start : start + count], part, self.base, piece=piece)
            parts.append(part)
            start += count
        return torch.cat(parts).view(y.shape)

    def acting(self, routing: Routing) -> list[tuple[str, float]]:
        """The adapters of this layer that act on all rows, and their factors."""
        return [weight for weight in routing.weights if weight[0] in self.adapters]

    @property
    def base(self) -> BaseLayer:
        """The base layer in logical orientation."""
        return self._view[0]

    @property
    def exchanged(self) -> bool:
        """Whether another module has been put in the place of the one that `base` describes."""
        return self.base_layer is not self._view[1]


def group_of(
    layers: Sequence[AdaptedLayer], routing: Routing, rows: int, like: Tensor, *, exact: bool
) -> Group | None:
    """Layers that share an input of so many rows as one product, or None where they are not that.

    They are if each is a frozen linear layer, in a layout that the products know, with at most one
    adapter that acts on a row, a plain low-rank one; and if nobody looks into them.

    Args:
        like: has the input's dtype and device.
        exact: products with the weight itself are wanted, also where the format has a quicker way
            for inference.
    """
    device = like.device
    if device.type == "meta" or torch.is_autocast_enabled(device.type):
        return None
    if type(like) not in _PLAIN or torch.compiler.is_compiling() or torch.jit.is_tracing():
        return None
    lines_ = [_frozen_line(layer, like, exact) for layer in layers]
    frozen = [line for line in lines_ if line is not None]
    if len(frozen) < len(layers):
        return None
    segments, keeps = [], []
    features = layers[0].base.shape[1]
    for piece, acting in _by_segment(layers, routing, rows, like):
        found = _segment(acting, routing, piece)
        if found is None:
            return None
        segment, dropout = found
        words = dropout.words(piece.rows, features, device) if dropout else None
        keeps.append((words, piece.rows))
        if any(factors is not None for factors in segment.factors):
            segments.append(segment)
    keep = None
    if any(words is not None for words, _ in keeps):
        keep = stacked(keeps, features, device) if len(keeps) > 1 else keeps[0][0]
    return Group(tuple(frozen), tuple(segments), keep)


Acting = list[list[tuple[Any, float]]]
"""For every layer of a group the adapters that act on some rows, and their factors."""


def _by_segment(
    layers: Sequence[AdaptedLayer], routing: Routing, rows: int, like: Tensor
) -> Iterator[tuple[Piece, Acting]]:
    """Consecutive rows of the layers' input, and what acts on them."""
    if not routing.segments:
        acting = [[(one.adapters[n], f) for n, f in one.acting(routing)] for one in layers]
        yield Piece(0, rows, rows), acting
        return
    start = 0
    for i, (name, count) in enumerate(routing.row_counts(like, rows)):
        if count:
            own: Acting = [
                [(o.adapters[name], 1.0)] if name is not None and name in o.adapters else []
                for o in layers
            ]
            yield Piece(start, count, rows, i), own
        start += count


def _segment(
    acting: Acting, routing: Routing, piece: Piece
) -> tuple[Segment, Dropout | Drawn | None] | None:
    """The adapters of some rows as factors, and how their input is dropped; None if they are not
    plain, or do not share a mask."""
    found: list[Factors | None] = []
    drops: list[Dropout | Drawn | None] = []
    for own in acting:
        if not own:
            found.append(None)
            continue
        [(lora, factor), *more] = own
        if more or not isinstance(lora, Lora) or not lora.plain or watched(lora):
            return None
        if not drops:
            drops = [lora.drop(routing, piece)]
        elif not _shares(lora, drops[0], routing, piece):
            return None
        scale = lora.scale * factor / (1.0 - (drops[0].p if drops[0] else 0.0))
        found.append(Factors(lora.A, lora.B, scale))
    segment = Segment(piece.start, piece.rows, tuple(found))
    return segment, drops[0] if drops else None


def _frozen_line(layer: AdaptedLayer, like: Tensor, exact: bool) -> Line | None:
    """The layer without its adapters, or None where it is not frozen, plain and at hand."""
    get = getattr(layer.base, "stored", None)
    if get is None or layer.exchanged or watched(layer) or watched(layer.base_layer):
        return None
    weight, bias = get(), layer.base.bias
    data = weight.data
    if data.requires_grad or data.device != like.device or type(data) not in _PLAIN:
        return None
    if weight.format == "dense" and data.dtype != like.dtype:
        return None
    if weight.format == "rows8" and not exact:
        return None
    if bias is not None and (bias.requires_grad or bias.dtype != like.dtype):
        return None
    return Line(weight, bias)


def _shares(lora: Lora, dropout: Dropout | Drawn | None, routing: Routing, piece: Piece) -> bool:
    """Whether this adapter drops what another one of the group does."""
    if dropout is None:
        drawn = routing.dropout is not None or lora.training
        if routing.keys:
            drawn = routing.keys[piece.segment] is not None
        return lora.dropout == 0 or not drawn
    if isinstance(dropout, Drawn):
        return lora.dropout == dropout.p and lora.training
    own = (lora.adapter_salt, lora.input_salt, lora.dropout)
    return own == (dropout.adapter, dropout.input, dropout.p)


def watched(module: nn.Module, but: str = "") -> bool:
    """Whether hooks or a forward of its own hang on a module, which must then be called.

    Hooks on all modules count; forward hooks defined in the Python module `but` do not.
    """
    return bool(
        any(hook.__module__ != but for hook in module._forward_hooks.values())
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in module.__dict__
        or torch_module._has_any_global_hook()
    )
