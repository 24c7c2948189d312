"""A model's folder -> one with other tensors in it, streamed: quantizing and dequantizing files.

A `Rewrite` takes some tensors of the base and gives others in their place; every tensor that none
takes is copied, or cast where another dtype is asked for. What a rewrite gives lies in the file
where the first tensor it takes lies, so a sharded model stays sharded. Names, shapes and dtypes of
all results must be known before any is made: the header of a file comes first.

A file's tensors are written wide dtypes first, so the results of one rewrite are not written one
after the other. They are kept for the file, up to a limit, and made again where they were dropped:
twice the work for the largest models, and never a whole model in memory.

As in a merge, each file is read again and held against what was meant, and the folder is put in
place last. Knows no model and no quantization format: keys, shapes and functions are given.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from decal.errors import BaseModelError, OutputError
from decal.store.base import INDEX_NAME, BaseFiles, copy_side_files, side_files
from decal.store.files import atomic_folder, check_free, require_space, write_json
from decal.store.fingerprint import combine
from decal.store.record import write_record
from decal.store.tensorfile import (
    TORCH_DTYPES,
    TensorSpec,
    dtype_name,
    raw_chunks,
    tensor_bytes,
    write_verified,
)
from decal.weights.delta import cast

_FLOATS = ("F64", "F32", "F16", "BF16")
_KEPT = 1 << 30
"""Bytes of results that wait to be written."""
_ROOM = 4 << 20
"""Bytes set aside for headers, config and index."""


@dataclass(frozen=True, kw_only=True)
class Rewrite:
    """Some tensors of the base, and what is written instead."""

    takes: tuple[str, ...]
    """File keys, the one whose file the results go into first."""
    gives: Mapping[str, TensorSpec]
    convert: Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]]
    """From the taken tensors by key to the given ones by key."""


@dataclass
class _Job:
    base: BaseFiles
    makers: dict[str, Rewrite]
    """Output key -> the rewrite that gives it."""
    shards: dict[str, dict[str, TensorSpec]]
    observe: Callable[[int, int], None] | None
    kept: dict[str, Tensor] = field(default_factory=dict)
    last: dict[str, Tensor] = field(default_factory=dict)
    """What is left of the last rewrite's results, if there was no room to keep them."""
    done: int = 0

    @property
    def nbytes(self) -> int:
        return sum(spec.nbytes for shard in self.shards.values() for spec in shard.values())

    def advance(self, count: int) -> None:
        self.done += count
        if self.observe is not None:
            self.observe(self.done, 2 * self.nbytes)

    def made(self, key: str) -> Tensor:
        """A result; its siblings are kept while there is room for them."""
        for waiting in (self.kept, self.last):
            if key in waiting:
                return waiting.pop(key)
        maker = self.makers[key]
        results = dict(maker.convert({name: self.base.read(name) for name in maker.takes}))
        wanted = results.pop(key)
        if sum(t.nbytes for t in (*self.kept.values(), *results.values())) <= _KEPT:
            self.kept |= results
        else:
            self.last = results
        return wanted


def rewrite_files(
    base: BaseFiles,
    out: str | Path,
    rewrites: Sequence[Rewrite],
    config_changes: Mapping[str, Any],
    *,
    dtype: torch.dtype | None = None,
    force: bool = False,
    observe: Callable[[int, int], None] | None = None,
    facts: Mapping[str, Any] | None = None,
) -> int:
    """Writes the folder `out` and returns the bytes of its tensors.

    Args:
        config_changes: of config.json; a value of None takes the entry out.
        dtype: of all floating tensors that no rewrite takes; None leaves each as it is stored.
        observe: called with bytes done and bytes in total, reading again included.
        facts: what the folder's record says of its making (store/record.py).

    Raises:
        BaseModelError: a file became unreadable.
        OutputError, StorageError: `out` is taken, or the disk refuses or is too small.
        VerificationError: a value does not fit the dtype, or a file reads back otherwise.
    """
    target = Path(out)
    source, place = base.folder.resolve(), target.resolve()
    if place == source or place in source.parents:
        raise OutputError(f"output `{out}` holds the model `{base.folder}`")
    check_free(target, force=force, marker="config.json")
    job = _plan(base, rewrites, dtype)
    job.observe = observe
    beside = sum((base.folder / name).stat().st_size for name in side_files(base.folder))
    require_space(target, job.nbytes + beside + _ROOM)
    with atomic_folder(target, force=force, marker="config.json") as folder:
        hashes: dict[str, str] = {}
        for shard in base.shards:
            specs = job.shards[shard.path.name]
            chunks = _chunks_of(job, specs)
            metadata = {"format": "pt"} | shard.metadata
            path = folder / shard.path.name
            hashes |= write_verified(path, specs, chunks, metadata, job.advance)
            job.kept.clear()
            job.last.clear()
        _write_rest(job, folder, config_changes, dtype)
        written = {key: spec for shard in job.shards.values() for key, spec in shard.items()}
        write_record(folder, facts or {}, combine(written, hashes), hashes)
    return job.nbytes


def _plan(base: BaseFiles, rewrites: Sequence[Rewrite], dtype: torch.dtype | None) -> _Job:
    shards: dict[str, dict[str, TensorSpec]] = {shard.path.name: {} for shard in base.shards}
    taken = {key for rewrite in rewrites for key in rewrite.takes}
    for key, entry in base.tensors.items():
        if key not in taken:
            floating = dtype is not None and entry.spec.dtype in _FLOATS
            kind = dtype_name(dtype) if dtype and floating else entry.spec.dtype
            shards[entry.file.name][key] = TensorSpec(kind, entry.spec.shape)
    makers: dict[str, Rewrite] = {}
    for rewrite in rewrites:
        shards[base.tensors[rewrite.takes[0]].file.name].update(rewrite.gives)
        makers |= dict.fromkeys(rewrite.gives, rewrite)
    return _Job(base, makers, shards, None)


def _chunks_of(
    job: _Job, specs: Mapping[str, TensorSpec]
) -> Callable[[str], Iterator[bytes | memoryview]]:
    def chunks(key: str) -> Iterator[bytes | memoryview]:
        spec = specs[key]
        if key in job.makers:
            yield tensor_bytes(job.made(key))
        elif job.base.tensors[key].spec == spec:
            try:
                yield from raw_chunks(job.base.tensors[key])
            except OSError as error:
                name = job.base.tensors[key].file
                raise BaseModelError(f"`{name}` cannot be read: {error.strerror}") from error
        else:
            yield tensor_bytes(cast(key, job.base.read(key), TORCH_DTYPES[spec.dtype]))
        job.advance(spec.nbytes)

    return chunks


def _write_rest(
    job: _Job, folder: Path, changes: Mapping[str, Any], dtype: torch.dtype | None
) -> None:
    if job.base.sharded:
        listed = {key: name for name, shard in job.shards.items() for key in shard}
        document = {"metadata": {"total_size": job.nbytes}, "weight_map": listed}
        write_json(folder / INDEX_NAME, document)
    config = copy.deepcopy(job.base.config)
    if dtype is not None:
        text = str(dtype).removeprefix("torch.")
        for part in [config, *(value for value in config.values() if isinstance(value, dict))]:
            part |= {name: text for name in ("dtype", "torch_dtype") if name in part}
        config["dtype"] = text
    config |= changes
    config = {key: value for key, value in config.items() if changes.get(key, 0) is not None}
    write_json(folder / "config.json", config, nan=True)
    copy_side_files(job.base.folder, folder)
