"""The quickstart's stages on a handful of steps; the real one is run by make quickstart."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from decal.errors import OutputError, VerificationError
from decal.verbs import quickstart as module
from decal.verbs.quickstart import quickstart

FACTS = {
    "base_accuracy", "adapter_accuracy", "reloaded_accuracy", "merged_accuracy",
    "trainable_params", "total_params", "base_bytes_16bit", "base_bytes_quantized",
    "bits_per_weight", "adapter_bytes", "peak_memory_bytes", "train_tokens_per_second", "seconds",
    "run", "adapter", "merged",
}  # fmt: skip


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "STEPS", 3)
    monkeypatch.setattr(module, "BATCH", 8)
    monkeypatch.setattr(module, "HELD_OUT", 12)
    monkeypatch.setattr(module, "AGREEMENT", 0.9)


@pytest.mark.usefixtures("short")
def test_the_whole_way(tmp_path: Path) -> None:
    said: list[Any] = []
    facts = quickstart(tmp_path / "q", say=said.append)
    assert set(facts) == FACTS
    assert facts["reloaded_accuracy"] == facts["adapter_accuracy"]
    assert facts["trainable_params"] == 311_296
    assert facts["base_bytes_16bit"] == 2 * (facts["total_params"] - facts["trainable_params"])
    # 3,145,728 weights at 4.127 bits, the rest at 16
    assert facts["base_bytes_quantized"] == pytest.approx(
        3_145_728 * 4.127 / 8 + 2 * (3_672_320 - 3_145_728), rel=2e-4
    )
    for name in ("run", "adapter", "merged"):
        assert Path(facts[name]).is_dir()
    assert (tmp_path / "q" / "run" / "loss.png").exists()
    with pytest.raises(OutputError):
        quickstart(tmp_path / "q")
    quickstart(tmp_path / "q", force=True)


@pytest.mark.usefixtures("short")
def test_a_reload_that_predicts_otherwise_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The proof can fail: a reload that loses the adapter is found out."""
    from decal import demo
    from decal.verbs.load import load_base

    monkeypatch.setattr(module, "load", lambda run: load_base(demo.base_path()))
    monkeypatch.setattr(module, "STEPS", 40)
    with pytest.raises(VerificationError, match="reloaded adapter predicts otherwise"):
        quickstart(tmp_path / "q")
