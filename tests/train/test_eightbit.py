"""8-bit AdamW without bitsandbytes: a stand-in with its names, state and calls.

tests/interop/test_bnb_optimizer.py does the same with the real one.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

import pytest
import torch
from tiny_run import MemoryRun, TinyModel, job
from torch.nn import Parameter

from decal.config import TrainConfig
from decal.errors import ConfigError, TrainingError
from decal.train import eightbit, train
from decal.train.eightbit import require
from decal.train.optim import Optimizer

CPU = torch.device("cpu")


class AdamW8bit(torch.optim.Optimizer):
    """Momentum with uint8 codes and a scale per 256 values; float32 below 4096 values."""

    paged = False

    def __init__(self, params: Any, lr: float, betas: Any = (0.9, 0.999), eps: float = 1e-8):
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": 0.0})

    def init_state(self, group: Any, p: Any, gindex: int, pindex: int) -> None:
        state, small = self.state[p], p.numel() < 4096
        assert self.param_groups[gindex]["params"][pindex] is p
        state["step"] = 0
        for i in "12":
            buffer = torch.zeros_like(p, dtype=torch.float32 if small else torch.uint8)
            buffer.is_paged = self.paged
            state[f"state{i}"] = buffer
            if not small:
                state[f"qmap{i}"] = torch.linspace(-1, 1, 256)
                state[f"absmax{i}"] = torch.zeros(-(-p.numel() // 256))

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for g, group in enumerate(self.param_groups):
            for i, p in enumerate(group["params"]):
                if p.grad is None:
                    continue
                if not self.state[p]:
                    self.init_state(group, p, g, i)
                state = self.state[p]
                state["step"] += 1
                if "absmax1" not in state:
                    state["state1"].mul_(0.9).add_(p.grad, alpha=0.1)
                    p.add_(state["state1"], alpha=-group["lr"] / state["step"])
                    continue
                scale = state["absmax1"].repeat_interleave(256)[: p.numel()].view_as(p)
                m = 0.9 * scale * (state["state1"].float() / 127 - 1) + 0.1 * p.grad
                pad = torch.nn.functional.pad(m.flatten(), (0, -m.numel() % 256)).view(-1, 256)
                state["absmax1"].copy_(pad.abs().amax(1))
                scale = state["absmax1"].repeat_interleave(256)[: p.numel()].view_as(p)
                state["state1"].copy_(((m / scale.clamp_min(1e-12) + 1) * 127).round())
                p.add_(m, alpha=-group["lr"] / state["step"])


class PagedAdamW8bit(AdamW8bit):
    paged = True


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """`bitsandbytes.optim` with the two optimizers above."""
    package, module = ModuleType("bitsandbytes"), ModuleType("bitsandbytes.optim")
    module.AdamW8bit, module.PagedAdamW8bit = AdamW8bit, PagedAdamW8bit  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "bitsandbytes", package)
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", module)
    return module


def config(name: str) -> TrainConfig:
    return TrainConfig(optimizer=name, max_grad_norm=1e9)


def made(name: str, values: list[torch.Tensor], scale_loss: bool = False) -> Optimizer:
    named = {n: Parameter(v.clone()) for n, v in zip(("A", "B", "b"), values, strict=True)}
    return Optimizer(named, config(name), rates={"B": 4.0}, scale_loss=scale_loss)


def learn(optimizer: Optimizer, seeds: range) -> None:
    for seed in seeds:
        generator = torch.Generator().manual_seed(seed)
        loss = torch.zeros(())
        for parameter in optimizer.parameters.values():
            loss = loss + (parameter * torch.randn(parameter.shape, generator=generator)).sum()
        optimizer.backward(loss)
        optimizer.update(0.1, optimizer.gradient_norm())


@pytest.mark.parametrize("scale_loss", [False, True])
def test_state_goes_out_and_in_to_the_bit(stand_in: ModuleType, scale_loss: bool) -> None:
    """Codes, scales, small float32 moments and the count; no constants; factors on the rate.

    Fails when absmax, `step` or the codes are left out, or groups lose their factor.
    """
    start = [torch.randn(65, 67), torch.zeros(67, 65), torch.zeros(5)]
    straight = made("adamw8bit", start, scale_loss)
    learn(straight, range(3))
    saved = {k: v.clone() for k, v in straight.tensors().items()}
    moments = {"state1", "state2", "absmax1", "absmax2", "step"}
    assert {k.partition(".")[2] for k in saved if k[0] == "A"} == moments
    assert {k for k in saved if k[0] == "b"} == {"b.state1", "b.state2", "b.step"}
    assert saved["A.state1"].dtype == torch.uint8
    assert saved["b.state1"].dtype == torch.float32
    resumed = made("adamw8bit", [p.detach() for p in straight.parameters.values()], scale_loss)
    resumed.load(saved, straight.scaler_state())
    for optimizer in (straight, resumed):
        learn(optimizer, range(3, 6))
    assert all(torch.equal(p, resumed.parameters[n]) for n, p in straight.parameters.items())
    assert all(torch.equal(t, resumed.tensors()[n]) for n, t in straight.tensors().items())


def test_paged_buffers_stay_paged(stand_in: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """Saved values are copied into the buffers that bitsandbytes makes.

    Fails when plain tensors are put in their place.
    """
    monkeypatch.setattr(eightbit, "require", lambda name, device: None)
    start = [torch.randn(65, 67), torch.zeros(67, 65), torch.zeros(5)]
    first = made("paged_adamw8bit", start)
    learn(first, range(2))
    second = made("paged_adamw8bit", start)
    second.load({k: v.clone() for k, v in first.tensors().items()}, {})
    buffers = [state["state1"] for state in second._adamw.state.values()]
    assert len(buffers) == 3
    assert all(buffer.is_paged for buffer in buffers)
    assert torch.equal(second.tensors()["A.state1"], first.tensors()["A.state1"])


def test_state_of_another_kind_is_refused(stand_in: ModuleType) -> None:
    """32-bit state for 8 bits, the other way round, and codes of another shape.

    Fails when what does not fit starts over silently.
    """
    start = [torch.randn(65, 67), torch.zeros(67, 65), torch.zeros(5)]
    eight, plain = made("adamw8bit", start), made("adamw", start)
    learn(eight, range(1))
    learn(plain, range(1))
    with pytest.raises(TrainingError, match=r"optimizer does not fit .* 3 tensors differ"):
        made("adamw8bit", start).load(plain.tensors(), {})
    with pytest.raises(TrainingError, match=r"3 tensors differ\n +A: exp_avg, exp_avg_sq missing"):
        made("adamw", start).load(eight.tensors(), {})
    wrong = {**eight.tensors(), "A.absmax1": torch.zeros(3)}
    with pytest.raises(TrainingError, match=r"A: absmax1 is \[3\] float32, not \[18\] float32"):
        made("adamw8bit", start).load(wrong, {})


def test_a_run_resumes_to_the_bit(stand_in: ModuleType) -> None:
    """Through the loop and its checkpoints. Fails when the kind of state is not known."""
    whole, run = MemoryRun(), MemoryRun()
    changes = {"optimizer": "adamw8bit", "lr": 2.0}
    train(job(whole, **changes))

    class StopError(Exception):
        pass

    def halt(event: Any) -> None:
        if getattr(event, "step", 0) == 7 and hasattr(event, "lr"):
            raise StopError

    with pytest.raises(StopError):
        train(job(run, observe=halt, **changes))
    train(job(run, TinyModel(), resume=True, **changes))
    for name, value in whole.kept[12].files["trainable"].items():
        assert torch.equal(value, run.kept[12].files["trainable"][name])
    assert "bitsandbytes" in whole.kept[12].state["circumstances"]


def test_adamw_needs_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails when bitsandbytes is imported unasked."""
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", None)
    require("adamw", CPU)


