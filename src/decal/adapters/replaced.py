"""ReplacedModule: one frozen module of the base, and adapters that hold parameters of it whole.

PEFT's `modules_to_save` (heads, embeddings, norms) and trained biases outside the target modules.
The base module is the original object and stays untouched. An adapter holds float32 masters of some
of its parameters, under their names inside the module; the rest is shared with the base:

    modules_to_save    all parameters, also of layers inside (a head of several layers)
    bias: all          the module's own `bias` only

Forward runs the base module with the masters, cast to the dtype of what they stand for, in the
places of its parameters, and puts these back. Autograd sees the cast, so gradients arrive in
float32. The places are module objects and not names: a wrapper that another adapter put around a
layer inside does not move them, and a weight that is tied elsewhere changes only here.

The cast makes one tensor of the parameter's size per forward, in the base's dtype; nothing is cast
where dtypes agree.

Rejected: a second copy of the module, as PEFT keeps. A bf16 copy has no float32 masters, a float32
copy does not compute in bf16, and its buffers would be copied too.

A whole parameter has no share and no row: in a weighted set or a mixed batch the module can serve
one adapter only, with factor 1 on all rows; anything else is refused by name.

Knows no models and no files.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

from torch import Tensor, nn

from decal.adapters.base import Routing, as_master, current_routing, keeping_masters
from decal.adapters.layer import BaseProxy, RoutingState
from decal.errors import AdapterError


class Place(NamedTuple):
    """Where a parameter of the base stands."""

    owner: nn.Module
    leaf: str

    @property
    def parameter(self) -> Tensor:
        """The base's own."""
        found: Tensor = self.owner._parameters[self.leaf]  # type: ignore[assignment]
        return found


class Replacement(nn.Module):
    """One adapter's values of some parameters of a module: float32 masters under their names.

    Args:
        places: name inside the module -> where the base's parameter stands.
        masters: id of a base parameter -> its copy, where several modules share one; new copies
            are added. What is shared inside the module is always copied once.
    """

    def __init__(self, places: Mapping[str, Place], masters: dict[int, nn.Parameter] | None = None):
        super().__init__()
        self._places = dict(places)
        masters = {} if masters is None else masters
        for name, place in places.items():
            *path, leaf = name.split(".")
            node: nn.Module = self
            for part in path:
                if part not in node._modules:
                    node.add_module(part, nn.Module())
                node = node._modules[part]  # type: ignore[assignment]
            if id(place.parameter) not in masters:
                masters[id(place.parameter)] = nn.Parameter(as_master(place.parameter))
            node.register_parameter(leaf, masters[id(place.parameter)])

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Inside the block the base module computes with these values."""
        before = [(place, place.parameter) for place in self._places.values()]
        values = dict(self.named_parameters(remove_duplicate=False))
        try:
            for name, place in self._places.items():
                value = values[name].to(place.parameter.dtype)
                place.owner._parameters[place.leaf] = value  # type: ignore[assignment]
            yield
        finally:
            for place, parameter in before:
                place.owner._parameters[place.leaf] = parameter  # type: ignore[assignment]

    def _apply(self, fn: Any, recurse: bool = True) -> Replacement:
        """Moves like any module, but `.half()` and `.bfloat16()` leave the masters in float32."""
        super()._apply(keeping_masters(fn), recurse)
        return self

    def extra_repr(self) -> str:
        return ", ".join(f"{n}: {list(p.shape)}" for n, p in self.named_parameters())


class ReplacedModule(BaseProxy):
    """A module of the base with adapters that replace parameters of it.

    Args:
        base_layer: the module, or an `AdaptedLayer` around it.
        state: the default routing of the model that the module belongs to.
        name: the module's name, for messages.
    """

    def __init__(self, base_layer: nn.Module, state: RoutingState, name: str):
        super().__init__()
        self.base_layer = base_layer
        self.adapters = nn.ModuleDict()
        self.state = state
        self.module_name = name
        self.training = base_layer.training

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the base module computes, with the parameters of the adapter that is in use."""
        name = self.acting(current_routing() or self.state.routing)
        if name is None:
            return self.base_layer(*args, **kwargs)
        replacement: Replacement = self.adapters[name]  # type: ignore[assignment]
        with replacement.in_place():
            return self.base_layer(*args, **kwargs)

    def acting(self, routing: Routing) -> str | None:
        """The one adapter whose parameters are used, or None for the base's.

        Raises AdapterError where the routing does not give the whole module to one.
        """
        own = sorted(routing.names & self.adapters.keys())
        if not own:
            return None
        alone = len(own) == 1 and (
            all(name == own[0] for name, _ in routing.segments)
            and all(name not in own or factor == 1.0 for name, factor in routing.weights)
        )
        if not alone:
            listed = ", ".join(f"`{name}`" for name in own)
            raise AdapterError(
                f"{self.module_name} is trained whole by {listed}, so it cannot be weighted or"
                " serve some of the rows",
                hint="use that adapter alone, with factor 1 and on all rows",
            )
        return own[0]
