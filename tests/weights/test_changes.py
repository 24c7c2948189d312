"""Tensors that are replaced, added and left out, and what does not fit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from decal.adapters.base import LowRank
from decal.errors import AdapterError, VerificationError
from decal.store.base import open_base
from decal.store.tensorfile import TensorSpec
from decal.weights.changes import Changes, Dequantized
from decal.weights.delta import FileDelta
from decal.weights.merge import MergeReport, merge_files

TIED = {"head.weight": "embed.weight"}


def _base(folder: Path, **config: Any) -> dict[str, Tensor]:
    folder.mkdir()
    tensors = {
        "embed.weight": torch.randn(17, 9).bfloat16(),
        "a.weight": torch.randn(5, 9).bfloat16(),
        "a.bias": torch.randn(5).bfloat16(),
        "old.weight": torch.randn(3, 9).bfloat16(),
        "norm.weight": torch.randn(9),
    }
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    settings = {"model_type": "x", "tie_word_embeddings": True, **config}
    (folder / "config.json").write_text(json.dumps(settings))
    return tensors


def _merge(folder: Path, dtype: Any = "keep", **changes: Any) -> tuple[MergeReport, Any]:
    given = Changes(**{"deltas": {}, "name": "runs/x", **changes})
    report = merge_files(open_base(folder / "base"), folder / "out", given, dtype=dtype)
    return report, load_file(folder / "out" / "model.safetensors")


def _config(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "out" / "config.json").read_text())
    return found


def test_whole_tensors(tmp_path: Path) -> None:
    """Replaced ones are rounded to the base's own dtype, added ones to the one most weights have.
    Fails if a float32 tensor of the adapter stays float32 beside bfloat16."""
    before = _base(tmp_path / "base", quantization_config={"quant_method": "x"})
    bias, norm, score = torch.randn(5), torch.randn(9), torch.randn(4, 9)
    report, after = _merge(
        tmp_path,
        replaced={"a.bias": bias, "norm.weight": norm},
        added={"score.weight": score},
        dropped=frozenset({"old.weight"}),
        config={"architectures": ["Y"], "quantization_config": None},
        texts={"chat_template.jinja": "{{ x }}"},
    )
    assert after.keys() == (before.keys() - {"old.weight"}) | {"score.weight"}
    assert torch.equal(after["a.bias"], bias.bfloat16())
    assert torch.equal(after["norm.weight"], norm)
    assert torch.equal(after["score.weight"], score.bfloat16())
    assert torch.equal(after["a.weight"], before["a.weight"])
    assert (report.targeted, report.replaced, report.untouched) == (0, 3, 2)
    assert _config(tmp_path)["architectures"] == ["Y"]
    assert "quantization_config" not in _config(tmp_path)
    assert (tmp_path / "out" / "chat_template.jinja").read_text() == "{{ x }}"


def test_whole_tensors_in_another_dtype(tmp_path: Path) -> None:
    _base(tmp_path / "base")
    huge = {"score.weight": torch.full((2, 2), 1e6)}
    _, after = _merge(tmp_path, dtype="fp32", added=huge)
    assert {t.dtype for t in after.values()} == {torch.float32}
    with pytest.raises(VerificationError, match=r"score\.weight.*float16"):
        merge_files(
            open_base(tmp_path / "base"),
            tmp_path / "half",
            Changes(deltas={}, added=huge),
            dtype="fp16",
        )


@pytest.mark.parametrize("how", ["head", "embedding", "both", "both alike", "neither"])
def test_tied_pairs(tmp_path: Path, how: str) -> None:
    """A pair stays tied while it is one value. Fails if the head of a replaced embedding follows
    it, or if two equal tensors are written apart."""
    before = _base(tmp_path / "base")
    one, two = torch.randn(17, 9).bfloat16(), torch.randn(17, 9).bfloat16()
    replaced = {
        "head": {"head.weight": one},
        "embedding": {"embed.weight": one},
        "both": {"head.weight": one, "embed.weight": two},
        "both alike": {"head.weight": one, "embed.weight": one.clone()},
        "neither": {},
    }[how]
    report, after = _merge(tmp_path, replaced=replaced, tied=TIED)
    tied = how in ("both alike", "neither")
    assert report.untied == (() if tied else ("head.weight",))
    assert _config(tmp_path)["tie_word_embeddings"] is tied
    embedding = replaced.get("embed.weight", before["embed.weight"])
    assert torch.equal(after["embed.weight"], embedding)
    if tied:
        assert "head.weight" not in after
    else:
        assert torch.equal(
            after["head.weight"], replaced.get("head.weight", before["embed.weight"])
        )


def test_a_delta_and_a_whole_tensor_come_together(tmp_path: Path) -> None:
    """The head is replaced, the embedding gains a delta. Fails if the delta reaches the head."""
    before = _base(tmp_path / "base")
    low_rank = LowRank(torch.randn(3, 17), torch.randn(9, 3), 7 / 3, 0.0)
    head = torch.randn(17, 9).bfloat16()
    delta = FileDelta(low_rank, transposed=True, module="embed")
    _, after = _merge(
        tmp_path, deltas={"embed.weight": delta}, replaced={"head.weight": head}, tied=TIED
    )
    assert torch.equal(after["head.weight"], head)
    update = (low_rank.B @ low_rank.A).T * (7 / 3)
    expected = (before["embed.weight"].float() + update).bfloat16()
    assert torch.equal(after["embed.weight"], expected)


def test_codes_become_weights_of_another_shape(tmp_path: Path) -> None:
    """As packed weights do. Fails if the output has the codes' shape or dtype."""
    _base(tmp_path / "base")
    weight = torch.randn(5, 27)
    packed = Dequantized(lambda _: weight, TensorSpec("BF16", (5, 27)))
    low_rank = LowRank(torch.randn(3, 27), torch.randn(5, 3), 7 / 3, 0.0)
    report, after = _merge(
        tmp_path,
        deltas={"a.weight": FileDelta(low_rank)},
        dequantized={"a.weight": packed},
    )
    expected = (weight + low_rank.B @ low_rank.A * (7 / 3)).bfloat16()
    assert torch.equal(after["a.weight"], expected)
    assert (report.targeted, report.dequantized) == (1, 0)


def test_a_replaced_weight_is_still_dequantized_for_the_check(tmp_path: Path) -> None:
    """The hash of the packed base covers it. Fails if its converter is passed over."""
    _base(tmp_path / "base")
    seen = []

    def convert(weight: Tensor) -> Tensor:
        seen.append(weight.shape)
        return weight * 0

    whole = torch.randn(5, 9)
    _, after = _merge(
        tmp_path, replaced={"a.weight": whole}, dequantized={"a.weight": Dequantized(convert)}
    )
    assert torch.equal(after["a.weight"], whole.bfloat16())
    assert seen == [(5, 9)]


def test_whole_tensors_that_do_not_fit(tmp_path: Path) -> None:
    _base(tmp_path / "base")
    with pytest.raises(AdapterError) as caught:
        _merge(
            tmp_path,
            replaced={
                "a.bias": torch.randn(6),
                "b.bias": torch.randn(6),
                "head.weight": torch.randn(18, 9),
            },
            tied=TIED,
        )
    text = str(caught.value)
    assert "1 of 3 tensors are not in the base, 2 of 3 tensors have the wrong shape" in text
    assert "a.bias: adapter has [6], base has [5]  (and 2 more)" in text
    assert not (tmp_path / "out").exists()
