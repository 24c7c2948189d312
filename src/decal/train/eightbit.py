"""AdamW with 8-bit state, through bitsandbytes: is it there, and its state out and in.

bitsandbytes keeps both moments of a tensor as codes `state1`, `state2` (uint8, in the tensor's
shape) with a float32 scale per 256 values, `absmax1`, `absmax2`; tensors of fewer than 4096 values
keep float32 moments under the same names. The code books `qmap1`, `qmap2` are constants that it
makes itself, so they are not part of a checkpoint. `step` is a number.

State comes back through bitsandbytes' own `init_state`: it alone knows which buffers are paged
(unified memory, which the driver moves out of a full GPU), and values are copied into them.
Rejected: its `load_state_dict`, which puts plain tensors in the place of paged ones.

Whether it works here is found out by doing one update: versions, drivers and builds without a
kernel for the device fail in ways that no list of devices foresees. On a CPU the plain one works
(bitsandbytes 0.50; some thirty times slower an update than torch's AdamW, which seldom matters
beside forward and backward); paging out of main memory means nothing and is refused.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from decal.errors import ConfigError

CLASSES = {"adamw8bit": "AdamW8bit", "paged_adamw8bit": "PagedAdamW8bit"}
"""Names in the settings and in `bitsandbytes.optim`."""
PAGED = "paged_adamw8bit"
STATE = ("state1", "state2", "absmax1", "absmax2")
"""Its names for a parameter's state, `step` apart."""
CONSTANTS = ("qmap1", "qmap2")
PROBE = 1 << 17
"""Values in the update that is tried: enough for 8-bit codes, and for paging (10**5)."""


def require(name: str, device: torch.device) -> None:
    """Returns if the optimizer of this name works on the device; `adamw` always does.

    Raises:
        ConfigError: bitsandbytes is not installed, or cannot do it on this device.
    """
    if name not in CLASSES:
        return
    hint = "set `train.optimizer: adamw`"
    if name == PAGED and device.type == "cpu":
        raise ConfigError(
            f"train.optimizer {name} needs a GPU: its state is moved out of the GPU's memory",
            hint=f"{hint}, or adamw8bit",
        )
    try:
        made = importlib.import_module("bitsandbytes.optim")
    except ImportError as error:
        raise ConfigError(
            f"train.optimizer {name} needs bitsandbytes, which cannot be imported: {error}",
            hint=f"pip install bitsandbytes, or {hint}",
        ) from error
    try:
        values = torch.nn.Parameter(torch.zeros(PROBE, device=device))
        values.grad = torch.ones_like(values)
        getattr(made, CLASSES[name])([values], lr=1e-3).step()
        worked = bool((values < 0).all())
    except Exception as error:  # whatever a build, a driver or a version makes of it
        raise _useless(name, device, str(error).partition("\n")[0], hint) from error
    if not worked:
        raise _useless(name, device, "an update changed nothing", hint)


def _useless(name: str, device: torch.device, why: str, hint: str) -> ConfigError:
    return ConfigError(
        f"train.optimizer {name} does not work on {device} with the bitsandbytes installed here",
        details=[why],
        hint=hint,
    )


def make(name: str, groups: list[dict[str, Any]], **settings: Any) -> torch.optim.Optimizer:
    """bitsandbytes' optimizer of this name."""
    module = importlib.import_module("bitsandbytes.optim")
    made: torch.optim.Optimizer = getattr(module, CLASSES[name])(groups, **settings)
    return made


def state_tensors(state: Mapping[str, Any]) -> dict[str, Tensor]:
    """One parameter's state without the constants, numbers as int64 scalars."""
    return {
        key: value if isinstance(value, Tensor) else torch.tensor(value)
        for key, value in state.items()
        if key not in CONSTANTS
    }


def restore(optimizer: Any, saved: Mapping[Tensor, Mapping[str, Tensor]]) -> dict[Tensor, str]:
    """Gives parameters the state that `state_tensors` gave; those not named start over.

    Returns:
        What does not fit, by parameter; nothing is copied there.
    """
    wrong = {}
    optimizer.state.clear()
    for number, group in enumerate(optimizer.param_groups):
        for place, parameter in enumerate(group["params"]):
            if parameter not in saved:
                continue
            optimizer.init_state(group, parameter, number, place)
            state, given = optimizer.state[parameter], saved[parameter]
            own = state_tensors(state)
            differing = [k for k in own.keys() | given.keys() if _form(own, k) != _form(given, k)]
            if differing:
                key = min(differing)
                wrong[parameter] = f"{key} is {_form(given, key)}, not {_form(own, key)}"
                continue
            for key, value in given.items():
                if isinstance(state[key], Tensor):
                    state[key].copy_(value)
                else:
                    state[key] = int(value)
    return wrong


def _form(tensors: Mapping[str, Tensor], key: str) -> str:
    if key not in tensors:
        return "missing"
    return f"{list(tensors[key].shape)} {str(tensors[key].dtype).removeprefix('torch.')}"
