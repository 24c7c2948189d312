"""F2: a QLoRA adapter is merged onto the 16-bit base, which is not the one it was trained on.

Training computed with the dequantized 4-bit weights, so the delta belongs to these. On the original
weights the rounding of quantization comes in a second time, and for a light fine-tune that is many
times the delta.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from decal import demo
from decal.errors import AdapterError
from decal.verbs import merge as verb
from decal.verbs.load import load_base
from decal.verbs.merge import merge
from tests.failures.situations import LIGHT, logits, off, read, tuned
from tests.zoo import rewrite


def merged(folder: Path, out: Path, **how: Any) -> torch.Tensor:
    merge(None, folder, out, dtype="fp32", **how)
    return logits(AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32))


def test_the_default_is_the_base_of_training(tmp_path: Path) -> None:
    """Fails when the default is the original, or untargeted layers are left undequantized."""
    wanted, bare = tuned(tmp_path / "a", ratio=LIGHT, quant="nf4", target_modules=["q_proj"])
    assert off(merged(tmp_path / "a", tmp_path / "m"), wanted, bare) < 1e-3


def test_without_the_guard_the_merge_is_off_by_several_deltas(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What merging onto the original gives when nobody remembers how the base was quantized."""
    wanted, bare = tuned(tmp_path / "a", ratio=LIGHT, quant="nf4")
    monkeypatch.setattr(verb, "_onto", lambda *_: "original")
    assert off(merged(tmp_path / "a", tmp_path / "m"), wanted, bare) > 3


@pytest.mark.parametrize("onto", ["trained", "original"])
def test_the_distance_of_the_two_bases_is_said(tmp_path: Path, onto: Any) -> None:
    """In units of the update, whichever base it goes onto. Fails when it is taken of other weights
    than those of the training."""
    tuned(tmp_path / "a", ratio=LIGHT, quant="nf4")
    done = merge(None, tmp_path / "a", tmp_path / "m", onto=onto)
    plain, _ = load_base(demo.base_path(), dtype="float32", device="cpu")
    packed, _ = load_base(demo.base_path(), quant="nf4", dtype="float32", device="cpu")
    adapter = read(tmp_path / "a")
    gap = size = 0.0
    for module in adapter.tensors:
        weight = plain.get_submodule(module).weight
        gap += float((weight - packed.get_submodule(module).weight()).norm() ** 2)
        size += float((LIGHT * packed.get_submodule(module).weight().norm()) ** 2)
    found = done.report.verification.quantization
    assert found is not None
    assert found["all"] == pytest.approx((gap / size) ** 0.5, rel=0.02)
    assert found["all"] > 5
    assert f"{found['all']:.2f} times" in done.readable()["verified"]["quantization"]


def test_with_data_both_losses_are_said(tmp_path: Path) -> None:
    """Fails when the merged model's loss is not that of the merged folder, or one is left out."""
    tuned(tmp_path / "a", ratio=0.1, quant="nf4")
    demo.write_jsonl(tmp_path / "rows.jsonl", "test", limit=4)
    done = merge(None, tmp_path / "a", tmp_path / "m", verify=tmp_path / "rows.jsonl")
    assert done.effect is not None
    losses = done.effect["losses"]
    unmerged, trained = losses["adapter, not merged"], losses["merged --onto trained"]
    assert trained == pytest.approx(unmerged, abs=0.05)
    assert abs(losses["merged --onto original"] - unmerged) > abs(trained - unmerged)


def test_a_base_that_packs_to_other_codes_is_refused(tmp_path: Path) -> None:
    """The identity of the packed weights is stored with the adapter, and compared.

    Fails when it is not; other codes then pass for those of the training.
    """
    tuned(tmp_path / "a", ratio=LIGHT, quant="nf4")
    other = tmp_path / "other"
    other.mkdir()
    for file in demo.base_path().iterdir():
        (other / file.name).write_bytes(file.read_bytes())
    key = "model.layers.1.mlp.up_proj.weight"
    rewrite(other, lambda tensors: {**tensors, key: tensors[key] * 1.01})
    with pytest.raises(AdapterError, match="not the one that adapter"):
        merge(str(other), tmp_path / "a", tmp_path / "m")
    assert not (tmp_path / "m").exists()
