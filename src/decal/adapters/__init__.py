"""Small trainable deltas on frozen layers. One file per method; METHODS is the registry."""

from __future__ import annotations

from decal.adapters.base import (
    Adapter,
    BaseLayer,
    DropoutKey,
    LowRank,
    Routing,
    current_routing,
    routed,
)
from decal.adapters.layer import AdaptedLayer, RoutingState
from decal.adapters.lora import Lora, Slot
from decal.adapters.replaced import Place, ReplacedModule, Replacement
from decal.adapters.views import base_view

METHODS = {"lora": Lora}

__all__ = [
    "METHODS",
    "AdaptedLayer",
    "Adapter",
    "BaseLayer",
    "DropoutKey",
    "Lora",
    "LowRank",
    "Place",
    "ReplacedModule",
    "Replacement",
    "Routing",
    "RoutingState",
    "Slot",
    "base_view",
    "current_routing",
    "routed",
]
