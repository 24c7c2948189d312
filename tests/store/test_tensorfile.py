"""Headers are not believed until they are checked; the streaming writer writes safetensors."""

from __future__ import annotations

import errno
import hashlib
import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from decal.errors import BaseModelError, StorageError
from decal.store.tensorfile import (
    TensorSpec,
    hash_entry,
    load_tensor,
    load_tensors,
    raw_chunks,
    read_header,
    save_tensors,
    write_stream,
)


def _mixed() -> dict[str, torch.Tensor]:
    return {
        "b": torch.randn(3, 5).bfloat16(),
        "a": torch.randn(7),
        "scalar": torch.tensor(3.5),
        "empty": torch.empty(0, 4),
        "bytes": torch.arange(9, dtype=torch.uint8),
        "flags": torch.tensor([True, False, True]),
        "strided": torch.randn(4, 6).half().T,
        "ids": torch.arange(5),
    }


def test_what_is_written_is_what_safetensors_reads(tmp_path: Path) -> None:
    """Fails if tensors are written in another order than the header's."""
    file, tensors = tmp_path / "x.safetensors", _mixed()
    hashes = save_tensors(file, tensors, {"format": "pt", "decal.x": "ü"})
    theirs = load_file(file)
    assert theirs.keys() == tensors.keys()
    for key, tensor in tensors.items():
        assert theirs[key].dtype == tensor.dtype
        assert torch.equal(theirs[key], tensor)
    with safe_open(file, framework="pt") as handle:
        assert handle.metadata() == {"format": "pt", "decal.x": "ü"}
    read = read_header(file, BaseModelError)
    assert {k: hash_entry(e) for k, e in read.entries.items()} == hashes
    assert all(torch.equal(t, tensors[k]) for k, t in load_tensors(read).items())
    for entry in read.entries.values():
        assert entry.start % 8 == 0 or entry.spec.dtype not in ("I64", "F64")


def test_files_of_safetensors_are_read(tmp_path: Path) -> None:
    tensors = {k: t.contiguous() for k, t in _mixed().items()}
    save_file(tensors, tmp_path / "x.safetensors")
    read = read_header(tmp_path / "x.safetensors", BaseModelError)
    for key, tensor in tensors.items():
        entry = read.entries[key]
        assert torch.equal(load_tensor(entry), tensor)
        assert b"".join(raw_chunks(entry)) == tensor.reshape(-1).view(torch.uint8).numpy().tobytes()
        assert (
            hash_entry(entry)
            == hashlib.sha256(tensor.reshape(-1).view(torch.uint8).numpy().tobytes()).hexdigest()
        )


def test_a_stream_that_gives_too_little_is_a_bug(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="4 bytes written, 8 announced"):
        write_stream(
            tmp_path / "x", {"a": TensorSpec("F32", (2,))}, lambda _: [b"abcd"], {"format": "pt"}
        )


def _file(path: Path, header: Any, data: bytes = b"", length: int | None = None) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + data)
    return path


