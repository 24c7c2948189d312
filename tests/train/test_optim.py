"""The schedule as a function, AdamW against its formula, masters of 16-bit weights."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch.nn import Parameter

from decal.config import TrainConfig
from decal.errors import TrainingError
from decal.train.optim import Optimizer, lr_at, warmup_steps

CALM = 1e9
"""A max_grad_norm that never clips."""


def config(**settings: object) -> TrainConfig:
    return TrainConfig(**{"lr": 0.5, "max_grad_norm": CALM, **settings})


@pytest.mark.parametrize(
    ("total", "share", "steps"),
    [(100, 0.03, 3), (100, 0.07, 7), (10, 0.03, 1), (1, 0.5, 0), (4, 0.99, 3), (50, 0.0, 0)],
)
def test_warmup_is_the_share_rounded_up_but_never_the_whole_run(
    total: int, share: float, steps: int
) -> None:
    """Mutation: drop the inner rounding (0.07 * 100 becomes 8), or the `total - 1`."""
    assert warmup_steps(total, share) == steps


def test_schedule_values() -> None:
    """Rates of a run of 10 steps with 2 of warm-up, from the formula by hand.

    Mutation: start warm-up at 0, end at zero one step early, or divide by total.
    """
    cosine = [lr_at(step, 10, config(warmup=0.2)) for step in range(10)]
    linear = [lr_at(step, 10, config(warmup=0.2, schedule="linear")) for step in range(10)]
    flat = [lr_at(step, 10, config(warmup=0.2, schedule="constant")) for step in range(10)]
    rise = [0.5 / 3, 1.0 / 3]
    half = [0.25 * (1 + math.cos(math.pi * k / 8)) for k in range(8)]
    assert cosine == pytest.approx(rise + half, rel=1e-12)
    assert linear == pytest.approx(rise + [0.5 * (8 - k) / 8 for k in range(8)], rel=1e-12)
    assert flat == pytest.approx(rise + [0.5] * 8, rel=1e-12)
    assert min(cosine + linear) > 0


def test_inverse_sqrt_goes_on_from_the_rise() -> None:
    """lr * sqrt((w + 1) / (step + 1)) after w = 20 steps of warm-up, by hand.

    Fails when the root is dropped, or when T = w breaks the curve at the peak.
    """
    settings = config(warmup=0.2, schedule="inverse-sqrt")
    rates = [lr_at(step, 100, settings) for step in range(100)]
    assert rates[:20] == pytest.approx([0.5 * (k + 1) / 21 for k in range(20)], rel=1e-12)
    assert rates[20] == 0.5
    assert rates[83] == pytest.approx(0.5 * 0.5, rel=1e-12)
    assert max(rates) == rates[20]
    fall = [a - b for a, b in itertools.pairwise(rates[20:])]
    assert max(fall) < rates[1] - rates[0]


@pytest.mark.parametrize("total", [1, 3, 1000])
def test_inverse_sqrt_without_warmup_starts_at_the_peak_and_falls_gently(total: int) -> None:
    """Of 1000 steps the usual 3 % are 30: sqrt(31 / (31 + step)). Fails with T = 1."""
    rates = [lr_at(k, total, config(warmup=0.0, schedule="inverse-sqrt")) for k in range(total)]
    assert rates[0] == 0.5
    assert rates == sorted(rates, reverse=True)
    if total == 1000:
        assert rates[93] == pytest.approx(0.25, rel=1e-12)


def test_every_schedule_stays_within_the_peak() -> None:
    """Runs of 1 to 9 steps, any warm-up. Fails on a division by zero or a rate above the peak."""
    for name in ("cosine", "linear", "constant", "inverse-sqrt"):
        for total in range(1, 10):
            for share in (0.0, 0.03, 0.5, 0.99):
                settings = config(warmup=share, schedule=name)
                rates = [lr_at(step, total, settings) for step in range(total)]
                assert all(0 < rate <= 0.5 for rate in rates), (name, total, share)
                assert rates[warmup_steps(total, share)] == 0.5


def steps_of(optimizer: Optimizer, gradients: list[torch.Tensor], lr: float) -> None:
    """One update per gradient of the sum p * g."""
    (parameter,) = optimizer.parameters.values()
    for gradient in gradients:
        optimizer.backward((parameter * gradient).sum())
        optimizer.update(lr, optimizer.gradient_norm())


def test_adamw_is_its_formula() -> None:
    """Three updates in float64 against Loshchilov & Hutter's algorithm 2 written out.

    Mutation: decay after the update, decay by weight_decay without lr, drop a bias correction.
    """
    torch.manual_seed(1)
    parameter = Parameter(torch.randn(3, 5, dtype=torch.float64))
    gradients = [torch.randn(3, 5, dtype=torch.float64) for _ in range(3)]
    expected, m, v = parameter.detach().clone(), 0.0, 0.0
    for t, g in enumerate(gradients, 1):
        expected = expected * (1 - 0.02 * 0.3)
        m = 0.9 * m + 0.1 * g
        v = 0.999 * v + 0.001 * g * g
        expected = expected - 0.02 * (m / (1 - 0.9**t)) / ((v / (1 - 0.999**t)).sqrt() + 1e-8)
    steps_of(Optimizer({"w": parameter}, config(weight_decay=0.3)), gradients, 0.02)
    torch.testing.assert_close(parameter.detach(), expected, rtol=1e-9, atol=1e-12)


def test_biases_are_not_decayed() -> None:
    """With equal gradients a matrix shrinks by lr * weight_decay more than a vector.

    Mutation: put both into one group.
    """
    matrix = Parameter(torch.full((1, 3), 2.0, dtype=torch.float64))
    vector = Parameter(torch.full((3,), 2.0, dtype=torch.float64))
    optimizer = Optimizer({"m": matrix, "v": vector}, config(weight_decay=0.5))
    optimizer.backward((matrix.sum() + vector.sum()) * 0.7)
    optimizer.update(0.1, optimizer.gradient_norm())
    gap = (vector.detach() - matrix.detach()[0]).tolist()
    assert gap == pytest.approx([0.1 * 0.5 * 2.0] * 3, rel=1e-9)


def test_a_rate_of_its_own_scales_the_step_and_not_the_decay() -> None:
    """Adam's first step is lr * rate whatever the gradient; the decay is lr * weight_decay for all.

    Fails when the factor is dropped, is not applied to later rates, or decays the tensor too.
    """
    names = ("slow", "fast", "plain")
    tensors = {n: Parameter(torch.full((1, 3), 2.0, dtype=torch.float64)) for n in names}
    optimizer = Optimizer(tensors, config(weight_decay=0.5), rates={"slow": 0.25, "fast": 16.0})
    for lr, gradient in ((0.1, 0.7), (0.01, 0.7)):
        before = {n: t.detach().clone() for n, t in tensors.items()}
        optimizer.backward(sum(t.sum() for t in tensors.values()) * gradient)
        optimizer.update(lr, optimizer.gradient_norm())
        for name, rate in (("slow", 0.25), ("fast", 16.0), ("plain", 1.0)):
            moved = (before[name] * (1 - lr * 0.5) - tensors[name].detach())[0].tolist()
            assert moved == pytest.approx([lr * rate] * 3, rel=1e-7), name


def test_state_with_rates_goes_out_and_in_to_the_bit() -> None:
    """Names, not places in a group, decide; the second optimizer has its groups in another order.

    Fails when state is loaded by position, or a loaded group forgets its factor.
    """
    gradients = [torch.randn(2, 5) for _ in range(4)]
    rates = {"a.B": 16.0, "b.A": 0.5}

    def made(values: list[torch.Tensor], order: list[str]) -> Optimizer:
        named = dict(zip(["a.A", "a.B", "b.A"], values, strict=True))
        parameters = {name: Parameter(named[name].clone()) for name in order}
        return Optimizer(parameters, config(weight_decay=0.1), rates=rates)

    def learn(optimizer: Optimizer, some: list[torch.Tensor]) -> None:
        for k, g in enumerate(some):
            parts = enumerate(optimizer.parameters.items(), 1)
            loss = sum((p * g).sum() * len(name) * (ord(name[0]) - 90) for _, (name, p) in parts)
            optimizer.backward(loss)
            optimizer.update(0.01 / (k + 1), optimizer.gradient_norm())

    start = [torch.ones(2, 5), torch.zeros(2, 5), torch.full((2, 5), 0.3)]
    straight = made(start, ["a.A", "a.B", "b.A"])
    learn(straight, gradients[:2])
    saved = {k: v.clone() for k, v in straight.tensors().items()}
    values = [straight.parameters[n].detach() for n in ("a.A", "a.B", "b.A")]
    resumed = made(values, ["b.A", "a.B", "a.A"])
    resumed.load(saved, {})
    for optimizer in (straight, resumed):
        learn(optimizer, gradients[2:])
    assert all(torch.equal(p, resumed.parameters[n]) for n, p in straight.parameters.items())


def test_clipping_scales_all_gradients_by_one_factor() -> None:
    """The norm is over all tensors and given before clipping; AdamW's first moment shows what came.

    torch divides by (norm + 1e-6), so the factor is off by 1e-6 / norm: the tolerance.
    Mutation: clip each tensor by its own norm, or return the norm after clipping.
    """
    a, b = Parameter(torch.zeros(2, 2).double()), Parameter(torch.zeros(1, 3).double())
    optimizer = Optimizer({"a": a, "b": b}, config(max_grad_norm=0.25))
    optimizer.backward(3.0 * a.sum() + 2.0 * b.sum())
    norm = optimizer.gradient_norm()
    optimizer.update(0.1, norm)
    whole = math.sqrt(4 * 9 + 3 * 4)
    assert float(norm) == pytest.approx(whole, rel=1e-12)
    moments = optimizer.tensors()
    factor = 0.25 / whole
    assert moments["a.exp_avg"].flatten().tolist() == pytest.approx([0.3 * factor] * 4, rel=1e-6)
    assert moments["b.exp_avg"].flatten().tolist() == pytest.approx([0.2 * factor] * 3, rel=1e-6)


def test_small_gradients_are_not_scaled_up() -> None:
    """Mutation: drop the clamp at 1."""
    a = Parameter(torch.zeros(2, 2).double())
    optimizer = Optimizer({"a": a}, config(max_grad_norm=100.0))
    optimizer.backward(0.5 * a.sum())
    optimizer.update(0.1, optimizer.gradient_norm())
    assert optimizer.tensors()["a.exp_avg"].flatten().tolist() == pytest.approx([0.05] * 4)


def test_a_16_bit_weight_collects_updates_it_could_not_hold() -> None:
    """bfloat16 around 1.0 has steps of 2^-8; 64 updates of 2^-12 move it by 2^-6.

    Mutation: let AdamW update the 16-bit parameter itself (it stays at 1.0).
    """
    low = Parameter(torch.ones(2, 3, dtype=torch.bfloat16))
    optimizer = Optimizer({"w": low}, config())
    steps_of(optimizer, [-torch.ones(2, 3, dtype=torch.bfloat16)] * 64, 2.0**-12)
    assert low.dtype == torch.bfloat16
    assert low.detach().float().unique().tolist() == [1 + 2.0**-6]
    state = optimizer.tensors()
    assert {t.dtype for t in state.values()} == {torch.float32}
    assert set(state) == {"w.master", "w.exp_avg", "w.exp_avg_sq", "w.step"}


def test_gradients_of_16_bit_weights_are_summed_in_float32() -> None:
    """1 + 256 * 2^-9 is 1.5; a bfloat16 sum stays at 1.

    Mutation: drop the hook and cast the accumulated gradient once.
    """
    low = Parameter(torch.zeros(1, dtype=torch.bfloat16))
    optimizer = Optimizer({"w": low}, config())
    optimizer.backward(low.sum())
    for _ in range(256):
        optimizer.backward((low * 2.0**-9).sum())
    assert low.grad is None
    assert float(optimizer.gradient_norm()) == 1.5


def test_a_closed_optimizer_leaves_no_hook() -> None:
    """Mutation: forget the hooks in close(): the gradient disappears into the master."""
    low = Parameter(torch.zeros(3, dtype=torch.bfloat16))
    Optimizer({"w": low}, config()).close()
    low.sum().backward()
    assert low.grad is not None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_state_goes_out_and_in_to_the_bit(dtype: torch.dtype) -> None:
    """Four updates equal two, a new optimizer that loads, and two more.

    Mutation: leave out `step` (bias correction restarts), or the masters.
    """
    gradients = [torch.randn(3, 5).to(dtype) for _ in range(4)]
    straight = Parameter(torch.ones(3, 5, dtype=dtype))
    steps_of(Optimizer({"w": straight}, config()), gradients, 0.01)

    first = Parameter(torch.ones(3, 5, dtype=dtype))
    optimizer = Optimizer({"w": first}, config())
    steps_of(optimizer, gradients[:2], 0.01)
    saved = {k: v.clone() for k, v in optimizer.tensors().items()}
    second = Parameter(first.detach().clone())
    resumed = Optimizer({"w": second}, config())
    resumed.load(saved, {})
    assert torch.equal(resumed.tensors()["w.exp_avg_sq"], saved["w.exp_avg_sq"])
    steps_of(resumed, gradients[2:], 0.01)
    assert torch.equal(second, straight)


def test_state_of_other_parameters_is_refused() -> None:
    """Count first, then the first offender. Mutation: ignore what is left over."""
    wide = Parameter(torch.ones(3, 5))
    optimizer = Optimizer({"w": wide}, config())
    steps_of(optimizer, [torch.ones(3, 5)], 0.01)
    state = dict(optimizer.tensors())
    other = Optimizer({"v": Parameter(torch.ones(3, 5))}, config())
    with pytest.raises(TrainingError, match="3 tensors differ"):
        other.load(state, {})
    narrow = Optimizer({"w": Parameter(torch.ones(3, 4))}, config())
    with pytest.raises(TrainingError, match=r"2 tensors differ\n.*\[3, 5\].*\[3, 4\]"):
        narrow.load(state, {})


def test_overflow_in_float16_skips_the_update_and_lowers_the_scale() -> None:
    """Mutation: update in spite of infinity, or do not tell the scaler."""
    parameter = Parameter(torch.ones(2, 3))
    optimizer = Optimizer({"w": parameter}, config(), scale_loss=True)
    optimizer.backward((parameter * 1e38).sum())
    assert not math.isfinite(float(optimizer.gradient_norm()))
    assert optimizer.skip()
    assert optimizer.scaler_state()["scale"] == 2.0**15
    assert torch.equal(parameter, torch.ones(2, 3))
    optimizer.backward((parameter * 3.0).sum())
    norm = optimizer.gradient_norm()
    assert float(norm) == pytest.approx(3.0 * math.sqrt(6), rel=1e-6)
    optimizer.update(0.125, norm)
    assert parameter.flatten().tolist() == pytest.approx([0.875] * 6, rel=1e-6)
    twin = Optimizer({"w": Parameter(torch.ones(2, 3))}, config(), scale_loss=True)
    twin.load(optimizer.tensors(), optimizer.scaler_state())
    assert twin.scaler_state() == optimizer.scaler_state()


def test_small_gradients_survive_float16() -> None:
    """1e-8 is zero in float16 (its smallest number is 6e-8); scaled by 2^16 it has 11 bits.

    Mutation: unscale in float16, or leave the gradient scaled.
    """
    low = Parameter(torch.zeros(3, dtype=torch.float16))
    (low.float() * 1e-8).sum().backward()
    assert low.grad is not None
    assert not low.grad.any()
    low.grad = None
    optimizer = Optimizer({"w": low}, config(), scale_loss=True)
    for _ in range(2):
        optimizer.backward((low.float() * 1e-8).sum())
    norm = optimizer.gradient_norm()
    assert float(norm) == pytest.approx(2e-8 * math.sqrt(3), rel=2.0**-10)
    optimizer.update(0.5, norm)
    assert optimizer.tensors()["w.master"].dtype == torch.float32
    assert low.dtype == torch.float16
    assert bool((low < 0).all())


def test_an_overflow_between_micro_batches_skips_the_step_and_is_not_heard() -> None:
    """float16 ends at 65504: a gradient of 2 overflows at a scale of 2^16, one of 0.5 does not.

    Mutation: lose the infinity when the next micro-batch is added, or count infinity as heard.
    """
    low = Parameter(torch.zeros(3, dtype=torch.float16))
    optimizer = Optimizer({"w": low}, config(), scale_loss=True)
    optimizer.backward((low.float() * 2.0).sum())
    optimizer.backward((low.float() * 0.5).sum())
    assert not math.isfinite(float(optimizer.gradient_norm()))
    assert optimizer.skip()
    assert not low.any()
    assert (optimizer.heard.updates, optimizer.heard.silent) == (0, {"w"})
    optimizer.backward((low.float() * 0.5).sum())
    assert float(optimizer.gradient_norm()) == pytest.approx(0.5 * math.sqrt(3), rel=1e-6)


def test_nan_is_not_an_overflow_that_scaling_could_cure() -> None:
    """The scale stops at 1: below it scaling is not to blame. Mutation: skip forever."""
    parameter = Parameter(torch.ones(2))
    optimizer = Optimizer({"w": parameter}, config(), scale_loss=True)
    skipped = 0
    while True:
        optimizer.backward((parameter * math.nan).sum())
        optimizer.gradient_norm()
        if not optimizer.skip():
            break
        skipped += 1
    assert skipped == 16
