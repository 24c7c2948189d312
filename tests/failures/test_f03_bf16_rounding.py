"""F3: bf16 rounding eats a part of a small delta while merging, and nobody is told how much."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from decal import demo
from decal.errors import DecalWarning, VerificationError
from decal.verbs.merge import merge
from decal.verbs.plan_merge import changes_of, merging
from decal.weights import merge as files
from tests.failures.situations import LIGHT, read, tuned


def deltas(folder: Path) -> dict[str, Tensor]:
    adapter = read(folder)
    return {
        f"{module}.weight": adapter.config.scaling_of(module) * parts.B @ parts.A
        for module, parts in adapter.tensors.items()
    }


def stored(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model.safetensors")


def lost(folder: Path, meant: dict[str, Tensor]) -> float:
    """Relative error of the deltas that a merged folder holds."""
    base, merged = stored(demo.base_path()), stored(folder)
    wrong = [(merged[k].float() - base[k].float() - d).norm() for k, d in meant.items()]
    return float(torch.stack(wrong).norm() / torch.stack([d.norm() for d in meant.values()]).norm())


def test_the_shares_that_are_reported_are_those_in_the_files(tmp_path: Path) -> None:
    """Fails when survival or unmoved are computed from anything but what was written."""
    tuned(tmp_path / "a", ratio=LIGHT)
    report = merge(None, tmp_path / "a", tmp_path / "m").report
    base, merged, meant = stored(demo.base_path()), stored(tmp_path / "m"), deltas(tmp_path / "a")
    moved = {k: merged[k].float() - base[k].float() for k in meant}
    kept = sum(float((moved[k] * d).double().sum()) for k, d in meant.items())
    size = sum(float((d * d).double().sum()) for d in meant.values())
    still = sum(int((m == 0).sum()) for m in moved.values()) / sum(
        m.numel() for m in moved.values()
    )
    assert report.dtype == "bfloat16"
    assert report.survival == pytest.approx(kept / size, rel=1e-4)
    assert report.unmoved == pytest.approx(still, rel=1e-4)
    assert still > 0.05
    assert lost(tmp_path / "m", meant) > 0.05
    summary = merge(None, tmp_path / "a", tmp_path / "s").summary()
    assert summary["delta_kept_by_rounding"] == report.survival
    assert summary["weights_unmoved_by_rounding"] == report.unmoved
    assert report.verification.error == pytest.approx(lost(tmp_path / "m", meant), rel=1e-3)


def test_rounding_that_is_half_the_delta_is_a_warning(tmp_path: Path) -> None:
    """At a fifth of a light fine-tune. Fails when only a delta that is wholly lost is said."""
    tuned(tmp_path / "a", ratio=LIGHT / 5)
    with pytest.warns(DecalWarning, match="bfloat16 holds this update badly"):
        merge(None, tmp_path / "a", tmp_path / "m")


def test_float32_keeps_all_of_it(tmp_path: Path) -> None:
    """Fails when the sum is rounded to the base's dtype before it is written as fp32."""
    tuned(tmp_path / "a", ratio=LIGHT)
    report = merge(None, tmp_path / "a", tmp_path / "m", dtype="fp32").report
    assert report.survival == pytest.approx(1, abs=1e-4)
    assert report.unmoved == pytest.approx(0, abs=1e-3)
    assert lost(tmp_path / "m", deltas(tmp_path / "a")) < 1e-4


def test_rounding_the_delta_first_would_lose_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The sum is rounded once. Without that: the delta to bf16, then the sum, as a plain
    `weight += delta` in bf16 does."""
    tuned(tmp_path / "a", ratio=LIGHT)
    meant = deltas(tmp_path / "a")
    merge(None, tmp_path / "a", tmp_path / "once")

    def twice(key: str, weight: Tensor, delta: files.FileDelta, dtype: torch.dtype, *_: object):
        parts = delta.low_rank
        product = parts.B.to(dtype) @ parts.A.to(dtype)
        return (weight.to(dtype) + product * parts.scale).to(dtype)

    monkeypatch.setattr(files, "add_delta", twice)
    with pytest.raises(VerificationError, match="28 of 28"):
        merge(None, tmp_path / "a", tmp_path / "twice")
    assert lost(tmp_path / "once", meant) < lost(tmp_path / "twice.failed-verification", meant)


def test_a_delta_of_which_nothing_is_left_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without the guard the merged folder is the base, and looks like a merge."""
    tuned(tmp_path / "a", ratio=1e-12)
    with pytest.raises(VerificationError, match="28 of 28") as error:
        merge(None, tmp_path / "a", tmp_path / "m")
    assert "--dtype fp32" in (error.value.hint or "")
    assert not (tmp_path / "m").exists()
    monkeypatch.setattr(files, "_survived", lambda _: None)
    plan = merging(read(tmp_path / "a"), str(demo.base_path()), None)
    files.merge_files(plan.files, tmp_path / "m", changes_of(plan))
    base, merged = stored(demo.base_path()), stored(tmp_path / "m")
    assert all(torch.equal(merged[key], base[key]) for key in base)