def _one(**changes: Any) -> dict[str, Any]:
    return {"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8], **changes}}


def _twice() -> bytes:
    inner = json.dumps(_one()).encode()[1:-1]
    return b"{" + inner + b"," + inner + b"}"


BROKEN = {
    "header longer than the file": (_one(), b"", 1 << 40),
    "header beyond the limit": (_one(), b"", (1 << 64) - 1),
    "not JSON": (b"{oops", b"", None),
    "deeply nested": (b"[" * 100_000, b"", None),
    "not an object": ([1], b"", None),
    "truncated data": (_one(), b"1234567", None),
    "more data than tensors": (_one(), b"123456789", None),
    "offsets beyond the file": (_one(shape=[1 << 40], data_offsets=[0, 1 << 42]), b"", None),
    "length does not fit the shape": (_one(shape=[3]), b"12345678", None),
    "negative shape": (_one(shape=[-2]), b"12345678", None),
    "negative offsets": (_one(data_offsets=[-8, 0]), b"12345678", None),
    "reversed offsets": (_one(data_offsets=[8, 0]), b"12345678", None),
    "float shape": (_one(shape=[2.0]), b"12345678", None),
    "bool shape": (_one(shape=[True, 2]), b"12345678", None),
    "overflowing shape": (_one(shape=[1 << 61, 1 << 61, 0], data_offsets=[0, 8]), b"1" * 8, None),
    "unknown dtype": (_one(dtype="F31"), b"12345678", None),
    "unhashable dtype": (_one(dtype=["F32"]), b"12345678", None),
    "no offsets": ({"a": {"dtype": "F32", "shape": [2]}}, b"12345678", None),
    "not a table": ({"a": 3}, b"12345678", None),
    "metadata is no table": ({"__metadata__": [1], **_one()}, b"12345678", None),
    "metadata of numbers": ({"__metadata__": {"a": 1}, **_one()}, b"12345678", None),
    "one tensor given twice": (_twice(), b"12345678", None),
    "one entry given twice": (
        b'{"a":{"dtype":"F32","dtype":"F32","shape":[2],"data_offsets":[0,8]}}',
        b"12345678",
        None,
    ),
    "minus zero": (b'{"a":{"dtype":"F32","shape":[-0],"data_offsets":[0,0]}}', b"", None),
    "a number of 5000 digits": (
        b'{"a":{"dtype":"F32","shape":[' + b"9" * 5000 + b'],"data_offsets":[0,8]}}',
        b"12345678",
        None,
    ),
    "more dimensions than torch has": (_one(shape=[1] * 65 + [2]), b"12345678", None),
    "overflowing shape of nothing": (
        _one(shape=[1 << 61, 1 << 61, 0], data_offsets=[0, 0]),
        b"",
        None,
    ),
    "UTF-16": (json.dumps(_one()).encode("utf-16-le"), b"12345678", None),
    "a byte order mark": (b"\xef\xbb\xbf" + json.dumps(_one()).encode(), b"12345678", None),
    "half a surrogate pair": (
        b'{"\\ud800":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}',
        b"12345678",
        None,
    ),
    "three offsets": (_one(data_offsets=[0, 8, 8]), b"12345678", None),
    "half a byte": (_one(dtype="F4", shape=[3], data_offsets=[0, 1]), b"1", None),
    "metadata of null": ({"__metadata__": {"a": None}, **_one()}, b"12345678", None),
    "an empty tensor inside of another": (
        {**_one(), "b": {"dtype": "F32", "shape": [0], "data_offsets": [4, 4]}},
        b"12345678",
        None,
    ),
    "overlap": (
        {**_one(), "b": {"dtype": "F32", "shape": [2], "data_offsets": [4, 12]}},
        b"x" * 12,
        None,
    ),
    "gap": (
        {**_one(), "b": {"dtype": "F32", "shape": [1], "data_offsets": [12, 16]}},
        b"x" * 16,
        None,
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_headers_are_refused_by_name(tmp_path: Path, case: str) -> None:
    header, data, length = BROKEN[case]
    file = _file(tmp_path / "bad.safetensors", header, data, length)
    with pytest.raises(BaseModelError, match=r"bad\.safetensors` is damaged") as caught:
        read_header(file, BaseModelError, hint="get it again")
    assert caught.value.hint == "get it again"


TAKEN_THERE = {"one tensor given twice", "more dimensions than torch has"}
"""What the safetensors library reads nevertheless: it takes one of the two, and makes a tensor that
torch cannot compute with."""


@pytest.mark.parametrize("case", BROKEN)
def test_what_is_refused_here_is_refused_there(tmp_path: Path, case: str) -> None:
    """Fails when a header is called broken that is not."""
    header, data, length = BROKEN[case]
    file = _file(tmp_path / "bad.safetensors", header, data, length)
    try:
        with safe_open(file, framework="pt") as theirs:
            for key in theirs.keys():  # noqa: SIM118 (a handle, not a mapping)
                theirs.get_tensor(key)
    except (SafetensorError, OSError):
        assert case not in TAKEN_THERE
    else:
        assert case in TAKEN_THERE


def test_empty_short_and_missing_files(tmp_path: Path) -> None:
    file = tmp_path / "x.safetensors"
    with pytest.raises(BaseModelError, match="no such file"):
        read_header(file, BaseModelError)
    file.write_bytes(b"")
    with pytest.raises(BaseModelError, match="it is empty"):
        read_header(file, BaseModelError)
    file.write_bytes(b"abc")
    with pytest.raises(BaseModelError, match="3 bytes are no safetensors file"):
        read_header(file, BaseModelError)
    with pytest.raises(BaseModelError, match="is a directory"):
        read_header(tmp_path, BaseModelError)


def test_every_truncation_is_noticed(tmp_path: Path) -> None:
    """Fails if the end of the data is not held against the file's size."""
    file = tmp_path / "x.safetensors"
    save_tensors(file, {"a": torch.randn(3, 3), "b": torch.randn(5)}, {"format": "pt"})
    whole = file.read_bytes()
    for size in range(0, len(whole), 3):
        file.write_bytes(whole[:size])
        with pytest.raises(BaseModelError):
            read_header(file, BaseModelError)


def test_a_full_disk_is_the_users_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Full(io.BytesIO):
        def write(self, data: Any) -> int:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "open", lambda *_, **__: Full())
    with pytest.raises(StorageError, match="disk is full"):
        save_tensors(tmp_path / "x", {"a": torch.ones(2)}, {"format": "pt"})
