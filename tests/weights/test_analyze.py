"""Spectra of deltas: those of the full matrices, though these are never formed."""

from __future__ import annotations

import math

import pytest
import torch

from decal.config import LoraConfig
from decal.store.peft import LoraTensors
from decal.weights.analyze import (
    ModuleSpectrum,
    Place,
    frobenius,
    kept_by,
    places,
    singular_values,
    smallest_rank,
    spectra,
)


def factors(r: int, out: int, inner: int, seed: int) -> LoraTensors:
    generator = torch.Generator().manual_seed(seed)
    return LoraTensors(
        torch.randn(r, inner, generator=generator), torch.randn(out, r, generator=generator)
    )


def made(*values: float, r: int | None = None) -> ModuleSpectrum:
    """A module with these singular values."""
    return ModuleSpectrum(
        module="m", r=r or len(values), shape=(9, 9), scaling=1.0, values=tuple(values)
    )


@pytest.mark.parametrize(("r", "out", "inner"), [(3, 17, 23), (1, 5, 5), (7, 3, 11), (9, 13, 4)])
def test_values_are_those_of_the_full_matrix(r: int, out: int, inner: int) -> None:
    """float64: 1e-12 of the largest, also where r is more than a side.

    Mutation: drop the scaling, or take A for its transpose.
    """
    parts = factors(r, out, inner, r)
    found = singular_values(parts.A, parts.B, 1.7)
    wanted = torch.linalg.svdvals(1.7 * parts.B.double() @ parts.A.double())
    assert len(found) == min(r, out, inner)
    assert found == pytest.approx(wanted[: len(found)].tolist(), abs=1e-12 * float(wanted[0]))


def test_small_values_keep_their_digits() -> None:
    """A value of 1e-10 of the largest comes out to 1e-4 of itself.

    Mutation: eigenvalues of a Gram matrix, in which it would be 1e-20 of the largest.
    """
    generator = torch.Generator().manual_seed(5)
    q, p = (torch.linalg.qr(torch.randn(n, 2, generator=generator).double()).Q for n in (19, 31))
    found = singular_values(torch.diag(torch.tensor([1.0, 1e-10]).double()) @ p.T, q, -3.0)
    assert found.tolist() == pytest.approx([3.0, 3e-10], rel=1e-4)


def test_each_module_has_its_own_scaling() -> None:
    """Patterns of rank and alpha, with and without rsLoRA; B's bias is named apart.

    Mutation: take the config's own r or alpha for all, or alpha / r with rsLoRA.
    """
    for stabilized in (False, True):
        config = LoraConfig(
            r=3,
            lora_alpha=7,
            target_modules=("q", "v"),
            rank_pattern={"0.q": 5},
            alpha_pattern={"v": 11},
            use_rslora=stabilized,
            lora_bias=True,
        )
        tensors = {
            name: factors(config.rank_of(name), 13, 9, i)._replace(bias=torch.full((13,), 2.0))
            for i, name in enumerate(("l.0.q", "l.1.q", "l.1.v"))
        }
        for one, alpha, r in zip(spectra(tensors, config), (7, 7, 11), (5, 3, 3), strict=True):
            parts = tensors[one.module]
            scale = alpha / (math.sqrt(r) if stabilized else r)
            whole = scale * parts.B.double() @ parts.A.double()
            assert one.norm == pytest.approx(float(whole.norm()), rel=1e-12)
            assert (one.r, one.shape) == (r, (13, 9))
            assert one.bias == pytest.approx(scale * 2 * math.sqrt(13), rel=1e-12)


def test_embeddings_are_measured_as_they_lie() -> None:
    """in = vocabulary. Mutation: leave embeddings out, or lose which they are."""
    config = LoraConfig(r=2, lora_alpha=5, target_modules=("embed",))
    (one,) = spectra({"embed": factors(2, 7, 40, 1)}, config, frozenset({"embed"}))
    assert one.embedding
    assert one.shape == (7, 40)
    assert len(one.values) == 2


