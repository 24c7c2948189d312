"""AdaptedLayer: one frozen base layer and the named adapters on it.

Knows no method and no model. The base layer is the original module object, untouched, so that
taking the wrapper off gives back the very model there was. Which adapters act is decided once, when
forward begins: by the routing of the running pass, or else by the default that all wrappers of one
model share.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from decal.adapters.base import BaseLayer, Routing, current_routing
from decal.adapters.views import base_view


class RoutingState:
    """The default routing of one model, shared by its wrappers; `use` replaces it."""

    def __init__(self) -> None:
        self.routing = Routing()


class AdaptedLayer(nn.Module):
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
        for name, factor in routing.weights:
            if name in self.adapters:
                y = self.adapters[name](x, y, self.base, factor)
        return y

    @property
    def base(self) -> BaseLayer:
        """The base layer in logical orientation."""
        return self._view[0]

    # Model code and transformers read these of a linear layer without calling it.
    @property
    def weight(self) -> Any:
        return self.base_layer.weight

    @property
    def bias(self) -> Any:
        return self.base_layer.bias