def test_without_bitsandbytes_the_error_says_how_to_get_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Fails when an ImportError gets out, in the check or when the optimizer is made."""
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", None)
    with pytest.raises(ConfigError, match="adamw8bit needs bitsandbytes") as caught:
        require("adamw8bit", CPU)
    assert caught.value.hint == "pip install bitsandbytes, or set `train.optimizer: adamw`"
    with pytest.raises(ConfigError, match="adamw8bit needs bitsandbytes"):
        train(job(MemoryRun(), optimizer="adamw8bit"))


def test_paging_needs_a_gpu(stand_in: ModuleType) -> None:
    """Fails when the paged optimizer quietly becomes the plain one."""
    with pytest.raises(ConfigError, match="paged_adamw8bit needs a GPU") as caught:
        require("paged_adamw8bit", CPU)
    assert caught.value.hint == "set `train.optimizer: adamw`, or adamw8bit"


def test_what_does_not_work_here_is_found_by_trying(
    stand_in: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No kernel for the device, or one that does nothing. Fails when no update is tried."""
    require("adamw8bit", CPU)

    def broken(self: Any, closure: Any = None) -> None:
        raise NotImplementedError("no kernel for cpu\nand more")

    monkeypatch.setattr(AdamW8bit, "step", broken)
    with pytest.raises(ConfigError, match="does not work on cpu") as caught:
        require("adamw8bit", CPU)
    assert caught.value.details == ("no kernel for cpu",)
    monkeypatch.setattr(AdamW8bit, "step", lambda self: None)
    with pytest.raises(ConfigError, match="does not work on cpu") as caught:
        require("adamw8bit", CPU)
    assert caught.value.details == ("an update changed nothing",)
