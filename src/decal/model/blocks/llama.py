"""The decoder layer of Llama and what is built like it, taken apart and computed in four steps.

    h = x + o(attend(q(n1(x)), k(n1(x)), v(n1(x))))
    y = h + down(silu(gate(n2(h))) * up(n2(h)))

Members of the family differ in where a sliding window is written, in biases, which the projections
carry themselves, and in Qwen3's norms of every head of q and k.

Knows where transformers keeps the parts, and nothing of when the steps replace its forward
(`swap.py`) or how they are computed (`pieces.py`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor, nn

from decal.adapters import AdaptedLayer, ReplacedModule, Routing, RoutingState, base_view
from decal.adapters.layer import group_of, watched
from decal.adapters.lines import Group
from decal.model.blocks.pieces import Attend, Attention, GatedMLP, Norm, NormProject, ProjectAdd

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP = ("gate_proj", "up_proj", "down_proj")
GROUPS = (ATTENTION[:3], ATTENTION[3:], MLP[:2], MLP[2:])
"""Projections by the input that they share."""
_RECORDERS = "transformers.utils.output_capturing"
"""Leaves a hook on attention modules with the first pass that asks for hidden states. It records
attention weights, which ours does not return."""


@dataclass(frozen=True)
class Family:
    """What tells one member from another."""

    window: Callable[[Any], int | None]
    """The sliding window of an attention module."""
    head_norms: tuple[str, ...] = ()
    """Norms of the heads of q and k, by name."""


LLAMA = Family(window=lambda attention: None)
MISTRAL = Family(window=lambda attention: attention.config.sliding_window)
QWEN2 = Family(window=lambda attention: attention.sliding_window)
QWEN3 = Family(window=lambda attention: attention.sliding_window, head_norms=("q_norm", "k_norm"))


class Plan(NamedTuple):
    """Everything that one pass through a layer depends on, beside its input."""

    norms: tuple[Norm, Norm]
    """Before attention and before the MLP."""
    groups: tuple[Group, ...]
    """In the order of `GROUPS`."""
    attention: Attention


class Block:
    """A decoder layer taken apart: its modules, as they stand in it.

    Args:
        layer: the decoder layer.
        family: which one.
        state: the default routing of the model.

    Raises:
        ValueError: it is not built like the family; the message says where.
    """

    def __init__(self, layer: Any, family: Family, state: RoutingState):
        self.state = state
        self.attention, self.mlp = layer.self_attn, layer.mlp
        self.window = family.window(self.attention)
        own = {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"}
        _check_parts(layer, own)
        _check_parts(self.attention, {*ATTENTION, *family.head_norms})
        _check_parts(self.mlp, {*MLP, "act_fn"})
        if type(self.mlp.act_fn).__name__ not in ("SiLU", "SiLUActivation"):
            raise ValueError(f"its activation is {type(self.mlp.act_fn).__name__}")
        norms = [layer.input_layernorm, layer.post_attention_layernorm]
        norms += [getattr(self.attention, name) for name in family.head_norms]
        self.norms: tuple[Any, ...] = tuple(norms)
        self.layers = {
            name: _adapted(parent, name, state)
            for parent, names in ((self.attention, ATTENTION), (self.mlp, MLP))
            for name in names
        }
        self.parts: list[tuple[nn.Module, str, nn.Module]] = [
            (parent, key, child)
            for parent in (layer, self.attention, self.mlp)
            for key, child in parent._modules.items()
            if key not in self.layers
        ]

    def plan(self, routing: Routing, x: Tensor, kwargs: dict[str, Any]) -> Plan | None:
        """What a pass over the rows x [T, H] computes; None where only the layer's forward can.

        `kwargs` are what the layer's forward was given.
        """
        if not self._in_place() or any(watched(part, _RECORDERS) for *_, part in self.parts):
            return None
        norms = [Norm(norm.weight, norm.variance_epsilon) for norm in self.norms]
        if any(n.weight.requires_grad or n.weight.dtype != x.dtype for n in norms):
            return None
        groups = []
        for names in GROUPS:
            layers = [self.layers[name] for name in names]
            group = group_of(layers, routing, x.shape[0], x, exact=self.attention.training)
            if group is None:
                return None
            groups.append(group)
        cos, sin = kwargs["position_embeddings"]
        return Plan(
            norms=(norms[0], norms[1]),
            groups=tuple(groups),
            attention=Attention(
                head_dim=self.attention.head_dim,
                scale=self.attention.scaling,
                cos=cos[0],
                sin=sin[0],
                cu_seq_lens=kwargs["cu_seq_lens_q"],
                window=self.window,
                norms=(norms[2], norms[3]) if norms[2:] else None,
            ),
        )

    def kind(self, name: str) -> tuple[Any, ...]:
        """What layers have in common that one proof, with adapter `name`, holds for."""
        own: list[Any] = [self.window, self.attention.head_dim, self.attention.scaling]
        own += [(norm.variance_epsilon, norm.weight.dtype) for norm in self.norms]
        own += [type(part) for *_, part in self.parts]
        for layer in self.layers.values():
            weight, bias = layer.base.stored(), layer.base.bias  # type: ignore[attr-defined]
            lora: Any = layer.adapters[name] if name in layer.adapters else None  # noqa: SIM401
            own += [type(layer.base_layer), weight.format, weight.shape, weight.data.dtype]
            own += [weight.block_size, weight.nested is None, bias is None]
            own += [lora and (lora.plain, lora.A.shape, lora.dropout)]
        return tuple(own)

    def _in_place(self) -> bool:
        """Whether all parts are still the modules that stood there."""
        return all(parent._modules.get(name) is part for parent, name, part in self.parts) and all(
            parent._modules.get(name) in (self.layers[name], self.layers[name].base_layer)
            for parent, names in ((self.attention, ATTENTION), (self.mlp, MLP))
            for name in names
        )


def run(plan: Plan, x: Tensor) -> Tensor:
    """x [1, T, H] through the layer, with gradients of x and the adapters -> [1, T, H]."""
    qkv, o, gate_up, down = plan.groups
    rows = x.view(x.shape[1:])
    residual, q, k, v = NormProject.apply(rows, plan.norms[0], qkv, *qkv.factors)
    attended = Attend.apply(q, k, v, plan.attention)
    h = ProjectAdd.apply(residual, attended, o, *o.factors)
    factors = (*gate_up.factors, *down.factors)
    y: Tensor = GatedMLP.apply(h, plan.norms[1], gate_up, down, *factors)
    return y.view(x.shape)


def _check_parts(module: nn.Module, names: set[str]) -> None:
    found = set(module._modules)
    if found != names:
        odd = ", ".join(sorted(found ^ names))
        raise ValueError(f"{type(module).__name__} is not built as expected: {odd}")
    for name, child in module._modules.items():
        if isinstance(child, ReplacedModule):
            raise ValueError(f"{name} is trained whole, or its bias is")


def _adapted(parent: nn.Module, name: str, state: RoutingState) -> AdaptedLayer:
    """The wrapper that stands there, or one around a layer without adapters."""
    module: Any = parent._modules[name]
    if isinstance(module, AdaptedLayer):
        return module
    if getattr(base_view(module), "stored", None) is None:
        raise ValueError(f"{name} is a {type(module).__name__}")
    return AdaptedLayer(module, state)
