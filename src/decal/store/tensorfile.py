"""safetensors files: a header that is checked before it is believed, and writing in a stream.

Layout: 8 bytes little-endian length n, n bytes of JSON {name: {dtype, shape, data_offsets}}
(`__metadata__` holds strings), then the tensors' bytes without gaps. A damaged or hostile file can
claim any length or offset, so the header is bounded and every claim in it is held against the
file's size before a tensor is read or a buffer allocated.

The writer of the `safetensors` package needs all tensors in memory at once. Writing a merged model
must not, so the writer here takes names, dtypes and shapes first, writes the header, and then asks
for the bytes of one tensor after the other. Reading a tensor goes through `safetensors.safe_open`.

Knows nothing of base models or adapters.
"""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from decal.errors import DecalError, VerificationError
from decal.store.files import writing
from decal.untrusted import parse_json

__all__ = [
    "TORCH_DTYPES",
    "TensorEntry",
    "TensorFile",
    "TensorSpec",
    "dtype_name",
    "hash_entry",
    "load_tensor",
    "load_tensors",
    "raw_chunks",
    "read_header",
    "save_tensors",
    "tensor_bytes",
    "write_stream",
    "write_verified",
]

HEADER_LIMIT = 100_000_000
"""Longest header in bytes; the limit of the safetensors format itself."""
CHUNK = 16 << 20
"""Bytes read or copied at once."""

_MOST_DIMENSIONS = 64
"""What torch's operations take."""

_BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8,
    "F8_E5M2FNUZ": 8, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "U16": 16, "I16": 16, "F16": 16,
    "BF16": 16, "U32": 32, "I32": 32, "F32": 32, "U64": 64, "I64": 64, "F64": 64, "C64": 64,
}  # fmt: skip
TORCH_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""The dtypes that decal computes with or writes; others are only copied."""
_NAMES = {dtype: name for name, dtype in TORCH_DTYPES.items()}


class TensorSpec(NamedTuple):
    """What a header says of one tensor."""

    dtype: str
    """safetensors' name: F32, BF16, …"""
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor's data."""
        return math.prod(self.shape) * _BITS[self.dtype] // 8


@dataclass(frozen=True)
class TensorEntry:
    """One tensor in one file."""

    key: str
    file: Path
    spec: TensorSpec
    start: int
    """First byte of the data, from the beginning of the file."""


@dataclass(frozen=True)
class TensorFile:
    """A checked header."""

    path: Path
    entries: dict[str, TensorEntry]
    metadata: dict[str, str]


def dtype_name(dtype: torch.dtype) -> str:
    """safetensors' name of a torch dtype."""
    return _NAMES[dtype]


def read_header(path: Path, error: type[DecalError], *, hint: str | None = None) -> TensorFile:
    """Reads and checks the header of a safetensors file.

    Raises:
        error: the file is missing, cut off, or its header contradicts itself or the file's size;
            the message names the file and the reason, `hint` is passed on.
    """
    try:
        known = path.stat()
        if not stat.S_ISREG(known.st_mode) and not stat.S_ISDIR(known.st_mode):
            raise error(f"`{path}` is no regular file", hint=hint)
        size = known.st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > HEADER_LIMIT or 8 + length > size:
                reason = "it is empty" if size == 0 else _too_short(size, length)
                raise error(f"`{path}` is damaged: {reason}", hint=hint)
            raw = file.read(length)
    except OSError as problem:
        text = (problem.strerror or str(problem)).lower()
        raise error(f"`{path}` cannot be read: {text}", hint=hint) from problem
    except ValueError as problem:
        raise error(f"`{path}` cannot be the path of a file", hint=hint) from problem
    try:
        entries, metadata = _parse(path, raw, data_start=8 + length, size=size)
    except _HeaderError as problem:
        raise error(f"`{path}` is damaged: {problem}", hint=hint) from problem
    return TensorFile(path, entries, metadata)


class _HeaderError(Exception):
    """A claim of a header that does not hold."""


