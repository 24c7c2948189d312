"""The peak of a training in bytes, from shapes and settings alone. Read this file first.

What is held, and when. P are the trained parameters, T the tokens of the largest micro-batch, N its
trained tokens, H the hidden size, V the vocabulary, e the bytes of the compute dtype.

    always       process      Python, torch, transformers, rows: measured, not computed
                 weights      as stored: packed codes and scales, the rest in the compute dtype
                 adapter      4 P       float32 masters; of full fine-tuning with 16-bit weights too
    from the first update     optimizer  8 P    two float32 moments (2 P in 8 bits)
    in a pass    activations  what backward needs of every layer (kept.py), or with checkpointing
                              the input of every layer and all of one
                 gradients    4 P       grow in backward, layer by layer, while activations go
    at its end   loss         a chunk of logits, and the gradient of N hidden states, twice
                              (where the head is trained: all N V logits)
    in backward  buffers      the largest temporaries: the gradients inside one MLP; in the paths
                              without compiled kernels the dequantized weight; where all is trained
                              the embedding's gradient as it comes

    on a CPU     holes        between the tensors in the heap, which is not given back (kept.py)

The peak of a step is the largest of

    activations + max(loss, buffers)                            where backward begins; the sum of
                                                                both where the head is trained
    gradients + activations of one layer + buffers              where it ends
    gradients                                                   in the update

on top of what is always held and the optimizer's state. A step of several micro-batches holds the
gradients from the first of them on, so then they count in all three. Before the first step there is
the peak of loading: weights, and the largest of them twice in 16 bits while it is quantized.

On a CPU `weights` are of two kinds. What is packed, cast or trained is memory of the process. A
16-bit weight that lies in the file as the model computes with it is mapped: it must be in memory to
be fast, but it is the page cache's, and `Memory.anonymous`, which a run reports, leaves it out.
`Peak.bytes` counts it, `Peak.reported` does not.

The three paths keep different things (kept.py): the fused steps of the Llama family on a CPU;
transformers' own layers around decal's products, for other families, GPUs and float32 without
library; and checkpointing, which is either of them, one layer at a time.

Nothing here is fitted to a single run. What a number is, and where it comes from, stands beside it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from decal.plan.kept import holes, kept, layer_buffers, outside
from decal.plan.setup import Setup
from decal.plan.structure import stored

CHUNK_BYTES = 2**25 - 2**16
CHUNK_TOKENS = 256
APART = 32
CHUNK_ELEMENTS = {"cpu": 2**22, "other": 2**25}
"""As in objectives/sft.py: how many logits exist at a time. A test holds them equal."""
MASTER = GRADIENT = 4
"""Bytes of a float32 number."""
MOMENTS = {"adamw": 8, "adamw8bit": 2, "paged_adamw8bit": 2}
"""Bytes of AdamW's state for one parameter, by train.optimizer."""


@dataclass(frozen=True, kw_only=True)
class Peak:
    """Bytes of a training by part, at the highest point of a step."""

    process: int
    weights: int
    adapter: int
    gradients: int
    optimizer: int
    activations: int
    loss: int
    """What the loss needs beyond `buffers`, where its moment is the higher one."""
    buffers: int
    holes: int
    """What lies unused between tensors in the heap."""
    overlap: int
    """Negative: activations that are gone before the last gradients come."""
    mapped: int
    """Part of `weights` that is mapped from files."""
    loading: int
    """The peak before the first step."""

    PARTS = (
        "process",
        "weights",
        "adapter",
        "gradients",
        "optimizer",
        "activations",
        "loss",
        "buffers",
        "holes",
        "overlap",
    )

    @property
    def parts(self) -> dict[str, int]:
        """The parts, which add up to the peak of a step."""
        return {name: getattr(self, name) for name in self.PARTS}

    @property
    def bytes(self) -> int:
        """The peak, mapped weights included: what must be there for the run to go on."""
        return max(sum(self.parts.values()), self.loading)

    @property
    def reported(self) -> int:
        """The peak of a step that a run reports: without mapped weights."""
        return sum(self.parts.values()) - self.mapped


def peak(setup: Setup) -> Peak:
    """The peak of one training."""
    return together([setup])


