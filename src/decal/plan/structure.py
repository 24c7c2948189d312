"""What a model consists of, in plain numbers, and what its weights weigh as stored.

    weights     every parameter once: what is tied counts once
    layers      its decoder layers: their linear layers by input, for what a pass keeps

Knows formats (which tensors a packed weight is made of), and no modules.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from math import prod

from decal.quant import quant_format
from decal.quant.base import Recipe

ITEMSIZE = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True, kw_only=True)
class Weight:
    """One parameter of the model."""

    name: str
    shape: tuple[int, ...]
    packs: bool = False
    """Whether a quantization format packs it: the weight of a linear layer, the head apart."""
    used: float = 1.0
    """Share of its numbers that one token is multiplied with: of 128 experts that work by eights,
    1/16; of an embedding, whose rows are only looked up, 0."""
    head: bool = False
    """Whether it makes the logits; it is then used at trained tokens only."""

    @property
    def numbers(self) -> int:
        """How many it holds."""
        return prod(self.shape)


@dataclass(frozen=True, kw_only=True)
class Linear:
    """A linear layer in a decoder layer."""

    name: str
    out: int
    columns: int
    """Features of its input."""
    group: str
    """Linear layers of one group share their input."""

    @property
    def leaf(self) -> str:
        """The last part of its name."""
        return self.name.rpartition(".")[2]


@dataclass(frozen=True, kw_only=True)
class Layer:
    """One decoder layer."""

    linears: tuple[Linear, ...]
    fused: bool
    """Whether its class is one that decal computes in fused steps."""
    attends: bool = True

    @cached_property
    def groups(self) -> dict[str, tuple[Linear, ...]]:
        """Its linear layers by input."""
        found: dict[str, tuple[Linear, ...]] = {}
        for linear in self.linears:
            found[linear.group] = (*found.get(linear.group, ()), linear)
        return found

    def width(self, *leaves: str) -> int:
        """Outputs of the linear layers of these names, together."""
        return sum(linear.out for linear in self.linears if linear.leaf in leaves)


@dataclass(frozen=True, kw_only=True)
class Structure:
    """A model without weights."""

    name: str
    weights: tuple[Weight, ...]
    layers: tuple[Layer, ...]
    hidden: int
    heads: int
    key_heads: int
    head_dim: int
    vocabulary: int
    head_norms: bool = False
    """Whether every head of q and k is normed (Qwen3)."""
    window: int | None = None
    """Positions that a token sees in every layer; None sees all before it."""
    unpackable: str | None = None
    """Why no format can hold the model, if so: its experts lie in one tensor."""
    kept: Mapping[str, float] = field(default_factory=dict)
    """Bytes of a token that one of transformers' own layers keeps for backward, in the dtype of the
    plan: `lora` with every weight frozen, `full` with none. Counted on a skeleton."""

    @cached_property
    def parameters(self) -> int:
        """All of them."""
        return sum(weight.numbers for weight in self.weights)

    @cached_property
    def largest(self) -> int:
        """Numbers in the largest linear weight, the head apart."""
        return max((w.numbers for w in self.weights if w.packs), default=0)


@dataclass(frozen=True)
class Stored:
    """Bytes of a model's weights as they are stored."""

    packed: int
    """Codes and scales of what a format packs."""
    plain: int
    """Everything else, in the compute dtype."""

    @property
    def total(self) -> int:
        """Both."""
        return self.packed + self.plain


def stored(structure: Structure, recipe: Recipe | None, dtype: str = "bfloat16") -> Stored:
    """What the weights weigh in a format; without `recipe` all of them are plain.

    Codebooks, rotary buffers and files' headers apart: a few hundred bytes.
    """
    packed = plain = 0
    for weight in structure.weights:
        if recipe is not None and weight.packs:
            out, columns = weight.shape
            parts = quant_format(recipe.format).part_shapes((out, columns), recipe)
            packed += sum(prod(shape) * dtype_.itemsize for shape, dtype_ in parts.values())
        else:
            plain += weight.numbers * ITEMSIZE[dtype]
    return Stored(packed, plain)


@dataclass(frozen=True, kw_only=True)
class Trained:
    """What is trained, by name."""

    ranks: Mapping[str, int] = field(default_factory=dict)
    """Linear layer -> rank of its adapter."""
    parameters: int
    """Numbers that are trained, biases and whole modules included."""
    whole: bool = False
    """Whether that is every weight of the model."""
