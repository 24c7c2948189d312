"""Tensors from the pickles of torch.save (`adapter_model.bin`), which older tools wrote.

A pickle is a program. It is read through torch's weights-only unpickler, which runs none, and with
the file mapped: then every storage is a piece of the file, and no claim in it can make memory grow.
What remains is a tensor that says it is larger than its storage (a stride of zero), or thousands
over one storage; both are refused before anything is copied.

Knows nothing of adapters.
"""

from __future__ import annotations

import errno
import pickle
import stat
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from decal.errors import DecalError
from decal.store.tensorfile import TORCH_DTYPES

__all__ = ["load_pickled"]

_DTYPES = frozenset(TORCH_DTYPES.values())

_COPIES = 4
"""Bytes of all tensors over bytes of the file; tied weights may be stored once and named twice."""


def load_pickled(path: Path, error: type[DecalError], *, hint: str | None = None) -> dict[str, Any]:
    """The named tensors of a file that torch.save wrote, mapped: copy them while the file is there.

    Raises:
        error: the file is missing or damaged, holds anything but named tensors, or tensors larger
            than itself; code in it is refused and not run.
    """
    try:
        size = path.stat().st_size
        _refuse_bomb(path, size)
        stored = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except OSError as problem:
        text = (problem.strerror or str(problem)).lower()
        raise error(f"`{path}` cannot be read: {text}", hint=hint) from problem
    except pickle.UnpicklingError as problem:
        raise error(
            f"`{path}` is a pickle that holds more than tensors, which could run code: not read",
            hint="get the adapter as safetensors, from a source you trust",
        ) from problem
    except Exception as problem:  # whatever a damaged archive makes torch's reader raise
        text = str(problem).partition("\n")[0][:120]
        raise error(f"`{path}` is damaged or no file of torch.save: {text}", hint=hint) from problem
    named = isinstance(stored, dict) and all(
        isinstance(key, str)
        and isinstance(value, Tensor)
        and value.dtype in _DTYPES
        and value.device.type == "cpu"
        for key, value in stored.items()
    )
    if not named:
        raise error(f"`{path}` holds something else than named plain tensors", hint=hint)
    claimed = sum(tensor.numel() * tensor.element_size() for tensor in stored.values())
    plain = all(tensor.layout == torch.strided for tensor in stored.values())
    if not plain or claimed > _COPIES * size:
        raise error(
            f"`{path}` is damaged: its tensors claim {claimed} bytes, the file has {size}",
            hint=hint,
        )
    return dict(stored)


def _refuse_bomb(path: Path, size: int) -> None:
    """Raises OSError where the archive's members are larger than the file: torch packs nothing."""
    if not stat.S_ISREG(path.stat().st_mode):
        raise OSError(errno.EINVAL, "it is no regular file", path)
    if not zipfile.is_zipfile(path):
        return  # the older form, which cannot be mapped: torch's reader refuses it
    with zipfile.ZipFile(path) as archive:
        members = archive.infolist()
    packed = any(member.compress_type != zipfile.ZIP_STORED for member in members)
    if packed or sum(member.file_size for member in members) > size:
        raise OSError(
            errno.EINVAL, "it is a compressed archive, which torch.save never writes", path
        )
