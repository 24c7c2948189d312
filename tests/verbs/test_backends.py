"""A training with compiled kernels beside the same in plain torch: one curve.

The two differ by bf16 rounding only, so the first step agrees to it, and later ones drift apart no
further than two seeds do.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from decal import demo
from decal.config import RunConfig
from decal.kernels import native
from decal.verbs.train import train

pytestmark = pytest.mark.skipif(not native.available(), reason="the kernels are not compiled")


def curve(folder: Path, steps: int, kernels: str | None, seed: int = 0) -> list[float]:
    folder.mkdir()
    data = folder / "train.jsonl"
    demo.write_jsonl(data, "train", limit=32 * steps)
    config = RunConfig(
        base=str(demo.base_path()),
        quant="nf4",
        adapter={"r": 8, "lora_alpha": 20, "lora_dropout": 0.05},
        data={"path": str(data), "max_length": 128},
        train={"max_steps": steps, "batch_size": 16, "lr": 1.5e-3, "warmup": 0.1, "seed": seed},
        output=str(folder / "run"),
    )
    with native.forced(kernels):
        done = train(config)
    assert done is not None
    return [loss for _, loss in done.result.curve]


def apart(a: list[float], b: list[float]) -> float:
    """Mean distance of two curves."""
    return sum(abs(x - y) for x, y in zip(a, b, strict=True)) / len(a)


def test_the_first_steps_agree_to_rounding(tmp_path: Path) -> None:
    """Fails when the compiled masks, the scaling or the loss differ from torch's."""
    compiled = curve(tmp_path / "compiled", 3, None)
    plain = curve(tmp_path / "plain", 3, "none")
    assert compiled[0] == pytest.approx(plain[0], rel=2**-8)
    assert compiled == pytest.approx(plain, rel=2**-6)


def test_a_run_repeats_itself_bit_for_bit(tmp_path: Path) -> None:
    """Fails when a kernel's sums depend on which thread is first."""
    assert curve(tmp_path / "once", 4, None) == curve(tmp_path / "again", 4, None)


@pytest.mark.slow
def test_200_steps_stay_within_the_spread_of_two_seeds(tmp_path: Path) -> None:
    """Fails when gradients are off by more than rounding: the curves then part early."""
    compiled = curve(tmp_path / "compiled", 200, None)
    plain = curve(tmp_path / "plain", 200, "none")
    other = curve(tmp_path / "other", 200, None, seed=1)
    print(
        f"compiled and torch {apart(compiled, plain):.4f}, two seeds {apart(compiled, other):.4f}"
    )
    assert apart(compiled, plain) <= apart(compiled, other)
    assert compiled[0] == pytest.approx(plain[0], rel=2**-8)