def test_ranks_of_known_spectra() -> None:
    """Equal values use all directions, a single one uses one, none uses none.

    Mutation: the entropy of energies instead of values, or base 2.
    """
    assert made(2.0, 2.0, 2.0).effective_rank == pytest.approx(3.0)
    assert made(2.0, 2.0, 2.0).stable_rank == pytest.approx(3.0)
    assert made(5.0, 0.0, 0.0).effective_rank == pytest.approx(1.0)
    assert made(5.0, 0.0).stable_rank == pytest.approx(1.0)
    assert made(0.0, 0.0).effective_rank == made(0.0, 0.0).stable_rank == 0.0
    entropy = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    assert made(3.0, 1.0).effective_rank == pytest.approx(math.exp(entropy))
    assert made(3.0, 1.0).stable_rank == pytest.approx(10 / 9)


def test_directions_count_energy() -> None:
    """Energies 90, 9, 1 %. Mutation: shares of values, or one direction too many."""
    one = made(math.sqrt(90), 3.0, 1.0)
    assert [one.directions(share) for share in (0.9, 0.91, 0.99, 0.995, 1.0)] == [1, 2, 2, 3, 3]
    assert made(0.0, 0.0).directions(0.99) == 0
    assert made(1.0).directions(0.99) == 1


def test_one_rank_everywhere_keeps_what_truncation_keeps() -> None:
    """Against deltas that are cut by their SVD. Mutation: average the modules' shares."""
    config = LoraConfig(r=6, lora_alpha=4, target_modules=("q", "v"), rank_pattern={"v": 2})
    tensors = {"l.q": factors(6, 13, 11, 1), "l.v": factors(2, 9, 15, 2)}
    found = spectra(tensors, config)
    deltas = [
        config.scaling_of(name) * (parts.B.double() @ parts.A.double())
        for name, parts in tensors.items()
    ]
    whole = sum(float(d.square().sum()) for d in deltas)
    for r, kept in enumerate(kept_by(found), 1):
        cut = 0.0
        for delta in deltas:
            u, s, v = torch.linalg.svd(delta, full_matrices=False)
            cut += float((delta - (u[:, :r] * s[:r]) @ v[:r]).square().sum())
        assert kept == pytest.approx(1 - cut / whole, abs=1e-12)
    assert len(kept_by(found)) == 6
    assert kept_by(found)[-1] == 1.0


def test_the_smallest_rank_for_all_together() -> None:
    """A small module may keep less than its 99 %. Mutation: ask it of every module."""
    found = [made(10.0, 1.0, 0.0), made(0.1, 0.1, 0.1)]
    assert smallest_rank(found, 0.99) == 1 + (100 + 0.01 < 0.99 * 101.03)
    assert max(one.directions(0.99) for one in found) == 3
    assert smallest_rank([made(0.0)], 0.99) == 0
    assert kept_by([]) == []


def test_norms_do_not_depend_on_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Mutation: sum in the tensor's own dtype (bfloat16 loses the small ones)."""
    monkeypatch.setattr("decal.weights.analyze._CHUNK", 7)
    tensor = torch.full((33, 3), 0.1, dtype=torch.bfloat16)
    assert frobenius(tensor) == pytest.approx(float(tensor.double().norm()), rel=1e-14)


def test_places() -> None:
    """Mutation: take the last number for the layer, or the last word where two kinds share it."""
    found = places(
        [
            "model.layers.3.self_attn.q_proj",
            "model.layers.10.mlp.experts.5.up_proj",
            "model.embed_tokens",
            "h.0.attn.c_proj",
            "h.0.mlp.c_proj",
            "encoder.layer.7",
        ]
    )
    assert list(found.values()) == [
        Place(3, "q_proj"),
        Place(10, "up_proj"),
        Place(None, "embed_tokens"),
        Place(0, "attn.c_proj"),
        Place(0, "mlp.c_proj"),
        Place(7, "layer"),
    ]
