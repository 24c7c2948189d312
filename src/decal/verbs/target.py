"""What a path or hub id given by the user is: a run, an adapter or a model; and its base.

Reads settings and headers only; loads nothing.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from os.path import expanduser
from pathlib import Path
from typing import Any, Literal

from decal.config import DataConfig
from decal.errors import AdapterError, DecalError, OutputError
from decal.model.adapter import Adapter
from decal.model.hub import adapter_folder, may_be_on_hub, near_path, split_revision
from decal.runfile import load_run
from decal.untrusted import may_be_path, parse_json

QUANTIZER = "decal.quantizer"
BASE = "decal.base"
LABELS = "decal.labels"
CHAT_TEMPLATE = "decal.chat_template"
RUN = "decal.run"
_TEXTS = ("path", "revision", "commit", "dtype", "fingerprint", "format", "identity")
"""Entries of BASE and QUANTIZER that are text or null."""


@dataclass(frozen=True, kw_only=True)
class Target:
    """A path, understood.

    `path` is the folder that holds the weights: for a run its adapter folder or model folder, for
    an adapter on the hub its folder in the hub's cache. A model on the hub keeps its id.
    """

    kind: Literal["adapter", "model"]
    path: str
    run: Path | None = None
    revision: str | None = None
    """Branch, tag or commit of a model on the hub, where one was named."""


def resolve(path: str | Path) -> Target:
    """Says what `path` is. A name that is no folder is looked up on the hub, or in its cache.

    There the name may be `owner/name@revision`: a branch, a tag or a commit. An adapter's files are
    downloaded, a model's are not yet.

    Raises:
        DecalError: a folder that is none of the three, a run that has left no weights yet, or an
            id that the hub does not have or does not show.
    """
    folder = Path(expanduser(path))
    if not folder.exists():
        return _on_hub(str(path))
    if not folder.is_dir():
        raise DecalError(f"`{path}` is a file", hint="name the folder it lies in")
    if (folder / "run.yaml").exists():
        for kind, name in (("adapter", "adapter"), ("model", "model")):
            if (folder / name).is_dir():
                return Target(kind=kind, path=str(folder / name), run=folder)  # type: ignore[arg-type]
        raise OutputError(
            f"run `{path}` has not finished: it holds no adapter yet",
            hint=f"go on with `decal train {folder / 'run.yaml'} --resume`",
        )
    if (folder / "adapter_config.json").exists():
        return Target(kind="adapter", path=str(folder))
    if (folder / "config.json").exists():
        return Target(kind="model", path=str(folder))
    raise DecalError(
        f"`{path}` is neither a run, an adapter nor a model",
        hint="expected run.yaml, adapter_config.json or config.json in it",
    )


def _on_hub(path: str) -> Target:
    name, revision = split_revision(path)
    if not may_be_on_hub(name):
        near = near_path(path)
        raise DecalError(
            f"there is nothing at `{path}`",
            hint=f"did you mean `{near}`?" if near else "name a folder or a hub id",
        )
    folder = adapter_folder(name, revision)
    if folder is not None:
        return Target(kind="adapter", path=str(folder))
    return Target(kind="model", path=name, revision=revision)


def read(path: str | Path) -> tuple[Target, Adapter]:
    """Resolves `path` and reads the adapter there; AdapterError if it is a model."""
    target = resolve(path)
    if target.kind != "adapter":
        raise AdapterError(
            f"`{path}` is a model, not an adapter",
            hint="an adapter folder holds adapter_config.json and adapter_model.safetensors",
        )
    return target, replace(Adapter.from_pretrained(target.path), source=str(path))


def data_settings(target: Target) -> DataConfig | None:
    """How the run behind `target` read its rows; None where it is no run's folder.

    Raises:
        ConfigError: its run.yaml cannot be read.
    """
    return load_run(target.run / "run.yaml").data if target.run is not None else None


def base_of(adapter: Adapter, given: str | None = None) -> tuple[str, str | None]:
    """(path, revision) of the base: `given`, else the one written in the adapter.

    `given` may be `owner/name@revision`. The revision of the adapter's own base is the commit that
    training loaded, where that is recorded.
    """
    recorded = metadata_json(adapter, BASE) or {}
    path = adapter.base or recorded.get("path")
    if given is not None and given != path:
        return split_revision(given)
    if not path:
        raise AdapterError(
            "the adapter does not say which base it belongs to",
            hint="name the base: `decal merge BASE ADAPTER -o OUT`",
        )
    return path, recorded.get("commit") or adapter.revision


def metadata_json(adapter: Adapter, key: str) -> Any:
    """One of decal's own metadata entries; None where there is none.

    LABELS is a list of texts, BASE and QUANTIZER are mappings with texts where texts are meant.

    Raises:
        AdapterError: it is something else.
    """
    text = adapter.metadata.get(key)
    if text is None:
        return None
    try:
        value = parse_json(text)
    except ValueError as error:
        raise AdapterError(f"metadata `{key}` of the adapter is not JSON: {error}") from None
    if value is not None and not _meant(key, value):
        raise AdapterError(
            f"metadata `{key}` of the adapter is not what decal writes: {value!r:.200}"
        )
    return value


def _meant(key: str, value: object) -> bool:
    if key == LABELS:
        return isinstance(value, list) and all(isinstance(label, str) for label in value)
    if not isinstance(value, dict):
        return False
    path = value.get("path")
    texts = all(isinstance(value.get(field), str | None) for field in _TEXTS)
    return texts and (path is None or may_be_path(path))
