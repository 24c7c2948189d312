"""F2: a QLoRA adapter is merged onto the 16-bit base, which is not the one it was trained on.

Training computed with the dequantized 4-bit weights, so the delta belongs to these. On the original
weights the rounding of quantization comes in a second time, and for a light fine-tune that is many
times the delta.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from decal.errors import AdapterError
from decal.verbs import merge as verb
from decal.verbs.merge import merge
from tests.failures.situations import LIGHT, logits, off, tuned
from tests.zoo import rewrite


def merged(folder: Path, out: Path, **how: object) -> torch.Tensor:
    merge(None, folder, out, dtype="fp32", **how)  # type: ignore[arg-type]
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


def test_a_base_that_packs_to_other_codes_is_refused(tmp_path: Path) -> None:
    """The identity of the packed weights is stored with the adapter, and compared.

    Fails when it is not; other codes then pass for those of the training.
    """
    from decal import demo

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
