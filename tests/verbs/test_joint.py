"""Several candidates in one pass: each one's losses and gradients are those that it has alone."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from decal.config import LoraConfig, RunConfig
from decal.data.pack import LayoutName, make_batches
from decal.data.sample import Sample
from decal.kernels import native
from decal.model import attention
from decal.model.inject import attach
from decal.model.state import train_only
from decal.objectives import OBJECTIVES
from decal.train.together import Share
from decal.verbs.inputs import trained
from decal.verbs.joint import losses
from decal.verbs.load import load_base
from decal.verbs.loss import head_of
from decal.verbs.session import Session
from tests import zoo

ATTENTION = {"gpt2": "c_attn"}
HEADS = {"gpt2": "wte"}


@dataclass(frozen=True)
class Candidate:
    """What is its own of one candidate."""

    adapter: dict[str, Any]
    seed: int = 0
    epoch: int = 0


def candidates(name: str) -> dict[str, Candidate]:
    """Ranks, alphas, dropouts, targets, scalings, biases, seeds and epochs, all of them mixed."""
    own = ATTENTION.get(name, "q_proj")
    embedding = HEADS.get(name, "embed_tokens")
    head = {} if name == "gpt2" else {"target_modules": ["lm_head", own], "lora_dropout": 0.3}
    return {
        "low": Candidate({"r": 2, "lora_alpha": 5, "lora_dropout": 0.0}),
        "high": Candidate({"r": 7, "lora_alpha": 3, "lora_dropout": 0.2}, seed=3, epoch=1),
        "other": Candidate({"r": 3, "lora_alpha": 8, "lora_dropout": 0.4}, seed=4, epoch=1),
        "few": Candidate({"r": 4, "target_modules": [own], "use_rslora": True}, epoch=2),
        "bias": Candidate({"r": 2, "lora_alpha": 7, "lora_bias": True, "bias": "lora_only"}),
        "head": Candidate({"r": 3, "lora_alpha": 4, **head}, seed=9),
        "embedding": Candidate({"r": 3, "lora_alpha": 5, "target_modules": [embedding, own]}),
    }


def rows(numbers: range) -> list[Sample]:
    generator = np.random.default_rng(5)
    made = []
    for row in numbers:
        length = 4 + 5 * row % 9
        ids = generator.integers(3, 250, length).astype(np.int32)
        made.append(Sample(row=row, input_ids=ids, trained=np.arange(length) >= 1 + row % 3))
    return made


def together(
    model: Any, chosen: dict[str, Candidate], layout: LayoutName, **settings: Any
) -> dict[str, Session]:
    """A session for each, all on one model; B is drawn, so that A has gradients."""
    generator = torch.Generator().manual_seed(1)
    sessions: dict[str, Session] = {}
    for name, each in chosen.items():
        config = RunConfig(
            base="base",
            adapter=each.adapter,
            data="rows.jsonl",
            train={"seed": each.seed, **settings},
            output="out",
        )
        assert isinstance(config.adapter, LoraConfig)
        attach(model, config.adapter, name, seed=each.seed, drops_as="default")
        with torch.no_grad():
            for parameter in trained(model, name).values():
                if model.dtype == torch.float64:
                    parameter.data = parameter.data.double()
                drawn = torch.randn(parameter.shape, generator=generator)
                parameter.add_(0.1 * drawn.to(parameter.dtype))
        sessions[name] = Session(
            config=config,
            model=model,
            tokenizer=None,
            samples=[],
            batches=None,  # type: ignore[arg-type]
            eval_batches=[],
            flattening=attention.Flattening(layout == "flat"),
            head=None,
            rates={},
            table=None,
            bits_per_weight=16.0,
            adapter=name,
        )
    train_only(model, frozenset(sessions))
    for session in sessions.values():
        session.head = head_of(model, OBJECTIVES["sft"])
    return sessions


def shares_of(
    chosen: dict[str, Candidate], layout: LayoutName, *, learns: bool = True
) -> list[Share]:
    """Other rows for each, one of them with three micro-batches."""
    shares = []
    for i, (name, each) in enumerate(chosen.items()):
        budget = 20 if i == 1 else 4096
        batches = make_batches(rows(range(4 * i, 4 * i + 4)), budget, layout=layout)
        shares += [Share(name, batch, each.epoch if learns else None) for batch in batches]
    assert len(shares) > len(chosen)
    return shares


Found = tuple[list[Tensor], dict[str, Tensor | None]]


def gradients(sessions: dict[str, Session]) -> dict[str, Tensor | None]:
    found = {}
    for name, session in sessions.items():
        for key, parameter in session.parameters.items():
            found[f"{name} {key}"] = parameter.grad
            parameter.grad = None
    return found


def alone(sessions: dict[str, Session], shares: list[Share]) -> Found:
    found = []
    for i, share in enumerate(shares):
        loss, counted = sessions[share.name].loss(share.batch, share.epoch)
        assert counted == share.batch.trained
        if share.epoch is not None:
            (loss * (1 + 0.1 * i)).backward()  # type: ignore[no-untyped-call]
        found.append(loss.detach())
    return found, gradients(sessions)


def joint(sessions: dict[str, Session], shares: list[Share]) -> Found:
    found = losses(sessions, shares)
    if shares[0].epoch is not None:
        total = sum(loss * (1 + 0.1 * i) for i, loss in enumerate(found))
        total.backward()  # type: ignore[union-attr]
    return [loss.detach() for loss in found], gradients(sessions)


def assert_same(ours: Found, theirs: Found, relative: float) -> None:
    for one, other in zip(ours[0], theirs[0], strict=True):
        torch.testing.assert_close(one, other, rtol=relative, atol=0)
    assert ours[1].keys() == theirs[1].keys()
    for key, gradient in ours[1].items():
        expected = theirs[1][key]
        assert gradient is not None, key
        assert expected is not None, key
        scale = float(expected.abs().max())
        assert scale > 0, key
        assert float((gradient - expected).abs().max()) <= relative * scale, key


def exact_model(name: str, quant: str, folder: Path) -> Any:
    """A base of the zoo that computes in float64, adapters included."""
    path = zoo.save(name, folder / "base")
    model, _ = load_base(path, quant=quant, dtype=torch.float64)  # type: ignore[arg-type]
    return model


@pytest.mark.parametrize("layout", ["flat", "padded"])
@pytest.mark.parametrize("quant", ["none", "nf4"])
@pytest.mark.parametrize("name", ["llama", "qwen2", "gpt2"])
def test_joint_is_alone(name: str, quant: str, layout: LayoutName, tmp_path: Path) -> None:
    """float64, 1e-9 relative: losses, and gradients against the largest entry of each tensor.

    Fails when segments share a dropout key or a scaling, when a second micro-batch of a candidate
    takes the place of its first, or when rows that reach the head are counted in the whole batch.
    """
    chosen = candidates(name)
    model = exact_model(name, quant, tmp_path)
    sessions = together(model, chosen, layout)
    shares = shares_of(chosen, layout)
    with sessions["low"].training():
        assert_same(joint(sessions, shares), alone(sessions, shares), 1e-9)


def test_an_evaluation_drops_nothing_and_learns_nothing(tmp_path: Path) -> None:
    """Fails when evaluations drop, build a graph, or leave the model in training mode."""
    chosen = candidates("llama")
    model = exact_model("llama", "none", tmp_path)
    sessions = together(model, chosen, "flat")
    shares = shares_of(chosen, "flat", learns=False)
    with sessions["low"].training(), torch.no_grad():
        ours, theirs = joint(sessions, shares), alone(sessions, shares)
        assert not model.training
    assert set(ours[1].values()) == {None}
    for one, other in zip(ours[0], theirs[0], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=0)


def test_recomputed_layers_know_their_segments(tmp_path: Path) -> None:
    """Gradient checkpointing: the same numbers as without it, to the bit.

    Fails when a recomputed forward runs with the routing of another pass, or with none.
    """
    chosen = candidates("qwen2")
    found = []
    for recomputed in (False, True):
        model = exact_model("qwen2", "nf4", tmp_path / str(recomputed))
        sessions = together(model, chosen, "flat", gradient_checkpointing=recomputed)
        with sessions["low"].training():
            found.append(joint(sessions, shares_of(chosen, "flat")))
    assert_same(found[1], found[0], 0.0)


def test_a_loss_that_is_not_finite_stays_its_own(tmp_path: Path) -> None:
    """One candidate's weights are infinite: gradients of the others are those without it.

    Fails when rows of several candidates meet in one sum, where 0 * inf is NaN.
    """
    chosen = candidates("llama")
    model = exact_model("llama", "nf4", tmp_path)
    sessions = together(model, chosen, "flat")
    shares = shares_of(chosen, "flat")
    with sessions["low"].training():
        _, expected = alone(sessions, shares)
        with torch.no_grad():
            next(iter(sessions["other"].parameters.values())).fill_(torch.inf)
        found, gradients_ = joint(sessions, shares)
    broken = [s.name for s, loss in zip(shares, found, strict=True) if not loss.isfinite()]
    assert broken == ["other"]
    for key, gradient in gradients_.items():
        if not key.startswith("other"):
            torch.testing.assert_close(gradient, expected[key], rtol=1e-9, atol=1e-12)


KERNELS = [None, *native.available()[:1]]


@pytest.mark.parametrize("kernels", KERNELS, ids=[name or "torch" for name in KERNELS])
def test_fused_layers_in_bf16(kernels: str | None, tmp_path: Path) -> None:
    """llama, nf4, bf16, decoder layers fused: joint is alone to the bit, here.

    A row's products do not depend on the rows beside it as long as the products are cut alike,
    which they are at this size; oneDNN cuts them differently with AMX. Fails when a segment is
    rounded once more than it is alone.
    """
    cut_alike = kernels is not None or not torch.cpu._is_amx_tile_supported()
    path = zoo.save("llama", tmp_path / "base")
    with native.forced(kernels):
        model, _ = load_base(path, quant="nf4", dtype=torch.bfloat16)
        chosen = {n: c for n, c in candidates("llama").items() if n in ("low", "high", "other")}
        sessions = together(model, chosen, "flat")
        assert set(model.decal_adapters.fused.values()) == {""}
        shares = shares_of(chosen, "flat")
        with sessions["low"].training():
            assert_same(
                joint(sessions, shares), alone(sessions, shares), 0.0 if cut_alike else 2e-2
            )
