"""A merge on disk is base + delta, or it is said what it is instead."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from decal.adapters.base import LowRank
from decal.errors import VerificationError
from decal.store.base import open_base
from decal.weights import merge as files
from decal.weights import verify as module
from decal.weights.changes import Changes, Dequantized
from decal.weights.delta import FileDelta, add_delta
from decal.weights.merge import merge_files
from decal.weights.verify import Verification, check_delta

SCALE = 7 / 3
DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64]


def _delta(out: int, inner: int, size: float = 0.1, seed: int = 0) -> FileDelta:
    g = torch.Generator().manual_seed(seed)
    parts = LowRank(size * torch.randn(3, inner, generator=g), torch.randn(out, 3, generator=g),
                    SCALE, 0.5)  # fmt: skip
    return FileDelta(parts, module="layers.0.x")


def _scaled(delta: FileDelta, factor: float) -> FileDelta:
    parts = delta.low_rank
    return delta._replace(low_rank=parts._replace(scale=factor * parts.scale))


def _mutated() -> dict[str, Callable[[Tensor, FileDelta, torch.dtype], Tensor]]:
    """What may go wrong with one sum."""

    def plain(w: Tensor, d: FileDelta, dtype: torch.dtype) -> Tensor:
        return add_delta("w", w, d, dtype)

    return {
        "nothing": lambda w, d, dtype: w.to(dtype),
        "twice": lambda w, d, dtype: plain(w, _scaled(d, 2), dtype),
        "scaling dropped": lambda w, d, dtype: plain(w, _scaled(d, 1 / SCALE), dtype),
        "subtracted": lambda w, d, dtype: plain(w, _scaled(d, -1), dtype),
        "transposed": lambda w, d, dtype: plain(
            w, d._replace(transposed=not d.transposed), dtype
        ),
        "another pair": lambda w, d, dtype: plain(w, _delta(*d.shape, seed=5), dtype),
        "another weight": lambda w, d, dtype: plain(w.flip(0), d, dtype),
    }  # fmt: skip


MUTATED = _mutated()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("slices", [1, 77, 1 << 18])
def test_a_right_sum_passes(
    dtype: torch.dtype, transposed: bool, slices: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The error is rounding's: 0.4 (eps / 2) ||W|| / ||D|| in the mean, and under its own limit.
    Fails if a slice is skipped, or the orientation is."""
    monkeypatch.setattr(module, "_SLICE", slices)
    delta = _delta(45, 31)._replace(transposed=transposed)
    weight = torch.randn(delta.shape).to(dtype)
    found = check_delta("w", weight, add_delta("w", weight, delta, dtype), delta)
    parts = delta.low_rank
    d = SCALE * (parts.B.double() @ parts.A.double())
    size = float(d.norm())
    assert found.right
    assert not found.faint
    assert (found.off, found.numbers, found.should_move) == (0, 45 * 31, 45 * 31)
    expected = 0.4 * torch.finfo(dtype).eps / 2 * float(weight.double().norm()) / size
    assert found.relative < 2 * expected + 1e-5
    assert found.relative < found.allowed < 10 * expected + 2e-4
    assert found.meant == pytest.approx(size**2, rel=1e-5)
    assert found.kept == pytest.approx(size**2, rel=0.01)
    assert math.sqrt(found.missed) == pytest.approx(expected * size, rel=0.4, abs=1e-5 * size)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("wrong", MUTATED)
def test_a_wrong_sum_does_not(wrong: str, dtype: torch.dtype) -> None:
    """Each mutation is found by both questions. Fails if either of them always says yes."""
    delta = _delta(37, 37)
    weight = torch.randn(37, 37).to(dtype)
    found = check_delta("w", weight, MUTATED[wrong](weight, delta, dtype), delta)
    assert not found.right
    assert found.off > found.numbers / 2
    assert found.relative > max(0.3, found.allowed)
    if wrong in ("nothing", "twice"):
        assert found.relative == pytest.approx(1, abs=0.05)
    assert "layers.0.x" in found.problem()


def test_one_wrong_number_is_found() -> None:
    """Two roundings away, where the layer's output cannot tell. Fails if only norms are compared"""
    delta, weight = _delta(37, 41), torch.randn(37, 41).bfloat16()
    after = add_delta("w", weight, delta, torch.bfloat16)
    after[3, 4] += 3 * torch.finfo(torch.bfloat16).eps * after[3, 4]
    found = check_delta("w", weight, after, delta)
    assert found.relative < found.allowed
    assert (found.off, found.right) == (1, False)
    after[3, 4] = math.nan
    assert check_delta("w", weight, after, delta).off == 1


