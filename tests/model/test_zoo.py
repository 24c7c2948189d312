"""Any language model or classifier of transformers: trained, saved, loaded, merged, flattened."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from decal.config import LoraConfig, QuantConfig, RunConfig
from decal.data.pack import flat_batch, padded_batch
from decal.data.sample import Sample
from decal.errors import BaseModelError
from decal.model import attention, hf
from decal.model.heads import labels_of
from decal.model.inject import adapter_state, attach, detach
from decal.verbs import leaves
from decal.verbs import train as train_module
from decal.verbs.load import load, load_base, save_adapter
from decal.verbs.merge import merge
from tests import zoo
from tests.zoo import CAUSAL, CLASSIFY, ZOO

IDS = torch.arange(3, 40)[None]
ATTENTION = {"gemma2": "eager"}
"""What plain transformers must be told to get an architecture right, on every version."""


@pytest.fixture(autouse=True)
def _no_plots(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leaves, "loss_png", lambda *_: b"")


@torch.no_grad()
def logits(model: Any) -> Tensor:
    return model.eval()(IDS).logits.float()


def plain(name: str, folder: Path, dtype: torch.dtype) -> Any:
    """The folder as transformers alone loads it."""
    return ZOO[name].cls.from_pretrained(
        folder, dtype=dtype, attn_implementation=ATTENTION.get(name)
    )


def rows(name: str) -> str:
    """Twelve of different lengths, with completions or labels."""
    lines: list[dict[str, str]] = [
        {"prompt": f"say {i}", "completion": "ok " * (i % 5 + 1)}
        if ZOO[name].causal
        else {"text": f"say {i} " * (i % 5 + 1), "label": zoo.LABELS[i % 3]}
        for i in range(12)
    ]
    return "\n".join(map(json.dumps, lines))


def train(name: str, folder: Path, quant: QuantConfig, dtype: str) -> Any:
    """The session after five steps of `decal train` on a 16-bit base."""
    zoo.save(name, folder / "base", torch.bfloat16)
    (folder / "rows.jsonl").write_text(rows(name))
    config = RunConfig(
        objective="sft" if ZOO[name].causal else "classify",
        base={"path": str(folder / "base"), "dtype": dtype},
        quant=quant,
        adapter={"r": 3, "lora_alpha": 7, "lora_dropout": 0.1},
        data={"path": str(folder / "rows.jsonl"), "max_length": 64},
        train={"max_steps": 5, "batch_size": 4, "lr": 2e-2},
        output=str(folder / "run"),
    )
    done = train_module.train(config)
    assert done is not None
    return done.session


def check_run(name: str, session: Any, folder: Path) -> Tensor:
    """Everything was trained, and the saved run is the run; its logits."""
    wanted = logits(session.model)
    assert session.flat == ZOO[name].flattens
    for module, parts in adapter_state(session.model).items():
        assert parts.B.any(), module
    again, _ = load(folder / "run")
    assert torch.equal(logits(again), wanted)
    if ZOO[name].causal:
        out = again.generate(IDS, max_new_tokens=3, do_sample=False, eos_token_id=None)
        assert out.shape == (1, IDS.shape[1] + 3)
    return wanted


def check_base_is_back(model: Any, path: Path, quant: QuantConfig, dtype: str) -> None:
    detach(model)
    base, _ = load_base(path, quant=quant, dtype=dtype, labels=labels_of(model))
    left, meant = model.state_dict(), base.state_dict()
    assert left.keys() == meant.keys()
    for key, tensor in meant.items():
        assert torch.equal(left[key], tensor), key


@pytest.mark.parametrize("name", ZOO)
def test_quantized_from_training_to_a_plain_model(name: str, tmp_path: Path) -> None:
    """QLoRA that computes in float32: merged and adapted logits agree to 1e-5.

    Fails when a fused or transposed layer is merged the wrong way round, a historic name is lost,
    a module is left out of the saved adapter, or a soft cap is.
    """
    quant = QuantConfig(format="nf4", skip_modules=ZOO[name].experts)
    session = train(name, tmp_path, quant, "float32")
    wanted = check_run(name, session, tmp_path)
    merge(None, tmp_path / "run", tmp_path / "merged", dtype="fp32")
    merged = logits(plain(name, tmp_path / "merged", torch.float32))
    assert float((merged - wanted).abs().max()) < 1e-5 * float(wanted.abs().max())
    check_base_is_back(session.model, tmp_path / "base", quant, "float32")


@pytest.mark.parametrize("name", CAUSAL)
def test_sixteen_bits_from_training_to_a_plain_model(name: str, tmp_path: Path) -> None:
    """LoRA that computes in bfloat16 strays from float32 no further than the plain merged model.

    1.5 times, root mean square. Fails when the adapter's product is rounded once too often, or is
    not added at all.
    """
    quant = QuantConfig(format="none")
    session = train(name, tmp_path, quant, "bfloat16")
    ours = check_run(name, session, tmp_path)
    merge(None, tmp_path / "run", tmp_path / "merged", dtype="fp32")
    exact = logits(plain(name, tmp_path / "merged", torch.float32))
    theirs = logits(plain(name, tmp_path / "merged", torch.bfloat16))
    strayed, allowed = ((x - exact).square().mean().sqrt() for x in (ours, theirs))
    assert float(strayed) < 1.5 * float(allowed)
    check_base_is_back(session.model, tmp_path / "base", quant, "bfloat16")


def samples() -> list[Sample]:
    generator = torch.Generator().manual_seed(2)
    made = []
    for row, length in enumerate((7, 3, 19), start=1):
        ids = torch.randint(3, zoo.VOCABULARY, (length,), generator=generator).int().numpy()
        made.append(Sample(row=row, input_ids=ids, trained=torch.arange(length).numpy() % 3 != 0))
    return made


@pytest.mark.parametrize("name", [n for n in CAUSAL if ZOO[n].flattens])
@torch.no_grad()
def test_flat_is_padded_is_alone(name: str) -> None:
    """1e-9 in float64, windows and soft caps included.

    Padded batches and single samples run under our function as well: Gemma 2's own code computes
    soft caps in float32. That it changes nothing is asserted to 1e-4 on a float32 model. Mutations:
    drop the window, the cap or the scale; number positions through.
    """
    model = zoo.build(name, torch.float64)
    flat, padded = flat_batch(samples()), padded_batch(samples())
    keep = [(b.targets.flatten() != -100).nonzero().squeeze(1) for b in (flat, padded)]
    own = attention.forward(zoo.build(name), padded, keep[1])
    with attention.flat_attention(model):
        together = attention.forward(model, flat, keep[0])
        side_by_side = attention.forward(model, padded, keep[1])
        alone = torch.cat([model(torch.tensor(s.input_ids)[None]).logits[0] for s in samples()])
    alone = alone[keep[0]]
    scale = float(alone.abs().max())
    assert float((together - alone).abs().max()) < 1e-9 * scale
    assert float((side_by_side - alone).abs().max()) < 1e-9 * scale
    assert float((own - alone).abs().max()) < 1e-4 * scale


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ZOO)
def test_the_probe_says_which_architectures_flatten(name: str, dtype: torch.dtype) -> None:
    assert attention.flattens(zoo.build(name, dtype)) == ZOO[name].flattens


@pytest.mark.parametrize("name", [n for n, tiny in ZOO.items() if tiny.fused])
def test_fused_projections_are_targets_of_their_own_shape(name: str) -> None:
    """Mutation: read GPT-2's [in, out] as [out, in]."""
    model = zoo.build(name)
    shapes = {m: tuple(p.shape) for m, p in model.named_parameters() if m.endswith(".weight")}
    attach(model, LoraConfig(r=3, target_modules=list(ZOO[name].fused)))
    state = adapter_state(model)
    assert len(state) == 2 * len(ZOO[name].fused)
    for module, parts in state.items():
        wanted = (parts.B.shape[0], parts.A.shape[1])
        stored = shapes[f"{module}.weight"]
        assert wanted == (stored[::-1] if name == "gpt2" else stored)


