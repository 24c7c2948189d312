"""AdaptedLayer: one frozen base layer and the named adapters on it.

Knows no method and no model. The base layer is the original module object, untouched, so that
taking the wrapper off gives back the very model there was. Which adapters act is decided once, when
forward begins: by the routing of the running pass, or else by the default that all wrappers of one
model share.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from decal.adapters.base import BaseLayer, Piece, Routing, current_routing
from decal.adapters.views import base_view

_OWN = ("kind", "shape")
"""What makes a `BaseLayer`, which a wrapper is not."""


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
        self._view = (view,)  # in a tuple: a view that is a module must not register twice
        self.training = base_layer.training

    def forward(self, x: Tensor) -> Tensor:
        """The base layer's output plus what the routed adapters add to it."""
        routing = current_routing() or self.state.routing
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
        for name, count in routing.row_counts(x, rows):
            part = flat_y[start : start + count]
            if name is not None and name in self.adapters and count:
                piece = Piece(start, count, rows)
                adapter = self.adapters[name]
                part = adapter(flat_x[start : start + count], part, self.base, piece=piece)
            parts.append(part)
            start += count
        return torch.cat(parts).view(y.shape)

    @property
    def base(self) -> BaseLayer:
        """The base layer in logical orientation."""
        return self._view[0]