def _too_short(size: int, length: int) -> str:
    if size < 8:
        return f"{size} bytes are no safetensors file"
    return f"its header claims {length} bytes, the file has {size}"


def _parse(
    path: Path, raw: bytes, *, data_start: int, size: int
) -> tuple[dict[str, TensorEntry], dict[str, str]]:
    try:
        header = parse_json(raw, unique=True)
    except ValueError as problem:
        raise _HeaderError(f"its header is not JSON ({problem})") from problem
    if not isinstance(header, dict) or raw[:1] != b"{":
        raise _HeaderError("its header is no JSON object")
    metadata = header.pop("__metadata__", None)
    metadata = {} if metadata is None else metadata
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise _HeaderError("its __metadata__ is no table of strings")
    spans: list[tuple[int, int, str]] = []
    entries: dict[str, TensorEntry] = {}
    for key, value in header.items():
        spec, begin, end = _claim(key, value)
        spans.append((begin, end, key))
        entries[key] = TensorEntry(key, path, spec, data_start + begin)
    reached = 0
    for begin, end, key in sorted(spans):
        if begin != reached:
            what = "overlaps the tensor before it" if begin < reached else "leaves a gap before it"
            raise _HeaderError(f"tensor `{key}` {what}")
        reached = end
    if data_start + reached != size:
        expected = data_start + reached
        raise _HeaderError(f"its tensors need {expected} bytes, the file has {size}")
    return entries, metadata


def _claim(key: str, value: Any) -> tuple[TensorSpec, int, int]:
    try:
        dtype, shape, (begin, end) = value["dtype"], value["shape"], value["data_offsets"]
    except (KeyError, TypeError, ValueError) as problem:
        raise _HeaderError(f"tensor `{key}` lacks dtype, shape or offsets") from problem
    if not isinstance(dtype, str) or dtype not in _BITS:
        raise _HeaderError(f"tensor `{key}` has the unknown dtype {dtype!r:.60}")
    numbers = [*shape, begin, end] if isinstance(shape, list) else [None]
    if not all(type(n) is int and 0 <= n < 1 << 62 for n in numbers):
        raise _HeaderError(f"tensor `{key}` has a shape or offset that is no natural number")
    if len(shape) > _MOST_DIMENSIONS or math.prod(n or 1 for n in shape) >= 1 << 62:
        raise _HeaderError(f"tensor `{key}` has a shape that no tensor can have")
    bits = math.prod(shape) * _BITS[dtype]
    if bits % 8 or end - begin != bits // 8:
        raise _HeaderError(
            f"tensor `{key}` of shape {shape} in {dtype} needs {-(-bits // 8)} bytes, "
            f"its offsets say {end - begin}"
        )
    return TensorSpec(dtype, tuple(shape)), begin, end


def load_tensor(entry: TensorEntry) -> Tensor:
    """One tensor on the CPU, in its stored dtype; perhaps a view of the file's pages: read only.

    Raises OSError if the file is no longer what its header was.
    """
    with _opened(entry.file) as file:
        tensor: Tensor = file.get_tensor(entry.key)
    return tensor


def load_tensors(file: TensorFile) -> dict[str, Tensor]:
    """All tensors of one file, in memory of their own. Raises OSError like `load_tensor`."""
    with _opened(file.path) as handle:
        return {key: handle.get_tensor(key).clone() for key in file.entries}


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (SafetensorError, RuntimeError) as error:
        raise OSError(errno.EIO, f"the file changed while it was read ({error})", path) from error


def raw_chunks(entry: TensorEntry) -> Iterator[bytes]:
    """The tensor's bytes as they are stored, whatever the dtype."""
    left = entry.spec.nbytes
    with entry.file.open("rb", buffering=0) as file:
        file.seek(entry.start)
        while left:
            chunk = file.read(min(CHUNK, left))
            if not chunk:
                raise OSError(errno.EIO, "the file was cut off while it was read", entry.file)
            left -= len(chunk)
            yield chunk


