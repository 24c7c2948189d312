"""What a pass keeps for backward, layer by layer, and the largest temporaries of backward.

The fused steps (model/blocks/pieces.py says what they save) keep of T rows, in the compute dtype,

    x, and h = x + attention        2 H        the inputs of both norms
    q, k, v, attention's output     2 q + 2 k  k and v are as wide as each other
    gate and up                     2 I
    z of every group                ranks
    and in float32 a number a row for each norm, a row and head for attention (and for norms of
    heads), in int32 two words a row and group for dropout

beside copies of the factors in the compute dtype. transformers' own layers keep more: norms keep
their input in float32, the MLP four tensors of its width instead of two. How much depends on the
architecture; it is measured on a skeleton without memory (`Structure.kept`).

Knows shapes only.
"""

from __future__ import annotations

from decal.plan.setup import Setup
from decal.plan.structure import Layer, Linear

FLOAT = 4
HOLES = 1.9
"""Unused bytes that a layer leaves in the heap, in tensors as large as the MLP's inner one.

torch asks the C library for addresses that are multiples of 64, for which it looks for a little
more than the block: the hole that a tensor left does not hold another of the same size, and small
objects settle between large ones and keep holes apart. The largest temporary of a layer, the MLP's
inner product, so leaves a hole in every layer of forward, and in part again in backward. Measured
over fused layers with bench/plan_accuracy.py: 1.1 with tensors of 2 MB, 2.2 with 11 MB; this is the
middle. (Following the heap's rule block by block found half of it, see docs/log.md.)"""
WORDS = 8
"""Bytes of dropout's two int32 words of a row."""
MAPPED = 32 << 20
"""From this size on the C library maps a block for itself and gives it back when it is freed
(model/heap.py, which sets it): no hole is left."""
MLP = ("gate_proj", "up_proj")
IDS = 4 * 8
"""Bytes of a row's token, target, position and sample, int64 each."""


def kept(setup: Setup) -> list[int]:
    """Bytes by layer."""
    return [_layer(setup, layer) for layer in setup.structure.layers]


def fuses(setup: Setup, layer: Layer) -> bool:
    """Whether the layer is computed in fused steps: frozen, of a known family, on a CPU."""
    frozen = not setup.trained.whole
    return setup.fused and setup.device == "cpu" and layer.fused and frozen


def outside(setup: Setup) -> int:
    """What is kept beside the layers: ids, positions' angles, the last norm's input."""
    s, T = setup.structure, setup.load.tokens
    angles = 2 * setup.itemsize * s.head_dim
    last = FLOAT * s.hidden + FLOAT
    return T * (IDS + angles + last) + setup.itemsize * setup.load.trained * s.hidden


def layer_buffers(setup: Setup) -> int:
    """The largest temporaries of one layer's backward: around the MLP.

    The gradients of its output, of the product, of gate and of up, and the product anew. In
    transformers' layers a norm's backward in float32 comes on top of none of these.
    """
    s, e = setup, setup.itemsize
    widest = 0
    for layer in s.structure.layers[:1] + s.structure.layers[-1:]:
        inner = max((linear.columns for linear in layer.linears), default=s.structure.hidden)
        widest = max(widest, 4 * inner + s.structure.hidden)
    norm = 3 * FLOAT * s.structure.hidden + e * s.structure.hidden
    return s.load.tokens * max(e * widest, 0 if fuses(s, s.structure.layers[0]) else norm)


def holes(setup: Setup) -> int:
    """What lies unused between live tensors on a CPU; see HOLES. A GPU's allocator reuses blocks of
    equal size, and reports what is allocated."""
    if setup.device != "cpu":
        return 0
    row = setup.itemsize * setup.load.tokens
    inner = [row * _inner(layer) for layer in setup.structure.layers]
    return int(HOLES * sum(size for size in inner if size < MAPPED))


def _inner(layer: Layer) -> int:
    """The widest input of a linear layer: that of the MLP's second."""
    return max((linear.columns for linear in layer.linears), default=0)


def _layer(setup: Setup, layer: Layer) -> int:
    T, e = setup.load.tokens, setup.itemsize
    low = _low_rank(setup, layer)
    if not fuses(setup, layer):
        return int(T * _plain(setup)) + low
    s = setup.structure
    wide = layer.width("q_proj") * 2 + layer.width("k_proj", "v_proj") + layer.width(*MLP)
    rows = e * (2 * s.hidden + wide)
    singles = FLOAT * (2 + s.heads)
    if s.head_norms:
        singles += FLOAT * (s.heads + s.key_heads)
    return T * (rows + singles) + low


def _plain(setup: Setup) -> float:
    """Bytes of a row in one of transformers' own layers."""
    return setup.structure.kept["full" if setup.trained.whole else "lora"]


def _low_rank(setup: Setup, layer: Layer) -> int:
    """z of every group, dropout's words, and the factors' copies in the compute dtype."""
    T, e, ranks = setup.load.tokens, setup.itemsize, setup.trained.ranks
    total = 0
    for linears in layer.groups.values():
        adapted = [linear for linear in linears if linear.name in ranks]
        if not adapted:
            continue
        total += T * e * sum(ranks[linear.name] for linear in adapted)
        total += e * sum(_factors(linear, ranks[linear.name]) for linear in adapted)
        total += (WORDS * T + FLOAT * adapted[0].columns) if setup.dropout else 0
    return total


def _factors(linear: Linear, rank: int) -> int:
    return rank * (linear.out + linear.columns)
