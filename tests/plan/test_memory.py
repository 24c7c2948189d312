"""The peak: what is held when, by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest

from decal.model import heap
from decal.objectives import sft
from decal.plan import memory
from decal.plan.kept import MAPPED, holes, kept, layer_buffers
from decal.plan.memory import peak, together
from decal.plan.setup import Load
from decal.plan.structure import Trained, stored
from decal.quant.base import Recipe
from tests.plan.tiny import VOCABULARY, H, setup

WHOLE = Trained(parameters=100_000, whole=True)


def test_the_chunks_are_those_of_the_loss() -> None:
    """Mutation: change one of the two and not the other."""
    assert memory.CHUNK_BYTES == sft.CHUNK_BYTES
    assert memory.CHUNK_TOKENS == sft.CHUNK_TOKENS
    assert memory.APART == sft.APART
    assert memory.CHUNK_ELEMENTS == sft.CHUNK_ELEMENTS


def test_the_parts_add_up_to_the_peak() -> None:
    """Mutations: leave a part out of PARTS; count the loss and the buffers both."""
    for several in (False, True):
        asked = setup(load=Load(tokens=128, trained=100, several=several))
        found = peak(asked)
        assert sum(found.parts.values()) == found.bytes
        assert found.reported == found.bytes - found.mapped
        assert found.loss + found.buffers >= layer_buffers(asked)


def test_the_logits_are_a_chunk() -> None:
    """100 trained tokens of 1000 words in bf16, and two gradients of hidden states. Mutations: all
    rows' logits; float32; one gradient; the rows that are not trained."""
    found = peak(setup())
    assert found.loss + found.buffers == max(
        100 * (VOCABULARY + memory.APART) * 2 + 2 * 2 * 100 * H, layer_buffers(setup())
    )


def test_gradients_come_while_activations_go() -> None:
    """One micro-batch: never all of both. Mutations: add them; take the smaller; forget that a step
    of several micro-batches holds them from the first on."""
    one, several = peak(setup()), peak(setup(load=Load(tokens=128, trained=100, several=True)))
    assert one.overlap < 0
    assert several.overlap == 0
    assert several.bytes == one.bytes - one.overlap
    wide = peak(setup(r=4096))
    assert wide.bytes - wide.process - wide.weights - wide.adapter - wide.optimizer > wide.gradients


def test_full_fine_tuning_has_masters_unless_it_is_float32() -> None:
    """Mutations: no masters in 16 bits, or masters of float32 weights; map what is trained."""
    sixteen = peak(setup(trained=WHOLE, fused=False))
    thirty_two = peak(setup(trained=WHOLE, fused=False, dtype="float32"))
    assert (sixteen.adapter, thirty_two.adapter) == (400_000, 0)
    assert sixteen.mapped == thirty_two.mapped == 0
    assert sixteen.optimizer == thirty_two.optimizer == 800_000


def test_only_plain_weights_of_a_cpu_are_mapped() -> None:
    """Mutations: map packed weights; map on a GPU, or what was cast."""
    recipe = Recipe(format="nf4")
    weights = stored(setup().structure, recipe)
    assert peak(setup(recipe=recipe)).mapped == weights.plain
    assert peak(setup(recipe=recipe, mapped=False)).mapped == 0
    assert peak(setup(recipe=recipe, device="cuda")).mapped == 0


def test_checkpointing_keeps_inputs_and_one_layer() -> None:
    """Mutations: keep all layers; no layer; no inputs."""
    plain, again = setup(), setup(checkpointing=True)
    saved = peak(plain).activations - peak(again).activations
    assert saved == sum(kept(plain)) - max(kept(plain)) - 2 * 128 * H * 2


def test_what_runs_without_kernels_dequantizes() -> None:
    """Mutations: forget the copy of the weight; make one for compiled kernels."""
    recipe = Recipe(format="nf4")
    compiled, plain = (peak(setup(recipe=recipe, native=native)) for native in (True, False))
    assert plain.buffers - compiled.buffers == 2 * 192 * 64


def test_holes_are_of_the_cpu() -> None:
    """Mutations: count none; count them on a GPU, or of blocks that are mapped."""
    few, many = setup(), setup(load=Load(tokens=256, trained=100, several=False))
    assert holes(many) == pytest.approx(2 * holes(few), abs=1)
    assert holes(few) > 0
    assert holes(setup(device="cuda")) == 0
    rows = MAPPED // (2 * 192)
    assert holes(setup(load=Load(tokens=rows + 1, trained=1, several=False))) == 0
    assert holes(setup(load=Load(tokens=rows - 1, trained=1, several=False))) > 0


def test_what_is_mapped_is_what_the_heap_is_told() -> None:
    """Mutation: change one of the two and not the other."""
    assert MAPPED in heap._TRAINING.values()


@pytest.mark.parametrize(("optimizer", "bytes_each"), [("adamw", 8), ("adamw8bit", 2)])
def test_the_optimizers_state(optimizer: str, bytes_each: int) -> None:
    """Mutation: 8 bytes for the 8-bit optimizer."""
    asked = setup(optimizer=optimizer)
    assert peak(asked).optimizer == bytes_each * asked.trained.parameters


def test_loading_can_be_the_peak() -> None:
    """Mutations: forget the temporaries of quantizing; take the smaller of the two."""
    big = setup(recipe=Recipe(format="nf4"), load=Load(tokens=1, trained=1, several=False))
    found = peak(replace(big, trained=Trained(parameters=1)))
    assert found.loading == found.process + found.weights + 2 * 2 * 192 * 64
    assert found.bytes == max(found.loading, sum(found.parts.values()))


def test_candidates_share_what_is_frozen() -> None:
    """Mutations: weights for each; the process for each; one candidate's moments."""
    alone = peak(setup())
    both = together([setup(), setup()])
    assert (both.weights, both.process) == (alone.weights, alone.process)
    assert both.optimizer == 2 * alone.optimizer
    assert both.activations == 2 * alone.activations
