"""F26: a mixture of experts "in 4 bit" keeps nearly all of its weights in 16 bits, and unsaid.

The experts of an architecture are one parameter of three dimensions, and no linear layer.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from decal.config import QuantConfig, RunConfig
from decal.errors import QuantError
from decal.model import quantizer
from decal.model.size import bits_per_weight
from decal.model.survey import expert_weights, parameter_counts
from decal.model.unquantized import left_unquantized
from decal.verbs.load import load_base
from decal.verbs.quantize import quantize
from decal.verbs.train import train
from tests import zoo


def test_a_model_whose_experts_would_stay_is_refused(tmp_path: Path) -> None:
    """Loaded or written to a folder, with the share. Fails when it passes as quantized."""
    base = zoo.save("qwen3_moe", tmp_path / "base")
    model = zoo.build("qwen3_moe")
    experts = sum(p.numel() for m in model.modules() for p in expert_weights(m).values())
    share = f"{100 * experts / parameter_counts(model)[1]:.0f} % of its parameters"
    for attempt in (
        lambda: load_base(base, quant="nf4", device="cpu"),
        lambda: quantize(base, tmp_path / "out", QuantConfig(format="nf4")),
    ):
        with pytest.raises(QuantError, match=share) as error:
            attempt()
        assert "model.layers.1.mlp.experts" in str(error.value)
    assert not (tmp_path / "out").exists()


def test_experts_that_were_meant_to_stay_are_said(tmp_path: Path) -> None:
    """Named in skip_modules they stay; model, converted folder and training say so, with the bits.

    Fails when one of them leaves the share or the bits out.
    """
    base = zoo.save("qwen3_moe", tmp_path / "base")
    settings = QuantConfig(format="nf4", skip_modules=("experts",))
    model, _ = load_base(base, quant=settings, device="cpu")
    bits = bits_per_weight(model)
    assert bits > 8
    lines = left_unquantized(model)
    assert len(lines) == 1
    assert "model.layers.1.mlp.experts 25 %" in lines[0]
    summary = quantize(base, tmp_path / "out", settings).summary()
    assert summary["bits_per_weight"] > 8
    assert "model.layers.1.mlp.experts 25 %" in summary["stays_16_bit"][0]
    said = trained(base, tmp_path, settings)
    assert any(f"{bits:.2f} bits per weight" in line for line in said)
    assert any("model.layers.1.mlp.experts 25 %" in line for line in said)


def trained(base: Path, folder: Path, quant: QuantConfig) -> list[str]:
    """What a training of one step prints."""
    rows = [{"prompt": "a b", "completion": "c d"}] * 8
    (folder / "rows.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    said: list[str] = []
    settings = RunConfig(
        base={"path": str(base), "device": "cpu"},
        quant=quant,
        adapter={"r": 2, "target_modules": ["q_proj"]},
        data={"path": str(folder / "rows.jsonl"), "max_length": 64},
        train={"max_steps": 1, "batch_size": 2, "lr": 1e-4},
        output=str(folder / "run"),
    )
    train(settings, say=said.append)
    return said


def test_without_the_guard_4_bit_is_no_4_bit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The guard away: it loads as NF4 and has more than twice the bits."""
    base = zoo.save("qwen3_moe", tmp_path / "base")
    monkeypatch.setattr(quantizer, "refuse_fused", lambda *_: None)
    model, _ = load_base(base, quant="nf4", device="cpu")
    assert bits_per_weight(model) > 2 * 4.5