def test_rounding_the_delta_before_the_sum_is_found() -> None:
    delta, weight = _delta(37, 41), torch.randn(37, 41).bfloat16()
    parts = delta.low_rank
    update = (parts.B.bfloat16() @ parts.A.bfloat16()) * parts.scale
    assert not check_delta("w", weight, weight + update, delta).right


@pytest.mark.parametrize("size", [1e-2, 1e-3, 1e-4])
def test_a_small_delta_in_bf16_is_faint_and_not_wrong(size: float) -> None:
    """Fails if the limit is a fixed number: rounding is then taken for a wrong merge, or a merge
    that did nothing for a right one."""
    delta, weight = _delta(64, 48, size=size), torch.randn(64, 48).bfloat16()
    found = check_delta("w", weight, add_delta("w", weight, delta, torch.bfloat16), delta)
    assert found.right
    assert found.faint is (size < 1e-2)
    wide = check_delta("w", weight, add_delta("w", weight, delta, torch.float32), delta)
    assert wide.right
    assert not wide.faint
    nothing = check_delta("w", weight, weight.float(), delta)
    assert not nothing.right
    assert nothing.relative == pytest.approx(1, abs=1e-5)


def test_what_rounding_leaves_is_counted() -> None:
    """At delta/W of about 0.001 most bf16 weights do not move. Fails if the weights that stayed are
    counted among all, and not where the delta is not zero."""
    delta = _delta(64, 48, size=3e-4)
    delta.low_rank.A[:, :24] = 0
    weight = torch.randn(64, 48).bfloat16()
    found = check_delta("w", weight, add_delta("w", weight, delta, torch.bfloat16), delta)
    whole = Verification(findings=(found,), pairs=1)
    assert found.should_move == 64 * 24
    assert whole.unmoved is not None
    assert 0.5 < whole.unmoved < 0.99
    assert whole.survival is not None
    assert 0.3 < whole.survival < 3
    assert whole.error is not None
    assert whole.error > 0.5


def test_no_delta_at_all_is_right() -> None:
    """A fresh adapter, B = 0. Fails if the error is divided by nothing."""
    weight = torch.randn(5, 4).bfloat16()
    found = check_delta("w", weight, weight, _scaled(_delta(5, 4), 0))
    whole = Verification(findings=(found,), pairs=1)
    assert (found.right, found.faint, found.lost, found.relative) == (True, False, False, 0)
    assert (whole.survival, whole.error, whole.unmoved, whole.quantization) == (None,) * 4
    assert not check_delta("w", weight, 2 * weight, _scaled(_delta(5, 4), 0)).right


# --- merges ---------------------------------------------------------------------------------------


def _base(folder: Path) -> dict[str, Tensor]:
    folder.mkdir()
    tensors = {f"layers.{i}.{n}.weight": torch.randn(9, 9) for i in range(2) for n in ("q", "k")}
    tensors = {key: tensor.bfloat16() for key, tensor in tensors.items()}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text('{"model_type": "x"}')
    return tensors


def _changes(tensors: dict[str, Tensor], **more: object) -> Changes:
    deltas = {
        key: _delta(9, 9, seed=i)._replace(module=key.removesuffix(".weight"))
        for i, key in enumerate(tensors)
    }
    return Changes(deltas=deltas, **more)  # type: ignore[arg-type]


def _swap(key: str, weight: Tensor, delta: FileDelta, dtype: torch.dtype) -> Tensor:
    seed = {"layers.0.q.weight": 1, "layers.0.k.weight": 0}.get(key)
    other = delta if seed is None else _delta(9, 9, seed=seed)
    return add_delta(key, weight, other, dtype)


def test_a_merge_says_what_was_checked(tmp_path: Path) -> None:
    tensors = _base(tmp_path / "base")
    report = merge_files(open_base(tmp_path / "base"), tmp_path / "out", _changes(tensors))
    facts = report.verification.facts()
    assert (facts["pairs"], facts["modules"], facts["too_small_for_dtype"]) == (4, 4, 0)
    worst = report.verification.worst
    assert worst is not None
    assert worst.relative == max(found.relative for found in report.verification.findings)
    assert facts["worst_module"] == worst.module
    assert 0 < worst.relative < 0.01


