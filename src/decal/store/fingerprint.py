"""One hash for all weights of a base: which base was this adapter trained on?

fingerprint = sha256 over the sorted lines [numbers, dtype, shape, sha256 of the stored bytes] as
JSON, each line once. `numbers` are those in the tensor's key (its layer, its expert). Buffers that
are no weights (leftovers.py) are left out. So the same weights have the same fingerprint

    however they are sharded, ordered and described
    under historic names: `h.0.` for `transformer.h.0.`, `gamma` for `weight`, …
    whether a tied head is written beside the embedding or not

and another dtype, one changed bit or two layers in each other's place give another.

Rejected: the names that transformers gives the weights. They need a skeleton, so that a base whose
code is remote or too new has none, and they change with transformers' versions: an adapter would be
refused on its own base after an upgrade. Lost with the names is an exchange of two tensors of one
layer, shape and dtype, which nobody makes by accident.

Hashing reads every byte, so the hashes of a file are remembered in the user's cache folder, under
what the system says of it: real path, size, inode, and the times of the last write and of the last
change of status. The last one cannot be set by copying tools, which keep the time of writing.
Nothing is ever written into the base's own folder. A cache that cannot be written or is damaged
costs time only.

Knows no models and no adapters.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

from decal.errors import BaseModelError, DecalError
from decal.store.base import BaseFiles
from decal.store.files import write_bytes
from decal.store.leftovers import is_leftover
from decal.store.tensorfile import TensorFile, TensorSpec, hash_entry

__all__ = ["cache_folder", "combine", "file_marks", "fingerprint", "tensor_hashes"]

_THREADS = 2
"""hashlib and file reads release the interpreter lock; more threads wait for the disk."""


def cache_folder() -> Path:
    """The folder for what can be computed again: $XDG_CACHE_HOME/decal or ~/.cache/decal."""
    root = os.environ.get("XDG_CACHE_HOME")
    return Path(root if root and os.path.isabs(root) else Path.home() / ".cache") / "decal"


def fingerprint(base: BaseFiles, observe: Callable[[int, int], None] | None = None) -> str:
    """The base's fingerprint, 64 hex digits; arguments and errors are those of `tensor_hashes`."""
    specs = {key: entry.spec for key, entry in base.tensors.items()}
    return combine(specs, tensor_hashes(base, observe))


def file_marks(base: BaseFiles) -> tuple[str, ...]:
    """What the system says of each weight file, as hashes: changed where a file was written.

    Raises OSError where one is gone.
    """
    return tuple(_cache_entry(shard.path).stem for shard in base.shards)


def tensor_hashes(
    base: BaseFiles, observe: Callable[[int, int], None] | None = None
) -> dict[str, str]:
    """File key -> sha256 of the tensor's stored bytes, as hex.

    `observe(done, total)` is called with bytes as tensors are hashed; remembered ones count too.

    Raises:
        BaseModelError: a file became unreadable.
    """
    hashes: dict[str, str] = {}
    done, total = 0, base.nbytes
    try:
        for shard in base.shards:
            for key, digest in _file_hashes(shard):
                hashes[key] = digest
                done += base.tensors[key].spec.nbytes
                if observe is not None:
                    observe(done, total)
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise BaseModelError(f"base `{base.folder}` cannot be read: {reason}") from error
    return hashes


def combine(specs: Mapping[str, TensorSpec], hashes: Mapping[str, str]) -> str:
    """The fingerprint of tensors whose hashes are known."""
    lines = set()
    for key, spec in specs.items():
        if not is_leftover(key, len(spec.shape)):
            numbers = [int(part) for part in key.split(".") if part.isdigit()]
            line = [numbers, spec.dtype, list(spec.shape), hashes[key]]
            lines.add(json.dumps(line, separators=(",", ":")))
    return hashlib.sha256("\n".join(sorted(lines)).encode()).hexdigest()


def _file_hashes(file: TensorFile) -> Iterator[tuple[str, str]]:
    entry = _cache_entry(file.path)
    hashes = _recall(entry, file)
    if hashes is not None:
        yield from hashes.items()
        return
    hashes = {}
    with ThreadPoolExecutor(_THREADS) as pool:
        found = pool.map(hash_entry, file.entries.values())
        for key, digest in zip(file.entries, found, strict=True):
            hashes[key] = digest
            yield key, digest
    with suppress(OSError, DecalError):  # a cache that cannot be written is no reason to stop
        entry.parent.mkdir(parents=True, exist_ok=True)
        write_bytes(entry, json.dumps(hashes).encode())


def _cache_entry(path: Path) -> Path:
    stat = path.stat()
    facts = (os.path.realpath(path), stat.st_size, stat.st_ino, stat.st_mtime_ns, stat.st_ctime_ns)
    name = hashlib.sha256(json.dumps(facts).encode()).hexdigest()
    return cache_folder() / "fingerprints" / f"{name}.json"


def _recall(path: Path, file: TensorFile) -> dict[str, str] | None:
    try:
        hashes = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return None
    if not isinstance(hashes, dict) or hashes.keys() != file.entries.keys():
        return None
    sound = all(isinstance(h, str) and len(h) == 64 for h in hashes.values())
    return hashes if sound else None
