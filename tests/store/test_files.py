"""Atomic files and folders: old content or new, never half, and errors a user can act on."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from decal.errors import ConfigError, OutputError, StorageError
from decal.store.files import (
    atomic_folder,
    check_free,
    file_lock,
    read_json,
    require_space,
    size_text,
    storage_error,
    write_bytes,
    write_json,
)


def test_size_text() -> None:
    assert [size_text(n) for n in (0, 999, 1500, 3_100_000, 14_200_000_000)] == [
        "0 B", "999 B", "1.5 kB", "3.1 MB", "14.2 GB",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("number", "kind", "word"),
    [
        (errno.ENOSPC, StorageError, "full"),
        (errno.EDQUOT, StorageError, "full"),
        (errno.EROFS, StorageError, "read-only"),
        (errno.EACCES, StorageError, "permission"),
        (errno.ENOENT, StorageError, "disappeared"),
        (errno.ENOTDIR, OutputError, "not a directory"),
        (errno.EIO, StorageError, "input/output"),
    ],
)
def test_what_a_disk_may_refuse(number: int, kind: type, word: str) -> None:
    error = storage_error(OSError(number, os.strerror(number)), "out/x")
    assert type(error) is kind
    assert word in error.message.lower()
    assert "out/x" in error.message


def test_a_failed_write_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "a.json"
    write_json(file, {"old": 1})

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StorageError, match="disk is full"):
        write_bytes(file, b"new")
    assert read_json(file, ConfigError) == {"old": 1}
    assert [f.name for f in tmp_path.iterdir()] == ["a.json"]


@pytest.mark.parametrize(
    ("content", "word"), [("", "empty"), ("{", "not valid JSON"), ("[]", "no JSON object")]
)
def test_damaged_json_names_the_file(tmp_path: Path, content: str, word: str) -> None:
    file = tmp_path / "config.json"
    file.write_text(content)
    with pytest.raises(ConfigError, match=word) as caught:
        read_json(file, ConfigError)
    assert str(file) in str(caught.value)


def test_missing_and_binary_json(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such file"):
        read_json(tmp_path / "config.json", ConfigError)
    (tmp_path / "config.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="not valid JSON"):
        read_json(tmp_path / "config.json", ConfigError)


def test_folder_appears_whole(tmp_path: Path) -> None:
    out = tmp_path / "deep" / "out"
    with atomic_folder(out) as folder:
        (folder / "a").write_text("1")
        assert not out.exists()
    assert [f.name for f in out.iterdir()] == ["a"]
    assert [f.name for f in out.parent.iterdir()] == ["out"]
    assert (out.stat().st_mode & 0o777) == (tmp_path / "deep").stat().st_mode & 0o777


@pytest.mark.parametrize("reason", [KeyboardInterrupt, ValueError])
def test_an_interrupted_folder_leaves_nothing(tmp_path: Path, reason: type[BaseException]) -> None:
    def write() -> None:
        with atomic_folder(tmp_path / "out") as folder:
            (folder / "a").write_text("1")
            raise reason

    with pytest.raises(reason):
        write()
    assert not list(tmp_path.iterdir())


def test_occupied_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    out.mkdir()
    with atomic_folder(out) as folder:  # an empty one is as good as none
        (folder / "mark").write_text("1")
    with pytest.raises(OutputError, match="not empty") as caught, atomic_folder(out):
        pass
    assert "--force" in str(caught.value.hint)
    with atomic_folder(out, force=True, marker="mark") as folder:
        (folder / "new").write_text("2")
    assert [f.name for f in out.iterdir()] == ["new"]
    with (
        pytest.raises(OutputError, match="would remove something else"),
        atomic_folder(out, force=True, marker="mark"),
    ):
        pass
    monkeypatch.chdir(out)
    with pytest.raises(OutputError, match="working directory"):
        check_free(tmp_path, force=True)
    with pytest.raises(OutputError, match="is a file"):
        check_free(out / "new", force=True)
    assert [f.name for f in tmp_path.iterdir()] == ["out"]


def test_a_failed_replacement_keeps_the_old_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "old").write_text("1")
    rename = os.rename

    def refusing(source: object, target: object) -> None:
        if str(target) == str(out) and not str(source).endswith("-old"):
            raise OSError(errno.EIO, "Input/output error")
        rename(source, target)

    monkeypatch.setattr(os, "rename", refusing)
    with pytest.raises(StorageError), atomic_folder(out, force=True) as folder:
        (folder / "new").write_text("2")
    assert [f.name for f in out.iterdir()] == ["old"]
    assert [f.name for f in tmp_path.iterdir()] == ["out"]


def test_a_killed_writer_is_cleaned_up_after_and_a_living_one_is_not(tmp_path: Path) -> None:
    out = tmp_path / "out"
    script = (
        "import sys, os, time\n"
        "from decal.store.files import atomic_folder\n"
        "with atomic_folder(sys.argv[1]) as folder:\n"
        "    (folder / 'half').write_text('x')\n"
        "    print('ready', flush=True)\n"
        "    time.sleep(60)\n"
    )
    writer = subprocess.Popen(
        [sys.executable, "-c", script, str(out)], stdout=subprocess.PIPE, text=True
    )
    assert writer.stdout is not None
    assert writer.stdout.readline() == "ready\n"
    with atomic_folder(out) as folder:
        (folder / "a").write_text("1")
    left = [f.name for f in tmp_path.iterdir() if f.name != "out"]
    assert len(left) == 1
    assert left[0].startswith(".out.decal-")
    writer.kill()
    writer.wait()
    writer.stdout.close()
    with atomic_folder(out, force=True) as folder:
        (folder / "b").write_text("1")
    assert [f.name for f in tmp_path.iterdir()] == ["out"]


def test_a_killed_writers_file_is_swept_and_a_living_ones_is_not(tmp_path: Path) -> None:
    """Fails when a temporary file stays for ever, or is taken from the process that writes it."""
    dead, living = tmp_path / ".a.json.decal-1234abcd", tmp_path / ".a.json.decal-5678abcd"
    other = tmp_path / ".b.json.decal-1234abcd"
    for path in (dead, living, other):
        path.write_text("half")
    with living.open("rb") as handle:
        assert file_lock(handle.fileno())
        write_json(tmp_path / "a.json", {"x": 1})
        left = {living.name, other.name, "a.json"}
        assert {f.name for f in tmp_path.iterdir()} == left
    write_json(tmp_path / "a.json", {"x": 2})
    assert {f.name for f in tmp_path.iterdir()} == {other.name, "a.json"}
    assert read_json(tmp_path / "a.json", ConfigError) == {"x": 2}


def test_a_folder_moved_aside_by_a_killed_replacement_comes_back(tmp_path: Path) -> None:
    aside = tmp_path / ".out.decal-1234abcd-old"
    aside.mkdir()
    (aside / "a").write_text("1")
    with pytest.raises(OutputError, match="not empty"), atomic_folder(tmp_path / "out"):
        pass
    assert (tmp_path / "out" / "a").read_text() == "1"


def test_errors_of_the_block(tmp_path: Path) -> None:
    """A failed write becomes a StorageError, an error about another file stays what it is."""
    with pytest.raises(StorageError, match="full"), atomic_folder(tmp_path / "a"):
        raise OSError(errno.ENOSPC, "No space left on device")
    with pytest.raises(StorageError, match="full"), atomic_folder(tmp_path / "b"):
        raise RuntimeError("I/O error: No space left on device (os error 28)")
    with pytest.raises(FileNotFoundError), atomic_folder(tmp_path / "c"):
        (tmp_path / "elsewhere").read_text()


def test_space_is_asked_for_first(tmp_path: Path) -> None:
    require_space(tmp_path / "not" / "there", 1)
    with pytest.raises(StorageError, match=r"needs 1000000\.0 TB"):
        require_space(tmp_path / "not" / "there", 10**18)


def test_a_really_full_disk(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(disk)], capture_output=True
    )
    if mounted.returncode:
        pytest.skip("mounting a small tmpfs is not permitted here")
    try:
        (disk / "mine").write_text("1")
        with (
            pytest.raises(StorageError, match="disk is full"),
            atomic_folder(disk / "out") as folder,
        ):
            (folder / "big").write_bytes(b"x" * 200_000)
        with pytest.raises(StorageError, match="disk is full"):
            write_bytes(disk / "mine", b"x" * 200_000)
        assert (disk / "mine").read_text() == "1"
        assert [f.name for f in disk.iterdir()] == ["mine"]
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        with pytest.raises(StorageError, match="read-only"):
            write_bytes(disk / "mine", b"2")
        with pytest.raises(StorageError, match="read-only"), atomic_folder(disk / "out"):
            pass
    finally:
        subprocess.run(["umount", str(disk)], check=True)
