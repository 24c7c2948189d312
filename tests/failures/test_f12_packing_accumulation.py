"""F12: packed samples see each other, and accumulation weights a token by its micro-batch.

In float64, on real architectures: packed is padded is apart, and however the step is cut, one
gradient comes out.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from decal.config import LoraConfig
from decal.data.batch import Batch
from decal.data.pack import flat_batch, make_batches, padded_batch
from decal.data.sample import Sample
from decal.model import attention
from decal.model.inject import attach
from decal.objectives import sft
from decal.train.loop import train
from tests import zoo
from tests.failures.situations import draw
from tests.train.tiny_run import MemoryRun, TinyStep, job

LENGTHS = (9, 4, 13, 6, 5, 11, 3, 8)
NAMES = ("llama", "qwen3", "mistral", "gemma3", "phi3", "gpt2")


def samples() -> list[Sample]:
    """Eight rows whose trained shares differ much."""
    generator = torch.Generator().manual_seed(2)
    made = []
    for row, length in enumerate(LENGTHS, start=1):
        ids = torch.randint(3, 259, (length,), generator=generator).int().numpy()
        trained = (torch.arange(length) >= (1 if row % 2 else length - 1)).numpy()
        made.append(Sample(row=row, input_ids=ids, trained=trained))
    return made


def model_of(name: str) -> Any:
    model = zoo.build(name, torch.float64)
    attach(model, LoraConfig(r=3, lora_alpha=7, lora_dropout=0, target_modules="all-linear"))
    draw(model)
    return model.double()


def loss_of(model: Any, batch: Batch) -> Tensor:
    """Sum over the trained tokens."""
    keep = sft.trained_positions(batch)
    with attention.flat_attention(model):
        logits = attention.forward(model, batch, keep)
    return sft.losses(logits, batch.targets.flatten()[keep]).sum()


def gradient(model: Any, batches: list[Batch], counts: list[int]) -> Tensor:
    model.zero_grad()
    for batch, count in zip(batches, counts, strict=True):
        (loss_of(model, batch) / count).backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad])


def apart(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm())


@pytest.mark.parametrize("name", NAMES)
def test_packed_is_padded_is_apart(name: str) -> None:
    """Gradients and losses, 1e-9 relative. Fails when attention gets one sequence."""
    model, rows = model_of(name), samples()
    total = sum(padded_batch([s]).trained for s in rows)
    ways = [[flat_batch(rows)], [padded_batch(rows)], [padded_batch([s]) for s in rows]]
    packed, padded, single = (gradient(model, way, [total] * len(way)) for way in ways)
    assert apart(packed, single) < 1e-9
    assert apart(padded, single) < 1e-9


@torch.no_grad()
@pytest.mark.parametrize("name", NAMES)
def test_restarted_positions_alone_leak(name: str) -> None:
    """By hand what packing with position ids alone does: the logits are those of another text.

    With transformers' default `use_cache` no mask is derived from the positions.
    """
    model, rows = model_of(name), samples()
    batch = flat_batch(rows)
    single = torch.cat([model(padded_batch([s]).input_ids).logits for s in rows], 1)
    leaked = model(batch.input_ids, position_ids=batch.positions).logits
    with attention.flat_attention(model):
        ours = attention.forward(model, batch)
    assert float((leaked - single).abs().max()) > 0.5
    assert float((ours - single).abs().max()) < 1e-9 * float(single.abs().max())


@pytest.mark.parametrize("name", NAMES)
def test_a_leak_is_found_before_the_first_step(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The mask taken away: the probe sees it, and padded batches are used instead."""
    model, real = model_of(name), attention.attention_flat

    def leaky(q: Tensor, k: Tensor, v: Tensor, cu: Tensor, **kwargs: Any) -> Tensor:
        return real(q, k, v, cu[[0, -1]], **kwargs)

    assert attention.flattens(model)
    monkeypatch.setattr(attention, "attention_flat", leaky)
    assert not attention.flattens(model)


@pytest.mark.parametrize("layout", ["flat", "padded"])
def test_one_times_eight_is_eight_times_one(layout: Any) -> None:
    """One micro-batch of eight rows, eight of one, and what the token budget makes of them.

    Fails when each micro-batch is divided by its own count.
    """
    model, rows = model_of("llama"), samples()
    cuts = [make_batches(rows, budget, layout=layout) for budget in (10_000, 1, 25)]
    assert [len(cut) for cut in cuts[:2]] == [1, 8]
    assert 1 < len(cuts[2]) < 8
    total = cuts[0][0].trained
    one, eight, some = (gradient(model, cut, [total] * len(cut)) for cut in cuts)
    assert apart(eight, one) < 1e-9
    assert apart(some, one) < 1e-9


def test_a_mean_of_means_is_another_gradient() -> None:
    """By hand what dividing each micro-batch by its own tokens does: off by a good part of it."""
    model, rows = model_of("llama"), samples()
    whole, single = flat_batch(rows), [flat_batch([s]) for s in rows]
    one = gradient(model, [whole], [whole.trained])
    means = gradient(model, single, [8 * batch.trained for batch in single])
    assert apart(means, one) > 0.2


def test_the_loop_divides_by_the_tokens_of_the_step() -> None:
    """A whole training by the real loop, cut both ways: losses, norms and weights agree.

    Fails when the loop divides each micro-batch by its own count.
    """
    ended = []
    for budget in (10_000, 1):
        model, run = model_of("llama"), MemoryRun()
        steps = _Steps(make_batches(samples(), budget))
        train(
            job(
                run,
                steps=steps,
                loss=lambda batch, epoch, model=model: (loss_of(model, batch), batch.trained),
                parameters={n: p for n, p in model.named_parameters() if p.requires_grad},
                eval_batches=[],
                max_steps=3,
            )
        )
        weights = torch.cat([p.flatten() for p in model.parameters() if p.requires_grad])
        ended.append((run.column("loss"), run.column("grad_norm"), weights.detach()))
    (losses, norms, one), (losses8, norms8, eight) = ended
    assert losses8 == pytest.approx(losses, rel=1e-9)
    assert norms8 == pytest.approx(norms, rel=1e-9)
    assert apart(eight, one) < 1e-9


class _Steps:
    steps_per_epoch = 1

    def __init__(self, micro: list[Batch]):
        self.micro = micro

    def steps(self, start: int) -> Any:
        for index in range(start, 10):
            yield TinyStep(index, 0, self.micro)
