"""`decal plan`: weights to the byte, parameters to the number, and what a run.yaml adds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from decal import demo
from decal.config import RunConfig
from decal.errors import BaseModelError, ConfigError, TargetError
from decal.plan.structure import stored
from decal.plan.table import Plan
from decal.quant.base import Recipe
from decal.verbs.plan import model_config, plan
from decal.verbs.structure import as_meta, structure_of
from tests.verbs.conftest import settings


@pytest.fixture(scope="module")
def llama() -> Plan:
    return plan("llama-3.1-8b", calibrate=False)


def quick(what: Any, **options: Any) -> Plan:
    return plan(what, calibrate=False, **options)


def test_weights_to_the_byte() -> None:
    """Mutations: quantize the head or the embedding; count scales in two bytes; leave out the
    offsets or the scales of scales; forget int8's row scales."""
    from decal.config import BaseConfig

    _, config = model_config(BaseConfig(path="llama-3.1-8b"))
    found = structure_of(as_meta(config), "llama-3.1-8b")
    assert stored(found, None, "float32").total == 32_121_044_992
    assert stored(found, None).total == 16_060_522_496
    assert stored(found, Recipe(format="int8")).total == 9_086_705_664
    assert stored(found, Recipe(format="nf4")).total == 5_702_296_448
    assert stored(found, Recipe(format="nf4", double=False)).total == 6_027_747_328


def test_the_table_has_these_weights(llama: Plan) -> None:
    """Mutation: hand a column another column's recipe."""
    weights = {m.name: m.peak.weights for m in llama.methods}
    assert weights == {
        "full": 16_060_522_496,
        "lora": 16_060_522_496,
        "int8": 9_086_705_664,
        "nf4": 6_027_747_328,
        "nf4 double": 5_702_296_448,
    }


@pytest.mark.parametrize(
    ("model", "targets", "r", "count"),
    [
        ("smollm2-135m", ["q_proj", "v_proj"], 8, 460_800),
        ("smollm2-135m", "all-linear", 16, 4_884_480),
        ("qwen2.5-0.5b", ["q_proj", "v_proj"], 64, 4_325_376),
        ("qwen2.5-0.5b", "all-linear", 4, 2_199_552),
        ("llama-2-7b", ["q_proj", "v_proj"], 16, 8_388_608),
        ("llama-2-7b", "all-linear", 64, 159_907_840),
        ("llama-3.1-8b", "attention", 32, 27_262_976),
        ("llama-3.1-8b", "all-linear", 8, 20_971_520),
    ],
)
def test_trained_parameters(model: str, targets: Any, r: int, count: int) -> None:
    """Mutations: adapt the head; multiply in and out; forget a projection of fewer heads."""
    found = quick(model, targets=targets, r=r)
    assert found.method("lora").trained == count
    assert found.method("lora").adapter_bytes == 4 * count
    assert found.method("full").trained == found.parameters


def test_what_is_held_for_what_is_trained(llama: Plan) -> None:
    """Masters, gradients and moments in float32. Mutations: hold them in 16 bits; forget the
    masters of full fine-tuning; count a moment once."""
    for method in llama.methods:
        held = (method.peak.adapter, method.peak.gradients, method.peak.optimizer)
        assert held == (4 * method.trained, 4 * method.trained, 8 * method.trained)


def test_less_of_anything_needs_less(llama: Plan) -> None:
    """Mutations: ignore seq, batch or rank; let checkpointing add."""
    nf4 = llama.method("nf4 double").peak.bytes
    assert quick("llama-3.1-8b", seq=512, batch=2).method("nf4 double").peak.bytes < nf4
    assert quick("llama-3.1-8b", r=4).method("nf4 double").peak.bytes < nf4
    assert llama.method("nf4 double").checkpointed.bytes < nf4
    order = [m.peak.bytes for m in llama.methods]
    assert order == sorted(order, reverse=True)


def test_what_fits(llama: Plan) -> None:
    """Mutations: compare with the weights alone; take GiB for GB; leave no room for the driver."""
    nf4 = llama.method("nf4 double").peak.bytes
    assert llama.fits is None
    assert quick("llama-3.1-8b", memory=f"{nf4 / 1e9 + 0.1}GB").fits
    assert quick("llama-3.1-8b", memory="4GB").fits is False
    assert quick("llama-2-70b", device="t4").fits is False
    assert quick("qwen2.5-0.5b", device="a100").fits


