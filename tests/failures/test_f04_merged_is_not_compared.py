"""F4: a merge is checked for NaN at most; nobody compares what lies on the disk with the sum."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from decal import demo
from decal.errors import VerificationError
from decal.verbs.merge import merge
from decal.verbs.verify import verify
from decal.weights import merge as files
from decal.weights.delta import FileDelta, add_delta, cast
from decal.weights.verify import Finding, Verification
from tests.failures.situations import LIGHT, tuned

SHARD = "model.safetensors"
UP = "model.layers.2.mlp.up_proj.weight"
Sum = Callable[[str, Tensor, FileDelta, torch.dtype], Tensor]


def nothing(key: str, weight: Tensor, delta: FileDelta, dtype: torch.dtype) -> Tensor:
    return cast(key, weight, dtype)


def twice(key: str, weight: Tensor, delta: FileDelta, dtype: torch.dtype) -> Tensor:
    return add_delta(key, add_delta(key, weight, delta, torch.float32), delta, dtype)


def unscaled(key: str, weight: Tensor, delta: FileDelta, dtype: torch.dtype) -> Tensor:
    return add_delta(key, weight, delta._replace(low_rank=delta.low_rank._replace(scale=1)), dtype)


def only_in(wrong: Sum, key: str) -> Sum:
    return lambda k, *rest: (wrong if k == key else add_delta)(k, *rest)


def tensors(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / SHARD)


@pytest.mark.parametrize("wrong", [nothing, twice, unscaled])
def test_a_wrong_sum_in_one_tensor_of_28_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wrong: Sum
) -> None:
    """All of it finite, so that a look for NaN sees nothing. The folder is not put in place.

    Fails when the comparison is against what was written, or an average over all tensors.
    """
    tuned(tmp_path / "a", ratio=LIGHT)
    monkeypatch.setattr(files, "add_delta", only_in(wrong, UP))
    with pytest.raises(VerificationError, match="1 of 28 merged tensors") as error:
        merge(None, tmp_path / "a", tmp_path / "m")
    assert UP.removesuffix(".weight") in error.value.details[0]
    assert not (tmp_path / "m").exists()
    aside = tensors(tmp_path / "m.failed-verification")
    assert all(tensor.isfinite().all() for tensor in aside.values())


def test_without_the_guard_a_merge_of_nothing_looks_like_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The folder is complete, the report counts 28 tensors, and the weights are the base's."""
    tuned(tmp_path / "a", ratio=LIGHT)
    monkeypatch.setattr(files, "add_delta", nothing)
    monkeypatch.setattr(files, "_verified", lambda *_: Verification(findings=(), pairs=28))
    report = merge(None, tmp_path / "a", tmp_path / "m").report
    assert report.targeted == 28
    base, merged = tensors(demo.base_path()), tensors(tmp_path / "m")
    assert all(torch.equal(merged[key], base[key]) for key in base)


def test_what_is_compared_is_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A number that changes between writing and looking again is seen, one of 196,608."""
    tuned(tmp_path / "a", ratio=LIGHT)
    write_rest = files._write_rest

    def damage(job: files._Job, folder: Path) -> None:
        write_rest(job, folder)
        found = tensors(folder)
        found[UP].view(-1)[1234] += 0.5
        save_file(found, folder / SHARD, {"format": "pt"})

    monkeypatch.setattr(files, "_write_rest", damage)
    with pytest.raises(VerificationError, match="1 of 28 merged tensors") as error:
        merge(None, tmp_path / "a", tmp_path / "m")
    assert "1 of 196,608 numbers" in error.value.details[0]


def test_a_right_merge_says_how_right(tmp_path: Path) -> None:
    """Fails when the error is not that of the file, or rounding is taken for a fault."""
    tuned(tmp_path / "a", ratio=LIGHT)
    found = merge(None, tmp_path / "a", tmp_path / "m").report.verification
    assert found.pairs == len(found.findings) == 28
    assert found.worst is not None
    assert 0.01 < found.worst.relative < found.worst.allowed < 0.9
    exact = merge(None, tmp_path / "a", tmp_path / "w", dtype="fp32").report.verification
    assert exact.worst is not None
    assert exact.worst.relative < 1e-4


def test_the_merged_model_is_compared_in_logits_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On request, relative to the adapter's own effect: a merge that did nothing is 1 away.

    Fails when the distance is that of logits alone, which a small effect leaves small.
    """
    tuned(tmp_path / "a", ratio=0.1)
    done = merge(None, tmp_path / "a", tmp_path / "m", verify="logits")
    assert done.effect is not None
    assert done.effect["distance"] < 0.25
    checked = files._checked

    def passed(*what: Any) -> Finding:
        found = checked(*what)
        return replace(found, off=0, relative=0.0, kept=found.meant, missed=0.0)

    monkeypatch.setattr(files, "add_delta", nothing)
    monkeypatch.setattr(files, "_checked", passed)
    with pytest.raises(VerificationError, match=r"1\.00 of the adapter's effect away"):
        merge(None, tmp_path / "a", tmp_path / "n", verify="logits")
    assert not (tmp_path / "n").exists()


def test_what_is_damaged_later_is_found(tmp_path: Path) -> None:
    """By `decal verify`, twice: from the record, and from base and adapter. Transformers loads the
    folder without a word. Fails when headers alone are compared."""
    tuned(tmp_path / "a", ratio=LIGHT)
    merge(None, tmp_path / "a", tmp_path / "m")
    assert not verify(tmp_path / "m")["problems"]
    found = tensors(tmp_path / "m")
    found[UP].view(-1)[1234] += 0.5
    save_file(found, tmp_path / "m" / SHARD, {"format": "pt"})
    record, merged = verify(tmp_path / "m")["problems"]
    assert record == f"record: tensor `{UP}` was changed since it was written"
    assert merged.startswith(f"base + adapter: {UP.removesuffix('.weight')}: 1 of 196,608 numbers")
    AutoModelForCausalLM.from_pretrained(tmp_path / "m")
