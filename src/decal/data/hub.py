"""Hub data sets and folders of data -> raw rows, through `datasets`. Knows no layouts.

A folder is what `save_to_disk` wrote, or a folder with data files, one or several for each split.
Without a network `datasets` would ask the hub again and again for half a minute: here it is asked
once, shortly, and if it does not answer only the cache is looked into, as with HF_HUB_OFFLINE=1.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from itertools import islice
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from decal.config import DataConfig
from decal.data.order import SHUFFLE_STREAM, permutation
from decal.data.readers import RawRow, plain_row
from decal.errors import DataError, nearest
from decal.untrusted import parse_json, read_bounded

SHUFFLE_BUFFER = 10_000
"""Rows held to shuffle a stream: it is shuffled only as far as that reaches."""

_CARD, _SPLITS = "README.md", ".huggingface.yaml"
"""Files in which a folder may say which of its files are which split."""
_DESCRIPTION_LIMIT = 4 << 20
_FRONT = re.compile(r"\s*---(?:\r\n|\r|\n)(.*?)(?:\r\n|\r|\n)---[ \t]*(?:\r\n|\n|\Z)", re.DOTALL)
_LISTS = ("configs", "splits", "_data_files")
_FAR = re.compile(r"^[/~\\]|^[A-Za-z]:|://|::|(^|[/\\])\.\.([/\\]|$)")
"""An absolute path, an address, or a way up."""

ANSWER_SECONDS = 5.0
"""How long the hub is waited for."""


def data_set_rows(settings: DataConfig, seed: int) -> Iterator[RawRow]:
    """The rows of the hub data set or folder at `settings.path`, shuffled and limited.

    A row's number is its place in the split, from 1; in a shuffled stream its place in that.

    Raises:
        DataError: it cannot be reached, or has no such configuration or split.
    """
    try:
        yield from _numbered(settings, seed)
    except DataError:
        raise
    except Exception as error:  # while rows are read: of datasets, of pyarrow, of the network
        raise _failure(settings, error, local=Path(settings.path).is_dir()) from error


def _numbered(settings: DataConfig, seed: int) -> Iterator[RawRow]:
    rows = _load(settings)
    limit = settings.limit
    classes = _classes(rows)
    if hasattr(rows, "select"):
        count = len(rows)
        order = permutation(count, seed, SHUFFLE_STREAM) if settings.shuffle else range(count)
        for place in islice(map(int, order), limit):
            yield place + 1, plain_row(rows[place], classes)
    else:
        if settings.shuffle:
            rows = rows.shuffle(seed=seed, buffer_size=SHUFFLE_BUFFER)
        for number, row in enumerate(islice(rows, limit), start=1):
            yield number, plain_row(row, classes)


def _classes(rows: Any) -> dict[str, list[str]]:
    """Names of the classes of each column that holds class labels."""
    features = getattr(rows, "features", None) or {}
    return {c: list(f.names) for c, f in features.items() if type(f).__name__ == "ClassLabel"}


def _load(settings: DataConfig) -> Any:
    import datasets

    folder = Path(settings.path)
    local = folder.is_dir()
    if local:
        _refuse_far_files(folder)
    if (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file():
        return _saved(settings)
    try:
        with nullcontext() if local else _shortly(settings.path):
            return datasets.load_dataset(
                settings.path,
                name=settings.name,
                split=settings.split,
                streaming=settings.streaming,
            )
    except DataError:
        raise
    except Exception as error:
        raise _failure(settings, error, local=local) from error


def _refuse_far_files(folder: Path) -> None:
    """What describes a folder's splits may name files in it only.

    `datasets` would also read other files of this disk, and fetch addresses: nobody asked for that
    who named a folder.

    Raises:
        DataError: a description names anything else, or cannot be read.
    """
    for path in (folder / _CARD, folder / _SPLITS, *_states(folder)):
        if not path.is_file():
            continue
        try:
            described = _description(path)
        except (OSError, ValueError, YAMLError, RecursionError) as error:
            reason = next(iter(str(error).splitlines()), "")
            raise DataError(f"`{path}` cannot be read: {reason}") from error
        listed = [described.get(key) for key in _LISTS] if isinstance(described, dict) else None
        far = next((text for text in _texts(listed) if _FAR.search(text)), None)
        if far is not None:
            raise DataError(
                f"`{path}` names data outside of its folder: {far!r:.200}",
                hint="correct it, or name the file itself in data.path",
            )


def _states(folder: Path) -> Iterator[Path]:
    yield from (folder / name for name in ("dataset_dict.json", "state.json"))
    yield from folder.glob("*/state.json")


def _description(path: Path) -> object:
    text = read_bounded(path, _DESCRIPTION_LIMIT).decode("utf-8-sig")
    if path.suffix == ".json":
        return parse_json(text)
    block = _FRONT.match(text) if path.name == _CARD else None
    if path.name == _CARD and block is None:
        return None
    return YAML(typ="safe", pure=True).load(block[1] if block else text)


def _texts(value: object) -> Iterator[str]:
    """All texts in a YAML value; each part of it once, however often it is named."""
    waiting, seen = [value], set()
    while waiting:
        now = waiting.pop()
        if isinstance(now, str):
            yield now
        elif isinstance(now, dict | list) and id(now) not in seen:
            seen.add(id(now))
            waiting += now.values() if isinstance(now, dict) else now


def _saved(settings: DataConfig) -> Any:
    """What `save_to_disk` wrote: a split, or a folder of splits."""
    import datasets

    try:
        saved = datasets.load_from_disk(settings.path)
    except Exception as error:
        raise _failure(settings, error, local=True) from error
    if not isinstance(saved, dict):
        if settings.split != "train":
            raise DataError(
                f"`{settings.path}` is one saved data set, and has no split `{settings.split}`",
                hint="leave out `data.split`",
            )
        return saved
    if settings.split not in saved:
        raise _no_such("split", settings, list(saved))
    return saved[settings.split]


def _failure(settings: DataConfig, error: Exception, *, local: bool) -> DataError:
    """The error of `datasets` as ours: what is there is listed where something else was asked."""
    text = str(error)
    named = re.findall(r"'([^']+)'", text[text.find("[") + 1 : text.rfind("]")])
    if named and re.search(r"[Uu]nknown split|Bad split", text):
        return _no_such("split", settings, named)
    if named and "BuilderConfig" in text:
        return _no_such("name", settings, named)
    if named and "Config name is missing" in text:
        return DataError(
            f"the data set `{settings.path}` has several configurations: {', '.join(named)}",
            hint=f"choose one with `data.name: {named[0]}`",
        )
    first_line = next(iter(text.splitlines()), "")
    if local:
        what, hint = "folder", "a folder holds files such as train.jsonl and test.jsonl"
    else:
        what = "hub data set"
        hint = (
            f"there is no local file `{settings.path}` either; check the name and the network "
            "connection (with HF_HUB_OFFLINE=1 only the cache is used, without waiting)"
        )
    return DataError(
        f"split `{settings.split}` of the {what} `{settings.path}` cannot be loaded",
        details=[f"{type(error).__name__}: {first_line}"],
        hint=hint,
    )


def _no_such(setting: str, settings: DataConfig, known: list[str]) -> DataError:
    given = getattr(settings, setting)
    what = "split" if setting == "split" else "configuration"
    near = nearest(given, known) or (known[0] if len(known) == 1 else None)
    return DataError(
        f"the data set `{settings.path}` has no {what} `{given}`: it has {', '.join(known)}",
        hint=f"did you mean `data.{setting}: {near}`?" if near else f"set `data.{setting}`",
    )


def _shortly(path: str) -> AbstractContextManager[None]:
    """Asks the hub for a data set once; offline mode as context if it does not answer.

    Raises:
        DataError: the hub answers that there is no such data set, or that it is gated.
    """
    from huggingface_hub import HfApi, constants, errors

    if constants.HF_HUB_OFFLINE:
        return nullcontext()
    try:
        HfApi().dataset_info(path, timeout=ANSWER_SECONDS)
    except errors.GatedRepoError as error:
        raise DataError(
            f"the hub data set `{path}` is gated",
            hint="ask for access on its page, then log in: hf auth login",
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise DataError(
            f"there is no hub data set `{path}`, and no local file either",
            hint="check the name; a private one needs a login: hf auth login",
        ) from error
    except errors.HfHubHTTPError:
        return nullcontext()
    except Exception:  # a refused or slow connection: the client's classes differ by its version
        return _cache_only()
    return nullcontext()


@contextmanager
def _cache_only() -> Iterator[None]:
    """`datasets` and the hub's client as if HF_HUB_OFFLINE=1 had been set."""
    import datasets
    from huggingface_hub import constants

    before = constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE = before
