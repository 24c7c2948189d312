"""decal: LoRA and QLoRA fine-tuning that fits the machine you have, and proves what it did.

The public names are loaded when they are first used: `import decal` imports no torch.
"""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

from decal.version import __version__ as __version__

if TYPE_CHECKING:
    from decal.config import DataConfig as DataConfig
    from decal.config import LoraConfig as LoraConfig
    from decal.config import QuantConfig as QuantConfig
    from decal.config import RunConfig as RunConfig
    from decal.config import TrainConfig as TrainConfig
    from decal.errors import DecalError as DecalError
    from decal.model.adapter import Adapter as Adapter
    from decal.model.inject import attach as attach
    from decal.model.inject import detach as detach
    from decal.model.inject import disabled as disabled
    from decal.model.inject import use as use
    from decal.model.use import mixed as mixed
    from decal.runfile import dump_run as dump_run
    from decal.runfile import load_run as load_run
    from decal.verbs.check import check as check
    from decal.verbs.compare import compare as compare
    from decal.verbs.diff import diff as diff
    from decal.verbs.generate import generate as generate
    from decal.verbs.in_place import merge_in_place as merge_in_place
    from decal.verbs.inspect import inspect as inspect
    from decal.verbs.load import load as load
    from decal.verbs.load import load_base as load_base
    from decal.verbs.load import save_adapter as save_adapter
    from decal.verbs.merge import merge as merge
    from decal.verbs.plan import plan as plan
    from decal.verbs.push import push as push
    from decal.verbs.quantize import dequantize as dequantize
    from decal.verbs.quantize import quantize as quantize
    from decal.verbs.train import train as train
    from decal.verbs.verify import verify as verify

_HOME = {
    "Adapter": "decal.model.adapter",
    "DataConfig": "decal.config",
    "DecalError": "decal.errors",
    "LoraConfig": "decal.config",
    "QuantConfig": "decal.config",
    "RunConfig": "decal.config",
    "TrainConfig": "decal.config",
    "attach": "decal.model.inject",
    "check": "decal.verbs.check",
    "compare": "decal.verbs.compare",
    "dequantize": "decal.verbs.quantize",
    "detach": "decal.model.inject",
    "diff": "decal.verbs.diff",
    "disabled": "decal.model.inject",
    "dump_run": "decal.runfile",
    "generate": "decal.verbs.generate",
    "inspect": "decal.verbs.inspect",
    "load": "decal.verbs.load",
    "load_base": "decal.verbs.load",
    "load_run": "decal.runfile",
    "merge": "decal.verbs.merge",
    "merge_in_place": "decal.verbs.in_place",
    "mixed": "decal.model.use",
    "plan": "decal.verbs.plan",
    "push": "decal.verbs.push",
    "quantize": "decal.verbs.quantize",
    "save_adapter": "decal.verbs.load",
    "train": "decal.verbs.train",
    "use": "decal.model.inject",
    "verify": "decal.verbs.verify",
}
"""Public name -> the module that defines it."""

__all__ = ["__version__", *_HOME]


class _Package(ModuleType):
    """Keeps `decal.train` the verb after the package `decal.train` was imported.

    Python binds a submodule in its parent when it is first imported; for a public name of the
    same spelling that binding is not made. `from decal.train.loop import x` works as ever.
    """

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in _HOME and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'decal' has no attribute '{name}'")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME})
