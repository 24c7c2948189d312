"""The folder of a base model: its config and its tensors, streamed from (sharded) safetensors.

Opening reads headers only, and checks them; a tensor is read when it is asked for. Where
model.safetensors and an index both exist the single file wins, as in transformers. Shard names come
from a downloaded file, so a name that would leave the folder is refused. (The files themselves may
be links: the hub's cache consists of them.)

Knows no architecture: keys are what the files say, and what they mean is for model/ to tell.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from torch import Tensor

from decal.errors import BaseModelError, first_of
from decal.store.files import read_json, writing
from decal.store.tensorfile import (
    HEADER_LIMIT,
    TensorEntry,
    TensorFile,
    load_tensor,
    read_header,
)
from decal.untrusted import may_be_path

__all__ = [
    "INDEX_NAME",
    "WEIGHTS_NAME",
    "BaseFiles",
    "copy_side_files",
    "open_base",
    "refuse_links",
    "side_files",
]

WEIGHTS_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"
_AGAIN = "the download was cut off or the file changed; get the base again"

_SIDE_FILES = (
    "tokenizer*", "*token*.json", "chat_template*", "generation_config.json", "vocab*",
    "merges.txt", "*.model", "*.tiktoken", "*preprocessor_config.json", "processor_config.json",
    "LICENSE*", "NOTICE*", "USE_POLICY*", "*.py",
)  # fmt: skip
_SIDE_FOLDERS = ("additional_chat_templates",)
_WEIGHTS = ("*.safetensors", "*.bin", "*.pt", "*.pth", "*.gguf", "*.index.json")


@dataclass(frozen=True, kw_only=True)
class BaseFiles:
    """An opened base: what is in which file, nothing of it in memory."""

    folder: Path
    config: dict[str, Any]
    """config.json as it stands."""
    tensors: dict[str, TensorEntry]
    """File key -> where it lies, over all shards, in the order of the shards."""
    shards: tuple[TensorFile, ...]
    """The files in sorted order; `sharded` tells whether an index lists them."""
    sharded: bool

    def read(self, key: str) -> Tensor:
        """The tensor of a file key in its stored dtype; read only (it may be a mapped page).

        Raises BaseModelError if there is no such key, or the file became unreadable.
        """
        entry = self.tensors.get(key)
        if entry is None:
            raise BaseModelError(f"base `{self.folder}` has no tensor `{key}`")
        try:
            return load_tensor(entry)
        except OSError as error:
            raise BaseModelError(f"`{entry.file}` cannot be read: {error.strerror}") from error

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(entry.spec.nbytes for entry in self.tensors.values())


def open_base(folder: str | Path) -> BaseFiles:
    """Opens a base model's folder and checks the header of every weight file.

    Raises:
        BaseModelError: no such folder, no config.json, no safetensors, a shard that is missing or
            damaged, an index that contradicts its shards, or a tensor that two shards hold.
    """
    place = Path(folder)
    if not place.is_dir():
        what = "is a file" if place.exists() else "does not exist"
        raise BaseModelError(
            f"base `{place}` {what}", hint="give a folder with config.json, or a hub id"
        )
    if not (place / "config.json").exists():
        adapter = (place / "adapter_config.json").exists()
        raise BaseModelError(
            f"base `{place}` has no config.json",
            hint="this is an adapter; its adapter_config.json names the base" if adapter else None,
        )
    config = read_json(place / "config.json", BaseModelError, hint=_AGAIN, nan=True)
    if (place / WEIGHTS_NAME).exists():
        listed, names = None, [WEIGHTS_NAME]
    else:
        listed = _weight_map(place)
        names = sorted(set(listed.values()))
        _all_there(place, names)
    shards = tuple(read_header(place / name, BaseModelError, hint=_AGAIN) for name in names)
    return BaseFiles(
        folder=place,
        config=config,
        tensors=_joined(place, shards, listed),
        shards=shards,
        sharded=listed is not None,
    )


def _weight_map(folder: Path) -> dict[str, str]:
    path = folder / INDEX_NAME
    if not path.exists():
        pickles = sorted(f.name for f in folder.glob("*.bin")) + sorted(
            f.name for f in folder.glob("*.pth")
        )
        hint = "load it with transformers and save it again: save_pretrained writes safetensors"
        raise BaseModelError(
            f"base `{folder}` has no safetensors weights"
            + (f", only `{pickles[0]}`" if pickles else ""),
            hint=hint if pickles else "give a folder with model.safetensors or its shards",
        )
    index = read_json(path, BaseModelError, hint=_AGAIN, limit=HEADER_LIMIT)
    listed = index.get("weight_map")
    if not isinstance(listed, dict) or not listed:
        raise BaseModelError(f"`{path}` has no weight_map", hint=_AGAIN)
    for key, name in listed.items():
        inside = isinstance(name, str) and name == Path(name).name and "\\" not in name
        if not inside or not name.endswith(".safetensors") or not may_be_path(name):
            raise BaseModelError(
                f"`{path}` puts tensor `{key}` into {name!r:.200}, which is no file of this folder"
            )
    return listed


def _all_there(folder: Path, names: list[str]) -> None:
    missing = [name for name in names if not (folder / name).exists()]
    if missing:
        raise BaseModelError(
            f"base `{folder}` lacks {len(missing)} of {len(names)} weight files",
            details=[first_of(missing)],
            hint="get the base again",
        )


def _joined(
    folder: Path, shards: tuple[TensorFile, ...], listed: dict[str, str] | None
) -> dict[str, TensorEntry]:
    tensors: dict[str, TensorEntry] = {}
    for shard in shards:
        for key, entry in shard.entries.items():
            if key in tensors:
                raise BaseModelError(
                    f"base `{folder}` holds tensor `{key}` twice",
                    details=[f"in {tensors[key].file.name} and in {shard.path.name}"],
                )
            tensors[key] = entry
    lost = [
        key
        for key, name in (listed or {}).items()
        if key not in tensors or tensors[key].file.name != name
    ]
    if lost:
        assert listed is not None
        raise BaseModelError(
            f"base `{folder}`: {len(lost)} of {len(listed)} tensors are not where its index says",
            details=[f"{lost[0]} is not in {listed[lost[0]]}"],
            hint=_AGAIN,
        )
    if not tensors:
        raise BaseModelError(f"base `{folder}` has no tensors", hint=_AGAIN)
    return tensors


def side_files(folder: Path) -> list[Path]:
    """What belongs to a model apart from config and weights: tokenizer, templates, licence, code.

    Paths relative to `folder`, sorted. Raises BaseModelError for links that lead out of it.
    """
    found = [
        Path(file.name)
        for file in folder.iterdir()
        if file.is_file()
        and any(fnmatch(file.name, pattern) for pattern in _SIDE_FILES)
        and not any(fnmatch(file.name, pattern) for pattern in _WEIGHTS)
    ]
    for name in _SIDE_FOLDERS:
        found += [f.relative_to(folder) for f in (folder / name).rglob("*") if f.is_file()]
    refuse_links(folder, found)
    return sorted(found)


def refuse_links(folder: Path, names: Iterable[Path | str]) -> None:
    """Raises BaseModelError if one of the files is a link that leads out of the folder.

    Such a file would be copied or uploaded with the model, and its sender may have meant your keys.
    In the hub's cache (models--x/snapshots/commit) links lead to its own blobs; that folder counts
    as a whole. A folder that is a link itself is where it leads.
    """
    place = folder.resolve()
    cached = place.parent.name == "snapshots" and place.parent.parent.name.startswith("models--")
    own = place.parent.parent if cached else place
    for name in names:
        target = (folder / name).resolve()
        if not target.is_relative_to(own):
            raise BaseModelError(
                f"`{folder / name}` is a link out of its folder, to `{target}`",
                hint="if it belongs to the model, put a copy of the file in the link's place",
            )


def copy_side_files(source: Path, target: Path) -> list[Path]:
    """Copies `side_files` of `source` into `target`, where files with other names stay.

    Returns the relative paths. Raises StorageError if the disk refuses.
    """
    names = side_files(source)
    with writing(target):
        for name in names:
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source / name, target / name)
    return names