@pytest.mark.parametrize(
    ("wrong", "count"),
    [(name, 4) for name in MUTATED] + [("swapped", 2), ("one pair left out", 1)],
)
def test_a_wrong_merge_is_kept_aside(
    wrong: str, count: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fails if the check takes its sums from the function that made them."""
    tensors, out = _base(tmp_path / "base"), tmp_path / "out"

    def mutated(key: str, weight: Tensor, delta: FileDelta, dtype: torch.dtype) -> Tensor:
        if wrong == "swapped":
            return _swap(key, weight, delta, dtype)
        if wrong == "one pair left out":
            return weight if key == "layers.1.k.weight" else add_delta(key, weight, delta, dtype)
        return MUTATED[wrong](weight, delta, dtype)

    monkeypatch.setattr(files, "add_delta", mutated)
    for name in ("out.failed-verification", "out.failed-verification-2"):
        with pytest.raises(VerificationError, match=f"{count} of 4 merged tensors") as caught:
            merge_files(open_base(tmp_path / "base"), out, _changes(tensors))
        assert str(tmp_path / name) in caught.value.details[-1]
        assert (tmp_path / name / "model.safetensors").exists()
    assert not out.exists()
    assert not [f for f in tmp_path.iterdir() if f.name.startswith(".")]


def test_a_pair_that_is_not_used_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if pairs are counted by what was asked for and not by what was done."""
    tensors = _base(tmp_path / "base")
    real = files._made
    monkeypatch.setattr(
        files, "_made", lambda job, key, spec: None if ".1.q." in key else real(job, key, spec)
    )
    with pytest.raises(VerificationError, match="1 of 4 A/B pairs") as caught:
        merge_files(open_base(tmp_path / "base"), tmp_path / "out", _changes(tensors))
    assert caught.value.details[0] == "layers.1.q.weight: used 0 times"


def test_a_stale_shard_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file is another merge's, though its hashes were right when it was written. Fails if the
    tensors are not read from the disk again."""
    tensors = _base(tmp_path / "base")
    first = merge_files(open_base(tmp_path / "base"), tmp_path / "first", _changes(tensors))
    real = files._write_rest

    def stale(job: files._Job, folder: Path) -> None:
        (folder / "model.safetensors").write_bytes((tmp_path / "old").read_bytes())
        real(job, folder)

    changes = _changes(tensors)
    once_more = {k: _scaled(d, 1.5) for k, d in changes.deltas.items()}
    (first.out / "model.safetensors").rename(tmp_path / "old")
    monkeypatch.setattr(files, "_write_rest", stale)
    with pytest.raises(VerificationError, match="4 of 4"):
        merge_files(
            open_base(tmp_path / "base"), tmp_path / "out", replace(changes, deltas=once_more)
        )


def test_tensors_trained_whole_are_compared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensors = _base(tmp_path / "base")
    changes = Changes(deltas={}, replaced={"layers.0.q.weight": torch.randn(9, 9)})
    merge_files(open_base(tmp_path / "base"), tmp_path / "right", changes)
    real = files._before
    monkeypatch.setattr(files, "_before", lambda job, key: 2 * real(job, key))
    with pytest.raises(VerificationError, match="not the adapter's own") as caught:
        merge_files(open_base(tmp_path / "base"), tmp_path / "out", changes)
    assert tensors.keys() >= {caught.value.details[0].partition(":")[0]}


@pytest.mark.parametrize("onto", ["trained", "original"])
def test_the_distance_of_quantization_is_taken(onto: str, tmp_path: Path) -> None:
    """||W16 - W4|| / ||delta||, whichever of the two the deltas go onto, by kind of layer. Fails if
    the merged weight is taken for one of them."""
    tensors = _base(tmp_path / "base")

    def coarse(weight: Tensor) -> Tensor:
        return ((weight.float() * 4).round() / 4).bfloat16()

    name = "dequantized" if onto == "trained" else "compared"
    changes = _changes(tensors, **{name: dict.fromkeys(tensors, Dequantized(coarse))})
    report = merge_files(open_base(tmp_path / "base"), tmp_path / "out", changes)
    ratios = report.verification.quantization
    assert ratios is not None
    assert list(ratios) == ["all", "k", "q"]
    for kind in ("q", "k"):
        keys = [key for key in tensors if f".{kind}." in key]
        gap = sum(float((tensors[k].float() - coarse(tensors[k])).norm() ** 2) for k in keys)
        delta = [changes.deltas[key].low_rank for key in keys]
        size = sum(float((p.scale * p.B @ p.A).norm() ** 2) for p in delta)
        assert ratios[kind] == pytest.approx(math.sqrt(gap / size), rel=1e-4)
    after = load_file(tmp_path / "out" / "model.safetensors")["layers.0.q.weight"]
    start = tensors["layers.0.q.weight"]
    parts = changes.deltas["layers.0.q.weight"].low_rank
    wanted = (
        coarse(start) if onto == "trained" else start
    ).float() + parts.scale * parts.B @ parts.A
    assert torch.equal(after, wanted.bfloat16())
