"""save_pretrained of a model with adapters: PEFT folders, and never the wrapped whole.

transformers would write `q_proj.base_layer.weight`, which loads as a base with random layers. As in
peft, the adapter `default` goes into the folder itself and others into sub-folders of their names;
beside them may stand what else a trainer writes there. Each file is put in place whole.

What belongs into an adapter's metadata (the base's fingerprint, its quantizer) is known to whoever
loaded the base and left `decal_describe` on the model: a function of model and adapter name.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from decal.errors import AdapterError
from decal.model.adapter import Adapter
from decal.model.state import adapters_of, known, require

MAIN = "default"
"""The adapter that lies in the folder itself."""


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
        AdapterError: pickle or the hub are asked for, or `state_dict` holds other adapters.
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
