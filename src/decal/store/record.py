"""The record that a written model folder carries: what it was made of, and a hash of all it holds.

decal_record.json lies beside config.json; transformers and the others ignore it. It holds whatever
facts the writer gives (base, adapter, verification, …), and

    fingerprint   of the weights, as an adapter trained on them would record it
    tensors       file key -> sha256 of the tensor's stored bytes
    files         every other file -> sha256

so that a byte that changed later is found, and in which tensor. It is no signature: who changes the
folder on purpose can change the record too.

Knows no adapters and no formats.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from decal.errors import VerificationError
from decal.store.files import read_json, write_json, writing
from decal.store.tensorfile import TensorEntry, hash_entry, read_header

__all__ = ["RECORD_NAME", "amend_record", "changed_since", "read_record", "write_record"]

RECORD_NAME = "decal_record.json"
_LIMIT = 1 << 28
"""Bytes; a mixture of experts has tens of thousands of tensors."""


def write_record(
    folder: Path, facts: Mapping[str, Any], fingerprint: str, hashes: Mapping[str, str]
) -> None:
    """Writes the record of a finished folder; `hashes` are those of its tensors.

    Raises StorageError if the disk refuses.
    """
    with writing(folder):
        files = {name: _hash(folder / name) for name in _others(folder)}
    document = {**facts, "fingerprint": fingerprint, "files": files, "tensors": dict(hashes)}
    write_json(folder / RECORD_NAME, document)


def amend_record(folder: Path, facts: Mapping[str, Any]) -> None:
    """Adds facts to a record that is there, or replaces those of the same names."""
    found = read_record(folder) or {}
    write_json(
        folder / RECORD_NAME, {**facts, **{k: v for k, v in found.items() if k not in facts}}
    )


def read_record(folder: Path) -> dict[str, Any] | None:
    """The record; None if the folder has none. Raises VerificationError if it is damaged."""
    path = folder / RECORD_NAME
    if not path.exists():
        return None
    record = read_json(path, VerificationError, limit=_LIMIT)
    for part in ("files", "tensors"):
        listed = record.get(part)
        if not isinstance(listed, dict) or not all(isinstance(h, str) for h in listed.values()):
            raise VerificationError(f"`{path}` is not what was written: it lists no {part}")
    return record


def changed_since(
    folder: Path, record: Mapping[str, Any], observe: Callable[[int, int], None] | None = None
) -> list[str]:
    """What is not as the record says, one line each: tensors and files lost, new or changed.

    Raises VerificationError if a weight file's header is damaged; OSError if a file is unreadable.
    """
    entries: dict[str, TensorEntry] = {}
    for shard in sorted(folder.glob("*.safetensors")):
        entries |= read_header(shard, VerificationError).entries
    total = sum(entry.spec.nbytes for entry in entries.values())
    tensors: dict[str, str] = {}
    done = 0
    for key, entry in entries.items():
        tensors[key] = hash_entry(entry)
        done += entry.spec.nbytes
        if observe is not None:
            observe(done, total)
    files = {name: _hash(folder / name) for name in _others(folder)}
    gone = record["files"].keys() - files.keys()
    problems = [f"file `{name}` is missing" for name in sorted(gone)]
    problems += [
        f"file `{name}` was changed since it was written"
        for name, digest in files.items()
        if record["files"].get(name, digest) != digest
    ]
    listed = record["tensors"]
    lost, new = listed.keys() - tensors.keys(), tensors.keys() - listed.keys()
    problems += [f"tensor `{key}` is missing" for key in sorted(lost)]
    problems += [f"tensor `{key}` was not there when the model was written" for key in sorted(new)]
    problems += [
        f"tensor `{key}` was changed since it was written"
        for key in sorted(tensors.keys() - new)
        if tensors[key] != listed[key]
    ]
    return problems


def _others(folder: Path) -> list[str]:
    """Every file that holds no tensors, relative to the folder; files of other kinds may join."""
    found = (file.relative_to(folder) for file in folder.rglob("*") if file.is_file())
    return sorted(
        path.as_posix()
        for path in found
        if path.suffix != ".safetensors" and path.name != RECORD_NAME
    )


def _hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