def test_the_cheapest_change_fits() -> None:
    """Mutations: search from another way than the run's; suggest what does not fit; lower the rank
    before the micro-batches."""
    found = quick("llama-3.1-8b", memory="10GB", seq=512)
    assert found.fits is False
    assert found.change
    assert "adapter.r" not in found.change
    assert quick("llama-3.1-8b", memory="1GB").change == {}
    assert quick("llama-3.1-8b", memory="80GB").change is None


def test_experts_cannot_be_quantized_and_work_by_twos() -> None:
    """Mutations: pack the experts; count all of them as operations of a token."""
    found = quick("mixtral-8x7b")
    assert found.method("nf4 double").refused is not None
    assert found.method("lora").refused is None
    assert found.method("lora").operations < 4.5 * 13e9 * 1.2
    assert "cannot be quantized" in "\n".join(found.lines())


@pytest.mark.parametrize("option", [{"memory": "16GB", "device": "t4"}, {"memory": "lots"}])
def test_wrong_limits(option: dict[str, str]) -> None:
    """Fails when two limits, or none that can be read, go on."""
    with pytest.raises(ConfigError):
        quick("smollm2-135m", **option)


def test_unknown_models_name_the_nearest() -> None:
    """Without a network. Mutation: ask the hub before the table, or hint at nothing."""
    with pytest.raises(BaseModelError) as caught:
        quick("lama-3.1-8b")
    assert caught.value.hint == "did you mean `llama-3.1-8b`?"


def test_unknown_targets_are_the_users_error() -> None:
    """Fails when targets that match nothing plan to nothing."""
    with pytest.raises(TargetError):
        quick("smollm2-135m", targets=["q_prj"])


def test_a_run_is_planned_with_its_rows(tmp_path: Path) -> None:
    """Mutations: take max_length for rows that are shorter; mark no way; ignore the run's rank."""
    config = settings(tmp_path)
    found = quick(config)
    assert found.wanted == "nf4 double"
    assert "r 4 on all-linear" in found.adapter
    assert "longest of" in found.rows
    missing = config.model_copy(
        update={"data": config.data.model_copy(update={"path": str(tmp_path / "none.jsonl")})}
    )
    longest = quick(missing)
    assert "every sample 128 tokens" in longest.rows
    own = (found.method("nf4 double").peak, longest.method("nf4 double").peak)
    assert own[0].activations < own[1].activations


def test_a_recipe_of_its_own_gets_a_column(tmp_path: Path) -> None:
    """Mutation: plan fp4 as nf4, or blocks of 128 as blocks of 64."""
    found = quick(settings(tmp_path, quant={"format": "fp4", "block_size": 128}))
    assert found.wanted == "fp4 with double quantization in blocks of 128"
    assert len(found.methods) == 6
    assert found.method(found.wanted).peak.weights < found.method("nf4 double").peak.weights


def test_full_fine_tuning_is_marked(tmp_path: Path) -> None:
    """Mutation: plan an adapter for adapter.method full."""
    found = quick(settings(tmp_path, quant="none", adapter={"method": "full"}))
    assert found.wanted == "full"
    assert any("*fine-tuning" in line for line in found.lines())


def test_json_and_text(llama: Plan) -> None:
    """Fails when a value is no plain JSON, or a line is wider than a terminal."""
    found = json.loads(json.dumps(llama.to_dict()))
    assert [m["name"] for m in found["methods"]] == [m.name for m in llama.methods]
    parts = found["methods"][-1]["parts"]
    assert sum(parts.values()) == found["methods"][-1]["peak_bytes"]
    assert max(map(len, llama.lines())) <= 80
    assert str(llama) == "\n".join(llama.lines())


def test_speed_is_measured_where_it_is_asked_for() -> None:
    """Mutations: give times without measuring; measure one format only."""
    found = plan("smollm2-135m", seq=64, batch=1)
    assert found.calibrated
    assert all(m.tokens_per_second and m.tokens_per_second > 1 for m in found.methods)
    assert all(m.tokens_per_second is None for m in quick("smollm2-135m").methods)
    assert quick("smollm2-135m", device="t4").method("lora").tokens_per_second is not None


def test_a_folder_is_planned_from_its_config_alone(tmp_path: Path) -> None:
    """Mutation: read weights, which are not there."""
    place = tmp_path / "bare"
    place.mkdir()
    (place / "config.json").write_bytes((demo.base_path() / "config.json").read_bytes())
    found = quick(str(place), seq=64)
    assert found.parameters == sum(
        p.numel() for p in as_meta(model_config(RunConfig(**_bare(place)).base)[1]).parameters()
    )


def _bare(place: Path) -> dict[str, Any]:
    return {"base": str(place), "data": "none", "output": "none"}
