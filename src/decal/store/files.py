"""Atomic files and folders, and what a disk may refuse.

Everything is written beside its destination, forced to disk, and renamed: a reader sees the old
content or the new one, never half of it, whenever the process dies. What a killed process leaves
behind is a hidden sibling; the next writer of the same destination removes it. A temporary file or
folder is held with `flock` while its owner lives, so a live one is never taken for a leftover (a
process id would not do: ids are reused, and differ between machines on a shared disk).

Knows no formats: not safetensors, not PEFT, not runs.
"""

from __future__ import annotations

import errno
import json
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from decal.errors import DecalError, OutputError, StorageError
from decal.untrusted import parse_json, read_bounded

try:
    import fcntl
except ImportError:  # not POSIX: no locks, everything else works
    fcntl = None  # type: ignore[assignment]

__all__ = [
    "JSON_LIMIT",
    "atomic_folder",
    "check_free",
    "file_lock",
    "fsync_folder",
    "is_leftover",
    "read_json",
    "require_space",
    "scratch_folder",
    "size_text",
    "storage_error",
    "sweep",
    "write_bytes",
    "write_json",
    "write_text",
    "writing",
]

JSON_LIMIT = 16 << 20
"""Bytes of a JSON file that is read whole; thirty times that is the most it takes in memory."""

_HIDDEN = re.compile(r"\.(?P<name>.+)\.decal-[0-9a-f]{8}(?P<old>-old)?")
_FULL = {errno.ENOSPC, errno.EDQUOT}
_NO_LOCKS = {errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS}
_NOT_A_FOLDER = {errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG, errno.EEXIST, errno.ELOOP}


def size_text(count: int) -> str:
    """A number of bytes in the unit a person would choose: `512 B`, `3.1 MB`, `14.2 GB`."""
    size = float(count)
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{count} B" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} TB"


def storage_error(error: OSError, path: str | os.PathLike[str]) -> DecalError:
    """The user's error for an OSError met while writing `path`."""
    where = os.fspath(path)
    if error.errno in _FULL:
        return StorageError(
            f"the disk is full: `{where}` could not be written",
            hint="free some space or choose another disk; nothing is left half written",
        )
    if error.errno == errno.EROFS:
        return StorageError(
            f"`{where}` is on a read-only disk", hint="choose an output on a writable disk"
        )
    if error.errno in (errno.EACCES, errno.EPERM):
        return StorageError(
            f"no permission to write `{where}`",
            hint="choose another output or change the folder's permissions",
        )
    if error.errno == errno.ENOENT:
        return StorageError(
            f"`{where}` disappeared while it was written", hint="another process removed its folder"
        )
    if error.errno in _NOT_A_FOLDER:
        reason = os.strerror(error.errno or 0).lower()
        return OutputError(f"`{where}` cannot be an output: {reason}", hint="choose another path")
    return StorageError(f"`{where}` could not be written: {error.strerror or error}")


@contextmanager
def writing(path: str | os.PathLike[str]) -> Iterator[None]:
    """Turns an OSError inside the block into the error of `storage_error`."""
    try:
        yield
    except OSError as error:
        raise storage_error(error, path) from error


def read_json(
    path: Path,
    error: type[DecalError],
    *,
    hint: str | None = None,
    limit: int = JSON_LIMIT,
    nan: bool = False,
) -> dict[str, Any]:
    """The JSON object in `path`; raises `error`, naming the file, for anything else.

    `limit` bounds its bytes; `nan` takes NaN and Infinity, which configs of some models hold.
    """
    raw = None
    try:
        raw = read_bounded(path, limit)
        value = parse_json(raw, nan=nan)
    except OSError as problem:
        reason = problem.strerror or str(problem)
        raise error(f"`{path}` cannot be read: {reason.lower()}", hint=hint) from problem
    except ValueError as problem:
        reason = str(problem) if raw is None else f"it is not valid JSON ({problem})"
        reason = "it is empty" if raw == b"" else reason
        raise error(f"`{path}` cannot be read: {reason}", hint=hint) from problem
    if not isinstance(value, dict):
        raise error(f"`{path}` cannot be read: it holds no JSON object", hint=hint)
    return value


def write_bytes(path: Path, data: bytes) -> None:
    """Replaces `path` by a file with `data`, atomically; raises StorageError or OutputError."""
    with writing(path):
        sweep(path.parent, path.name)
        temporary, handle = _hidden_sibling(path, _new_file)
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            with suppress(OSError):
                temporary.unlink()
            raise
        fsync_folder(path.parent)


def write_text(path: Path, text: str) -> None:
    """`write_bytes` of UTF-8 text."""
    write_bytes(path, text.encode("utf-8"))


def write_json(path: Path, value: object, *, nan: bool = False) -> None:
    """`write_bytes` of an indented JSON document; NaN and infinity only with `nan` (ValueError)."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=nan) + "\n")


def fsync_folder(folder: Path) -> None:
    """Forces a folder's entries to disk, where the system can do that."""
    with suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def require_space(out: Path, needed: int) -> None:
    """Raises StorageError unless the disk under `out` has `needed` bytes free."""
    place = out.absolute()
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    if free < needed:
        raise StorageError(
            f"`{out}` needs {size_text(needed)}, its disk has {size_text(free)} free",
            hint="free some space or choose an output on another disk",
        )


