"""8-bit AdamW with real bitsandbytes: it works on a CPU, learns as AdamW does, and resumes exactly.

Paging needs a GPU, so its test is marked gpu.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

from decal.config import TrainConfig
from decal.train.eightbit import require
from decal.train.optim import Optimizer

pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
pytestmark = pytest.mark.interop

ROWS, COLUMNS, OUT = 96, 77, 65


def problem(out: int, device: str) -> tuple[Tensor, Tensor]:
    """Inputs and targets of a linear regression with a low-rank answer."""
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(ROWS, COLUMNS, generator=generator)
    answer = torch.randn(COLUMNS, 3, generator=generator) @ torch.randn(3, out, generator=generator)
    return x.to(device), (x @ answer / COLUMNS**0.5).to(device)


def made(name: str, values: list[Tensor], device: str = "cpu") -> Optimizer:
    """Of a matrix with 8-bit state, a vector whose state stays float32, and LoRA+'s rate."""
    named = dict(zip(("m.B", "m.bias"), values, strict=True))
    parameters = {n: Parameter(v.detach().clone().to(device)) for n, v in named.items()}
    settings = TrainConfig(optimizer=name, weight_decay=0.01, max_grad_norm=1e9)
    return Optimizer(parameters, settings, rates={"m.B": 2.0})


def learn(optimizer: Optimizer, steps: int, device: str = "cpu") -> list[float]:
    x, y = problem(next(iter(optimizer.parameters.values())).shape[0], device)
    losses = []
    for _ in range(steps):
        weight, bias = optimizer.parameters.values()
        loss = (x @ weight.t() + bias - y).square().mean()
        optimizer.backward(loss)
        optimizer.update(0.01, optimizer.gradient_norm())
        losses.append(float(loss.detach()))
    return losses


START = [torch.zeros(OUT, COLUMNS), torch.ones(OUT)]


def test_it_works_on_a_cpu_and_learns_as_adamw_does() -> None:
    """Losses within 5 % of torch's AdamW over 40 updates, relative to the first loss.

    Fails when rates or decay reach bitsandbytes wrongly: at the plain rate the loss falls half as
    fast.
    """
    require("adamw8bit", torch.device("cpu"))
    ours, exact = (learn(made(name, START), 40) for name in ("adamw8bit", "adamw"))
    assert exact[-1] < 0.3 * exact[0]
    assert ours == pytest.approx(exact, abs=0.05 * exact[0])
    codes = made("adamw8bit", START)
    learn(codes, 1)
    assert codes.tensors()["m.B.state1"].dtype == torch.uint8
    assert codes.tensors()["m.bias.state1"].dtype == torch.float32


def resumed_is_straight(name: str, values: list[Tensor], device: str) -> None:
    straight = made(name, values, device)
    learn(straight, 4, device)
    saved = {k: v.detach().cpu().clone() for k, v in straight.tensors().items()}
    second = made(name, list(straight.parameters.values()), device)
    second.load(saved, {})
    for optimizer in (straight, second):
        learn(optimizer, 3, device)
    for key, value in straight.tensors().items():
        assert torch.equal(value, second.tensors()[key]), key
    for key, parameter in straight.parameters.items():
        assert torch.equal(parameter, second.parameters[key]), key


def test_a_resume_is_exact() -> None:
    """Fails when codes, scales, the float32 moments or the count start over."""
    resumed_is_straight("adamw8bit", START, "cpu")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("name", ["adamw8bit", "paged_adamw8bit"])
def test_a_resume_is_exact_on_a_gpu(name: str) -> None:
    """With a matrix large enough for paging (10**5 values)."""
    require(name, torch.device("cuda"))
    values = [torch.zeros(1301, COLUMNS), torch.ones(1301)]
    resumed_is_straight(name, values, "cuda")
    paged = made(name, values, "cuda")
    learn(paged, 1, "cuda")
    state = next(iter(paged._adamw.state.values()))
    assert getattr(state["state1"], "is_paged", False) == (name == "paged_adamw8bit")
