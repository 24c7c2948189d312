"""save_pretrained of a model with adapters: PEFT folders, and never the wrapped whole.

transformers would write `q_proj.base_layer.weight`, which loads as a base with random layers. As in
peft, the adapter `default` goes into the folder itself and others into sub-folders of their names;
beside them may stand what else a trainer writes there. Each file is put in place whole.

transformers' Trainer saves through here and loads a checkpoint by itself, from a file called
`model.safetensors` whose tensors it hands to `load_state_dict`. So a folder called as its
checkpoints are gets that name as a second link to the adapter in use, and the model takes PEFT's
keys in `load_state_dict`: all of one adapter's, or an error.

What belongs into an adapter's metadata (the base's fingerprint, its quantizer) is known to whoever
loaded the base and left `decal_describe` on the model: a function of model and adapter name.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from decal.errors import AdapterError, VerificationError, first_of
from decal.model.adapter import Adapter
from decal.model.state import (
    adapted_layers,
    adapter_state,
    adapters_of,
    full_state,
    known,
    load_state,
    replaced_modules,
    require,
)
from decal.model.survey import base_modules
from decal.store.peft import WEIGHTS_NAME
from decal.store.peft_keys import PREFIX, arranged
from decal.store.tensorfile import TensorSpec, dtype_name

MAIN = "default"
"""The adapter that lies in the folder itself."""
_CHECKPOINT = re.compile(r"checkpoint-\d+")


def save_adapters(
    model: nn.Module,
    save_directory: str | Path,
    is_main_process: bool = True,
    state_dict: Mapping[str, Tensor] | None = None,
    push_to_hub: bool = False,
    safe_serialization: bool = True,
    selected_adapters: Sequence[str] | None = None,
    **ignored: Any,
) -> None:
    """Writes the attached adapters; takes the place of the model's `save_pretrained`.

    Args:
        state_dict: what a trainer gathered; must agree with the model's adapters, which are saved.
        ignored: what says how to cut up or store a whole model.

    Raises:
        AdapterError: pickle or the hub are asked for, `state_dict` holds other adapters, or
            something is trainable that belongs to no adapter.
        StorageError, VerificationError: see `write_adapter`.
    """
    if push_to_hub:
        raise AdapterError(
            "save_pretrained writes to a folder only",
            hint="save without push_to_hub and push the folder: decal push",
        )
    if not safe_serialization:
        raise AdapterError(
            "adapters are saved as safetensors, a pickle can run code",
            hint="leave safe_serialization out",
        )
    names = list(adapters_of(model))
    if selected_adapters is not None:
        names = [known(require(model), name) for name in selected_adapters]
    for name in names:
        refuse_lost(model, name)
    if state_dict is not None:
        _check_state_dict(model, state_dict)
    if not is_main_process:
        return
    describe: Callable[[nn.Module, str], Adapter]
    describe = getattr(model, "decal_describe", Adapter.from_model)
    for name in names:
        out = Path(save_directory) if name == MAIN else Path(save_directory) / name
        out.mkdir(parents=True, exist_ok=True)
        describe(model, name).save_into(out)
        if _CHECKPOINT.fullmatch(Path(save_directory).name) and [name] == _in_use(model):
            _link(out / WEIGHTS_NAME, Path(save_directory) / "model.safetensors")


def refuse_lost(model: nn.Module, name: str) -> None:
    """All that training has changed must be in the adapter's tensors.

    Raises:
        AdapterError: parameters of the base are trainable and belong to no adapter.
        VerificationError: the adapter has parameters that would not be written.
    """
    free = [
        f"{module}.{leaf}" if module else leaf
        for module, inner in base_modules(model)
        for leaf, parameter in inner._parameters.items()
        if parameter is not None and parameter.requires_grad
    ]
    if free:
        raise AdapterError(
            f"{len(free)} parameters are trainable and belong to no adapter, so that adapter"
            f" `{name}` would be saved without them",
            details=[first_of(free)],
            hint="freeze them (requires_grad_(False)); what is to be trained whole belongs into"
            " modules_to_save when the adapter is attached",
        )
    wrappers = (*adapted_layers(model).values(), *replaced_modules(model).values())
    own = {
        id(parameter): key
        for wrapper in wrappers
        if name in wrapper.adapters
        for key, parameter in wrapper.adapters[name].named_parameters()
    }
    written = {id(t) for parts in adapter_state(model, name).values() for t in parts}
    written |= {id(parameter) for parameter in full_state(model, name).values()}
    lost = [key for number, key in own.items() if number not in written]
    if lost:
        raise VerificationError(
            f"{len(lost)} of {len(own)} parameters of adapter `{name}` have no place in its file",
            details=lost[:1],
        )


def take_peft_keys(model: nn.Module, state_dict: MutableMapping[str, Tensor], *_: object) -> None:
    """Hook before load_state_dict: PEFT's keys in it are loaded into the adapter in use.

    Raises:
        AdapterError: they are not the adapter's, or it is not clear which adapter is meant.
    """
    given = {key: state_dict.pop(key) for key in list(state_dict) if key.startswith(PREFIX)}
    if not given:
        return
    names = _in_use(model)
    if len(names) != 1:
        raise AdapterError(
            f"{len(names)} adapters are in use, one of them is to be loaded",
            hint="use(model, name) first",
        )
    specs = {k: TensorSpec(dtype_name(t.dtype), tuple(t.shape)) for k, t in given.items()}
    contents = arranged(specs)
    if contents.problems:
        key, problem = contents.problems[0]
        raise AdapterError(
            f"{len(contents.problems)} of {len(given)} tensors are not an adapter's",
            details=[f"{key}: {problem}"],
        )
    tensors = {
        module: (given[pair.A], given[pair.B], given[pair.bias] if pair.bias else None)
        for module, pair in contents.pairs.items()
    }
    full = {name: given[key] for name, key in contents.full.items()}
    load_state(model, names[0], tensors, full)
    require(model).loaded = True


def forget_peft_keys(model: nn.Module, incompatible: Any) -> None:
    """Hook after load_state_dict: where an adapter was loaded, nothing of the base is missing."""
    if require(model).loaded:
        require(model).loaded = False
        incompatible.missing_keys.clear()


def _in_use(model: nn.Module) -> list[str]:
    return [name for name, _ in require(model).state.routing.weights]


def _link(source: Path, link: Path) -> None:
    link.unlink(missing_ok=True)
    try:
        link.hardlink_to(source)
    except OSError:  # a file system without links
        shutil.copyfile(source, link)


def _check_state_dict(model: nn.Module, given: Mapping[str, Tensor]) -> None:
    adapters = {n: t for n, t in model.state_dict().items() if ".adapters." in f".{n}"}
    missing = [n for n in adapters if n not in given]
    other = [
        n for n, t in adapters.items() if n in given and not torch.equal(t.cpu(), given[n].cpu())
    ]
    if missing or other:
        raise AdapterError(
            f"state_dict lacks {len(missing)} and differs in {len(other)} of {len(adapters)} "
            "tensors of the model's adapters",
            details=[(missing + other)[0]],
            hint="leave state_dict out: the model's own adapters are saved",
        )