def hash_entry(entry: TensorEntry) -> str:
    """sha256 of the tensor's stored bytes, as hex."""
    digest = hashlib.sha256()
    for chunk in raw_chunks(entry):
        digest.update(chunk)
    return digest.hexdigest()


def tensor_bytes(tensor: Tensor) -> memoryview:
    """A CPU tensor's bytes in row-major order, without a copy where it is contiguous."""
    flat = tensor.detach().contiguous().reshape(-1)
    array: Any = flat.view(torch.uint8).numpy()
    return memoryview(array) if flat.numel() else memoryview(b"")


def write_stream(
    path: Path,
    specs: Mapping[str, TensorSpec],
    chunks: Callable[[str], Iterable[bytes | memoryview]],
    metadata: Mapping[str, str],
) -> dict[str, str]:
    """Writes a new safetensors file and forces it to disk, holding one tensor's chunks at a time.

    `chunks(name)` is called once per name, in file order (wide dtypes first, so that every tensor
    starts aligned). Returns the sha256 of each tensor's bytes as they were handed over.

    Raises:
        StorageError: the disk refused.
        ValueError: `chunks` gave a number of bytes that is not the spec's.
    """
    order = sorted(specs, key=lambda name: (-_BITS[specs[name].dtype], name))
    digests: dict[str, str] = {}
    with writing(path), path.open("xb") as file:
        file.write(_header(order, specs, metadata))
        for name in order:
            digest, count = hashlib.sha256(), 0
            for chunk in chunks(name):
                digest.update(chunk)
                count += len(chunk)
                file.write(chunk)
            if count != specs[name].nbytes:
                raise ValueError(f"{name}: {count} bytes written, {specs[name].nbytes} announced")
            digests[name] = digest.hexdigest()
        file.flush()
        os.fsync(file.fileno())
        if hasattr(os, "posix_fadvise"):
            # A check that reads the file again should see the disk, not this process's pages.
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return digests


def write_verified(
    path: Path,
    specs: Mapping[str, TensorSpec],
    chunks: Callable[[str], Iterable[bytes | memoryview]],
    metadata: Mapping[str, str],
    verified: Callable[[int], None],
) -> dict[str, str]:
    """`write_stream`, and then the file is read again and held against what was meant.

    `verified` is told the bytes of each tensor that was read again.

    Raises:
        VerificationError: the file differs from what was written.
        Whatever `write_stream` raises.
    """
    meant = write_stream(path, specs, chunks, metadata)
    found = read_header(path, VerificationError)
    wrong = []
    for key, spec in specs.items():
        entry = found.entries.get(key)
        if entry is None or entry.spec != spec or hash_entry(entry) != meant[key]:
            wrong.append(key)
        verified(spec.nbytes)
    if wrong:
        raise VerificationError(
            f"{len(wrong)} of {len(specs)} tensors in {path.name} read back differ from what was "
            "written",
            details=wrong[:1],
            hint="the disk or its driver is faulty; write to another disk",
        )
    return meant


def _header(
    order: Sequence[str], specs: Mapping[str, TensorSpec], metadata: Mapping[str, str]
) -> bytes:
    table: dict[str, object] = {"__metadata__": dict(sorted(metadata.items()))}
    offset = 0
    for name in order:
        spec = specs[name]
        end = offset + spec.nbytes
        table[name] = {
            "dtype": spec.dtype, "shape": list(spec.shape), "data_offsets": [offset, end],
        }  # fmt: skip
        offset = end
    text = json.dumps(table, separators=(",", ":"), ensure_ascii=False).encode("utf-8")
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def save_tensors(
    path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]
) -> dict[str, str]:
    """`write_stream` of CPU tensors that are in memory already."""
    specs = {k: TensorSpec(dtype_name(t.dtype), tuple(t.shape)) for k, t in tensors.items()}
    return write_stream(path, specs, lambda name: [tensor_bytes(tensors[name])], metadata)