@pytest.mark.parametrize("name", [n for n in zoo.HISTORIC if ZOO[n].causal])
def test_old_files_are_the_same_base(name: str, tmp_path: Path) -> None:
    """An adapter of a modern base loads on, and merges onto, a folder with historic names.

    Fails when the fingerprint or the map from file keys to modules reads names as they lie there.
    """
    new, old = zoo.save(name, tmp_path / "new"), zoo.save_historic(name, tmp_path / "old")
    model, _ = load_base(new, dtype="float32")
    attach(model, LoraConfig(r=3, lora_alpha=7))
    for parts in adapter_state(model).values():
        torch.nn.init.normal_(parts.B, std=0.1)
    wanted = logits(model)
    save_adapter(model, tmp_path / "adapter")

    adapted, _ = load(tmp_path / "adapter", base=str(old))
    assert torch.allclose(logits(adapted), wanted, rtol=1e-5, atol=1e-5)
    merge(str(old), tmp_path / "adapter", tmp_path / "merged")
    merged = logits(plain(name, tmp_path / "merged", torch.float32))
    assert float((merged - wanted).abs().max()) < 1e-5 * float(wanted.abs().max())


def test_experts_pass_through_a_merge_byte_by_byte(tmp_path: Path) -> None:
    """Per expert, as their files have them. Mutation: write them as the module tree holds them."""
    base = zoo.save("qwen3_moe", tmp_path / "base", torch.bfloat16)
    model, _ = load_base(base)
    table = attach(model, LoraConfig(r=3, lora_alpha=7))
    assert any("expert" in note for note in table.notes)
    for parts in adapter_state(model).values():
        torch.nn.init.normal_(parts.B, std=0.1)
    save_adapter(model, tmp_path / "adapter")
    merge(str(base), tmp_path / "adapter", tmp_path / "merged")
    before, after = (load_file(f / "model.safetensors") for f in (base, tmp_path / "merged"))
    assert before.keys() == after.keys()
    same = {key for key in before if torch.equal(before[key], after[key])}
    assert before.keys() - same == {f"{module}.weight" for module in adapter_state(model)}
    assert len([key for key in same if ".experts." in key]) == 15