def together(setups: Sequence[Setup]) -> Peak:
    """The peak of several candidates that are trained at once over one base.

    The base counts once, masters, gradients and moments of each candidate count; activations are
    those of all candidates' rows. All setups must have the same structure, recipe and dtype; one of
    them is a usual training.
    """
    first = setups[0]
    weights, mapped = _weights(first)
    numbers = [s.trained.parameters for s in setups]
    adapter = sum(_masters(s) for s in setups)
    gradients = GRADIENT * sum(numbers)
    optimizer = sum(MOMENTS[s.optimizer] * s.trained.parameters for s in setups)
    activations = sum(_activations(s) for s in setups)
    one = sum(_activations(replace(s, checkpointing=False)) for s in setups)
    one //= max(1, len(first.structure.layers))
    loss, buffers = _loss(setups), _buffers(setups)
    # All logits are there while the head's gradient is made; a chunk of them is gone by then.
    loss = loss if first.trained.whole else max(0, loss - buffers)
    several = any(s.load.several for s in setups)
    begin = activations + loss + buffers
    end = one + buffers
    # What the sum of the rows counts twice: layers are gone before gradients are all.
    overlap = 0 if several else max(begin, gradients + end) - begin - gradients
    process = first.process
    return Peak(
        process=process,
        weights=weights,
        adapter=adapter,
        gradients=gradients,
        optimizer=optimizer,
        activations=activations,
        loss=loss,
        buffers=buffers,
        holes=sum(holes(s) for s in setups),
        overlap=overlap,
        mapped=mapped,
        loading=process + weights + _quantizing(first),
    )


def _weights(setup: Setup) -> tuple[int, int]:
    """Bytes of the weights, and how many of them are mapped from files."""
    found = stored(setup.structure, setup.recipe, setup.dtype)
    mapped = setup.mapped and setup.device == "cpu" and not setup.trained.whole
    return found.total, found.plain if mapped else 0


def _masters(setup: Setup) -> int:
    """float32 masters; weights that are float32 are their own."""
    if setup.trained.whole and setup.dtype == "float32":
        return 0
    return MASTER * setup.trained.parameters


def _quantizing(setup: Setup) -> int:
    """The largest weight as it is read and as it is packed, while loading."""
    return 0 if setup.recipe is None else 2 * setup.itemsize * setup.structure.largest


def _activations(setup: Setup) -> int:
    """What backward finds when it begins."""
    s = setup
    per_layer = kept(s)
    inputs = s.itemsize * s.load.tokens * s.structure.hidden
    if s.checkpointing:
        return len(per_layer) * inputs + max(per_layer, default=0) + outside(s)
    return sum(per_layer) + outside(s)


def _loss(setups: Sequence[Setup]) -> int:
    """What the loss holds at its highest, for all rows together."""
    s = setups[0]
    N, V, H = sum(x.load.trained for x in setups), s.structure.vocabulary, s.structure.hidden
    if s.trained.whole:  # all logits, and two float32 copies of a chunk
        chunk = min(N * V, max(V, CHUNK_ELEMENTS["cpu" if s.device == "cpu" else "other"]))
        return s.itemsize * N * V + 2 * 4 * chunk
    most = max(CHUNK_TOKENS, CHUNK_BYTES // ((V + APART) * s.itemsize))
    rows = math.ceil(N / max(1, math.ceil(N / most)))
    chunk = s.itemsize * rows * (V + APART)
    if not s.compiled:  # the softmax is float32 in torch, some rows at a time
        chunk += 2 * 4 * min(rows * V, 2**22)
    return chunk + 2 * s.itemsize * N * H


def _buffers(setups: Sequence[Setup]) -> int:
    """The largest temporary of backward, for all rows together."""
    first = setups[0]
    return sum(layer_buffers(s) for s in setups) + _dequantized(first) + _fresh(first)


def _fresh(setup: Setup) -> int:
    """Of full fine-tuning the gradients that are not collected yet: the embedding's is as large as
    all of it, and comes from the lookup, and where it is tied from the head too, and as their sum.
    """
    s = setup.structure
    if not setup.trained.whole:
        return 0
    tied = not any(weight.head for weight in s.weights)
    return (3 if tied else 1) * setup.itemsize * s.hidden * s.vocabulary


def _dequantized(setup: Setup) -> int:
    """The weight that a product without compiled kernels makes anew."""
    if setup.recipe is None or setup.compiled:
        return 0
    return setup.itemsize * setup.structure.largest