def check_free(
    out: Path, *, force: bool, marker: str | None = None, hint: str | None = None
) -> None:
    """Raises OutputError if `out` is a file, or a non-empty folder and `force` is off.

    Replacing a folder removes all of it. So with `force` it must hold the file `marker`, by which
    an output of this kind is known, and it must not be the home folder or hold the working
    directory.
    """
    if not out.exists():
        return
    if not out.is_dir():
        raise OutputError(f"`{out}` is a file, not a folder", hint="choose another output")
    with writing(out):
        occupied = any(out.iterdir())
    if not occupied:
        return
    if not force:
        hint = hint or "choose another output, or replace it with --force"
        raise OutputError(f"`{out}` exists and is not empty", hint=hint)
    if marker is not None and not (out / marker).exists():
        raise OutputError(
            f"`{out}` is not empty and has no {marker}: --force would remove something else",
            hint="choose another output",
        )
    place = out.resolve()
    if place in (Path.home().resolve(), Path.cwd(), *Path.cwd().parents):
        raise OutputError(
            f"`{out}` is the home folder or holds the working directory: never replaced",
            hint="choose another output",
        )


def file_lock(handle: int) -> bool:
    """Takes an exclusive lock on an open file or folder; False if another process holds it.

    The lock ends with the process that holds it, however that ends. Where the disk knows no locks
    (some network disks), it is taken as free.
    """
    if fcntl is None:
        return True
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno in _NO_LOCKS
    return True


@contextmanager
def atomic_folder(
    out: str | os.PathLike[str], *, force: bool = False, marker: str | None = None
) -> Iterator[Path]:
    """Yields an empty hidden folder beside `out` that becomes `out` when the block ends well.

    On any exception, Ctrl-C included, the hidden folder is removed and `out` is as it was. With
    `force`, a non-empty `out` that holds the file `marker` is replaced as a whole.

    Raises:
        OutputError: `out` may not be written (`check_free`).
        StorageError: the disk refused; OSErrors of the block about the new folder included.
    """
    target = Path(os.path.realpath(out))
    with scratch_folder(target) as temporary:
        check_free(Path(out), force=force, marker=marker)
        yield temporary
        _sync_tree(temporary)
        _put_in_place(temporary, target)


@contextmanager
def scratch_folder(target: Path) -> Iterator[Path]:
    """Yields an empty hidden folder on `target`'s disk, beside it; it is gone after the block.

    What dead writers of `target` left is removed first. OSErrors of the block about the folder
    become the errors of `storage_error`.
    """
    with writing(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        sweep(target.parent, target.name)
        temporary, handle = _hidden_sibling(target, _new_folder)
    try:
        yield temporary
    except BaseException as error:
        mapped = _about(error, temporary, target)
        if mapped is error:
            raise
        raise mapped from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        if handle >= 0:
            os.close(handle)


def _hidden_sibling(target: Path, make: Callable[[Path], int]) -> tuple[Path, int]:
    """A new hidden file or folder beside `target` and its handle, which holds the lock."""
    while True:
        path = target.with_name(f".{target.name}.decal-{secrets.token_hex(4)}")
        # A sweep of another process may come between making and locking; then take a new name.
        with suppress(FileNotFoundError):
            handle = make(path)
            if handle < 0 or (file_lock(handle) and path.exists()):
                return path, handle
            os.close(handle)


def _new_folder(path: Path) -> int:
    path.mkdir()
    return os.open(path, os.O_RDONLY) if os.name == "posix" else -1


def _new_file(path: Path) -> int:
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0)
    return os.open(path, flags, 0o666)


def is_leftover(name: str) -> bool:
    """Whether a file or folder of this name is a temporary one, of a living writer or a dead."""
    return _HIDDEN.fullmatch(name) is not None


def sweep(parent: Path, name: str | None = None) -> None:
    """Removes what dead writers of `parent/name`, or of anything in `parent`, left behind.

    A folder that a replacement had moved aside and not yet replaced is put back.
    """
    if os.name != "posix":
        return
    for path in list(parent.iterdir()):
        found = _HIDDEN.fullmatch(path.name)
        if not found or name not in (None, found["name"]):
            continue
        try:
            handle = os.open(path, os.O_RDONLY)
        except OSError:  # its writer was quicker, or it is another user's
            continue
        try:
            if not file_lock(handle):
                continue
            target = parent / found["name"]
            if found["old"] and not target.exists():
                os.rename(path, target)
            elif path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)
        finally:
            os.close(handle)


def _sync_tree(folder: Path) -> None:
    for root, _, names in os.walk(folder):
        for name in names:
            with open(os.path.join(root, name), "rb") as file:
                os.fsync(file.fileno())
        fsync_folder(Path(root))


def _put_in_place(temporary: Path, target: Path) -> None:
    if target.exists() and any(target.iterdir()):
        old = temporary.with_name(temporary.name + "-old")
        os.rename(target, old)
        try:
            os.rename(temporary, target)
        except OSError:
            os.rename(old, target)
            raise
        shutil.rmtree(old, ignore_errors=True)
    else:
        os.replace(temporary, target)
    fsync_folder(target.parent)


def _about(error: BaseException, temporary: Path, out: str | os.PathLike[str]) -> BaseException:
    """The user's error if the block failed to write, else the error itself.

    An OSError without a file name comes from a write; one about another file is a reader's, and
    readers name their own files. Rust's writers (safetensors, tokenizers) raise no OSError, but
    their message ends in the system's number.
    """
    if isinstance(error, OSError):
        name = error.filename
        if name is None or str(name).startswith(str(temporary)):
            return storage_error(error, out)
    elif isinstance(error, Exception) and not isinstance(error, DecalError):
        found = re.search(r"\(os error (\d+)\)", str(error))
        if found:
            number = int(found[1])
            return storage_error(OSError(number, os.strerror(number)), out)
    return error