@pytest.mark.parametrize("key", ["model.layers.0.self_attn.rotary.weight", "score.weight"])
def test_other_leftovers_are_refused(key: str, tmp_path: Path) -> None:
    path = zoo.rewrite(zoo.save("llama", tmp_path), lambda t: {**t, key: torch.ones(3, 2)})
    with pytest.raises(BaseModelError, match="does not fill") as caught:
        hf.load_model(str(path))
    assert key in str(caught.value)


def test_loading_honours_soft_caps(tmp_path: Path) -> None:
    """Older transformers give Gemma 2 an attention without the cap, in silence."""
    loaded = hf.load_model(str(zoo.save("gemma2", tmp_path)), dtype=torch.float32)
    assert torch.equal(logits(loaded), logits(zoo.build("gemma2")))


@pytest.mark.parametrize("name", CLASSIFY)
def test_classifiers_load_with_their_labels(name: str, tmp_path: Path) -> None:
    """Historic files too, whose masks, position ids and unused poolers are passed over."""
    save = zoo.save_historic if name in zoo.HISTORIC else zoo.save
    path = str(save(name, tmp_path))
    if name == "roberta":
        zoo.rewrite(tmp_path, lambda t: {**t, "roberta.pooler.dense.weight": torch.ones(36, 36)})
    loaded = hf.load_model(path, dtype=torch.float32, labels=zoo.LABELS)
    assert loaded.decal_base.new == ()
    for key, tensor in zoo.build(name).state_dict().items():
        assert torch.equal(loaded.state_dict()[key], tensor), key
