"""AdamW on float32 masters, the gradient norm, and the learning rate as a pure function.

Knows no batches and no files; the optimizer's state goes out and comes in as named tensors.

Precision. LoRA parameters are float32 and are updated in place. For full fine-tuning the model's
parameters may be 16-bit; a 16-bit weight cannot take updates smaller than 2^-9 of itself, and at
a learning rate of 1e-5 nearly all are. So every 16-bit parameter has a float32 master here: its
gradient is added to the master's in float32 as soon as backward has produced it (so summing
micro-batches rounds nothing and 16-bit gradients are never held all at once), AdamW updates the
master, and the parameter becomes the rounded master. The price is 16 bytes a weight: 4 each for
master, gradient and the two moments. Keeping bf16 moments and rounding stochastically would halve
that; it is not exact on resume across devices, and is not done.

Weight decay acts on tensors of two or more dimensions; biases and norms are left alone. Where a
tensor has a rate of its own (`rates`: LoRA+, `lr_pattern`) only Adam's step is scaled by it: its
decay is divided by the factor, so that every tensor decays by lr * weight_decay.

The gradient's scale with float16 (`scale_loss`) is torch's GradScaler: a step whose gradients
overflow is skipped and the scale halved. Scaled gradients of float32 parameters are float32, so
masters and moments never see float16; what can overflow is between the layers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from decal.config import TrainConfig
from decal.errors import TrainingError, first_of
from decal.train import eightbit
from decal.train.heard import Heard

BETAS = (0.9, 0.999)
EPS = 1e-8
FUSED_ON = ("cpu", "cuda")
"""Device types with one kernel for all of AdamW: on a CPU ten times faster for small tensors."""
STATE = ("exp_avg", "exp_avg_sq", "step")
ALIGNED = 64
"""Bytes; where a tensor begins decides which vector instructions take its first and last values."""
MASTER = "master"
RATE = "rate"
"""A group's factor on the learning rate, kept among torch's own keys of a group."""
USUAL_WARMUP = 0.03
"""The share whose length `inverse-sqrt` without warm-up falls by."""


def warmup_steps(total: int, share: float) -> int:
    """Steps below the peak at the start: the share rounded up, but never the whole run."""
    return min(math.ceil(round(total * share, 6)), total - 1)


def lr_at(step: int, total: int, config: TrainConfig) -> float:
    """The learning rate of the step with index `step` (from 0) in a run of `total` steps.

    With w warm-up steps the rate would be 0 at step -1, is `lr` at step w, and for `linear` and
    `cosine` would be 0 at step `total`: no update is spent on a rate of zero.

    `inverse-sqrt` (Vaswani et al. 2017) is lr * sqrt(T / (T + step - w)) with T = w + 1, which is
    lr * sqrt((w + 1) / (step + 1)) and goes on from the rise. Without warm-up T = 1 would halve
    the rate within four steps, so T is then what the usual warm-up of 3 % would make it.
    """
    warm = warmup_steps(total, config.warmup)
    if step < warm:
        return config.lr * (step + 1) / (warm + 1)
    if config.schedule == "inverse-sqrt":
        scale = 1 + (warm or warmup_steps(total, USUAL_WARMUP))
        return config.lr * math.sqrt(scale / (scale + step - warm))
    done = (step - warm) / (total - warm)
    if config.schedule == "cosine":
        return config.lr * 0.5 * (1.0 + math.cos(math.pi * done))
    return config.lr * (1.0 - done) if config.schedule == "linear" else config.lr


class Optimizer:
    """AdamW over named parameters.

    Args:
        parameters: trainable tensors by name; 16-bit ones get float32 masters.
        config: `optimizer`, `lr`, `weight_decay` and `max_grad_norm` are read.
        rates: factors on the learning rate by parameter name; 1 for the others.
        scale_loss: scale the loss before backward, for float16.

    Raises:
        ConfigError: the 8-bit optimizer that is asked for does not work here.
    """

    def __init__(
        self,
        parameters: Mapping[str, Parameter],
        config: TrainConfig,
        *,
        rates: Mapping[str, float] | None = None,
        scale_loss: bool = False,
    ):
        self.parameters = dict(parameters)
        self.device = next(iter(self.parameters.values())).device
        eightbit.require(config.optimizer, self.device)  # before there is anything to undo
        self.heard = Heard(self.parameters)
        self._eightbit = config.optimizer in eightbit.CLASSES
        self._max_norm = config.max_grad_norm
        self._masters: dict[str, Tensor] = {}
        self._hooks: list[Any] = []
        for name, parameter in self.parameters.items():
            _align(parameter)
            if parameter.dtype in (torch.float32, torch.float64):
                self._masters[name] = parameter
            else:
                self._masters[name] = self._give_master(parameter)
        self._adamw = self._make(config, rates or {})
        self._scaler = torch.amp.GradScaler(self.device.type, enabled=scale_loss)

    def _make(self, config: TrainConfig, rates: Mapping[str, float]) -> torch.optim.Optimizer:
        """AdamW over groups of tensors that share their rate and their decay."""
        groups: dict[tuple[float, float], list[Tensor]] = {}
        for name, master in self._masters.items():
            rate = rates.get(name, 1.0)
            decay = config.weight_decay / rate if master.dim() > 1 else 0.0
            groups.setdefault((rate, decay), []).append(master)
        made: list[dict[str, Any]] = [
            {"params": masters, "weight_decay": decay, RATE: rate}
            for (rate, decay), masters in groups.items()
        ]
        settings: dict[str, Any] = {"lr": config.lr, "betas": BETAS, "eps": EPS}
        if self._eightbit:
            return eightbit.make(config.optimizer, made, **settings)
        types = {m.device.type for m in self._masters.values()}
        fused = True if types.issubset(FUSED_ON) else None
        return torch.optim.AdamW(made, fused=fused, **settings)

    def _give_master(self, parameter: Parameter) -> Tensor:
        """A float32 copy that collects the gradients of a 16-bit parameter."""
        master = parameter.detach().float().requires_grad_()

        def collect(low: Tensor) -> None:
            assert low.grad is not None
            if master.grad is None:
                master.grad = low.grad.float()
            else:
                master.grad += low.grad
            low.grad = None

        self._hooks.append(parameter.register_post_accumulate_grad_hook(collect))
        return master

    def close(self) -> None:
        """Lets go of the parameters: no hooks, no gradients."""
        for hook in self._hooks:
            hook.remove()
        self._adamw.zero_grad(set_to_none=True)

    def scaled(self, loss: Tensor) -> Tensor:
        """What backward must begin with for a loss: the loss, or with float16 a multiple of it."""
        found: Tensor = self._scaler.scale(loss)
        return found

    def backward(self, loss: Tensor) -> None:
        """Adds the gradients of a scalar."""
        self.scaled(loss).backward()

    def gradient_norm(self) -> Tensor:
        """The 2-norm over all gradients, unscaled, on the device; call once, after backward."""
        if self._scaler.is_enabled():
            self._scaler.unscale_(self._adamw)
        return torch.nn.utils.get_total_norm([g for _, g in self._gradients()])

    def _gradients(self) -> list[tuple[str, Tensor]]:
        return [(n, m.grad) for n, m in self._masters.items() if m.grad is not None]

    def not_finite(self) -> list[str]:
        """Names of the tensors whose gradient holds NaN or infinity."""
        return [n for n, g in self._gradients() if not bool(torch.isfinite(g).all())]

    def update(self, lr: float, norm: Tensor) -> None:
        """Clips to `max_grad_norm`, updates, and forgets the gradients.

        `lr` is the base rate; every tensor is updated with its own factor of it.
        """
        self.heard.listen(self._gradients())
        held = [m for m in self._masters.values() if m.grad is not None]
        torch.nn.utils.clip_grads_with_norm_(held, self._max_norm, norm)
        for group in self._adamw.param_groups:
            group["lr"] = lr * group[RATE]
        self._scaler.step(self._adamw)
        self._scaler.update()
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                if self._masters[name] is not parameter:
                    parameter.copy_(self._masters[name])
        self._adamw.zero_grad(set_to_none=True)

    def skip(self) -> bool:
        """Drops gradients that overflowed in float16; False if scaling is not what broke them."""
        if not self._scaler.is_enabled():
            return False
        before = self._scaler.get_scale()
        self._scaler.update()
        self._adamw.zero_grad(set_to_none=True)
        return 1.0 <= self._scaler.get_scale() < before

    def state_bytes(self) -> int:
        """Bytes of what `tensors` gives once every parameter was updated."""
        total = 0
        for name, master in self._masters.items():
            total += 0 if master is self.parameters[name] else master.nbytes
            total += (2 if self._eightbit else 2 * master.element_size()) * master.numel()
        return total

    def forget(self) -> None:
        """Drops the gradients of a step that begins anew."""
        self._adamw.zero_grad(set_to_none=True)

    def scaler_state(self) -> dict[str, Any]:
        """The loss scale and its history; empty without scaling."""
        return dict(self._scaler.state_dict())

    def tensors(self) -> dict[str, Tensor]:
        """Masters and state by name: `<parameter>.master` where the parameter is 16-bit, and
        `<parameter>.<exp_avg|exp_avg_sq|step>`, or with 8 bits `.<state1|absmax1|…|step>`.
        """
        out: dict[str, Tensor] = {}
        for name, master in self._masters.items():
            if master is not self.parameters[name]:
                out[f"{name}.{MASTER}"] = master.detach()
            state = self._adamw.state.get(master, {})
            for key, value in (eightbit.state_tensors(state) if self._eightbit else state).items():
                out[f"{name}.{key}"] = value
        return out

    def load(self, tensors: Mapping[str, Tensor], scaler: Mapping[str, Any]) -> None:
        """Takes over what `tensors` and `scaler_state` gave.

        Raises:
            TrainingError: tensors for other parameters, or of other shapes.
        """
        rest = dict(tensors)
        found: dict[Tensor, dict[str, Tensor]] = {}
        wrong: list[str] = []
        for name, master in self._masters.items():
            if master is not self.parameters[name]:
                wrong += _copy_master(name, master, rest.pop(f"{name}.{MASTER}", None))
            keys = [k for k in (*STATE, *eightbit.STATE) if f"{name}.{k}" in rest]
            if keys:
                found[master] = {k: rest.pop(f"{name}.{k}") for k in keys}
        wrong += self._take_state(found)
        wrong += [f"{key}: belongs to no trainable tensor" for key in rest]
        if wrong:
            raise misfit("optimizer", wrong)
        if self._scaler.is_enabled() and scaler:
            self._scaler.load_state_dict(dict(scaler))

    def _take_state(self, found: Mapping[Tensor, Mapping[str, Tensor]]) -> list[str]:
        """Gives the masters their moments; returns what does not fit."""
        names = {master: name for name, master in self._masters.items()}
        if self._eightbit:
            wrong = eightbit.restore(self._adamw, found)
            return [f"{names[master]}: {text}" for master, text in wrong.items()]
        problems = [p for m, state in found.items() for p in _misfits(names[m], m, state)]
        if not problems:
            order = [p for group in self._adamw.param_groups for p in group["params"]]
            state = {i: dict(found[m]) for i, m in enumerate(order) if m in found}
            groups = self._adamw.state_dict()["param_groups"]
            self._adamw.load_state_dict({"state": state, "param_groups": groups})
        return problems


def _align(parameter: Parameter) -> None:
    """Moves a parameter that is a view of a mapped file into memory of its own.

    Where it begins there depends on how the file was written, and with it the last bits of sums.
    """
    if parameter.data_ptr() % ALIGNED:
        parameter.data = parameter.detach().clone()


def _copy_master(name: str, master: Tensor, saved: Tensor | None) -> list[str]:
    if saved is None or saved.shape != master.shape:
        return [f"{name}: no float32 master of shape {list(master.shape)}"]
    with torch.no_grad():
        master.copy_(saved)
    return []


def _misfits(name: str, master: Tensor, found: Mapping[str, Tensor]) -> list[str]:
    missing = [k for k in STATE if k not in found]
    if missing:
        return [f"{name}: {', '.join(missing)} missing"]
    return [
        f"{name}: {key} is {list(value.shape)}, the parameter is {list(master.shape)}"
        for key, value in found.items()
        if key != "step" and value.shape != master.shape
    ]


def misfit(what: str, wrong: Sequence[str]) -> TrainingError:
    """The error for a checkpoint of other parameters: count, first offender."""
    return TrainingError(
        f"the checkpoint's {what} does not fit what is trained: {len(wrong)} tensors differ",
        details=[first_of(wrong)],
        hint="resume with the settings the run was started with, or start a new run",
    )
