"""Run and sweep folders as the candidates of a report; nothing is loaded, nothing is written."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from os.path import expanduser
from pathlib import Path
from typing import Any

from decal.errors import DecalError, OutputError
from decal.model.hub import near_path
from decal.report.candidate import Candidate
from decal.runfile import load_run
from decal.store.base import open_base
from decal.store.files import read_json
from decal.store.peft import CONFIG_NAME, peek_adapter
from decal.store.run import RunFolder
from decal.untrusted import may_be_path
from decal.verbs.spectrum import BaseNorms, spectrum

SWEEP = "sweep.json"
_STATES = ("done", "stopped", "failed", "waiting", "training")
_ABOUT = ("decal", "torch", "transformers", "device", "threads", "machine")


@dataclass(frozen=True, kw_only=True)
class Found:
    """The folders of a report, read."""

    candidates: list[Candidate]
    folders: dict[str, Path]
    """Candidate -> its run folder; a waiting one has none yet."""
    sweep: Path | None = None
    """The sweep folder they are all of."""
    grid: Mapping[str, Any] = field(default_factory=dict)


def candidates(paths: Sequence[str | Path], norms: BaseNorms | None = None) -> Found:
    """Reads run folders and sweep folders.

    Args:
        norms: of the bases; None leaves spectra out.

    Raises:
        DecalError: a folder that is neither, or is empty.
        OutputError, StorageError: info.json, sweep.json or metrics.jsonl is damaged.
    """
    if not paths:
        raise DecalError("no folder to report on", hint="decal report runs/tickets")
    entries: list[_Entry] = []
    sweeps = []
    for path in paths:
        folder = _folder(path)
        if (folder / SWEEP).exists():
            sweeps.append(folder)
            entries += _swept(folder)
        else:
            entries.append(_Entry(folder.resolve().name, folder))
    entries = _unambiguous(entries)
    alone = sweeps[0] if len(paths) == len(sweeps) == 1 else None
    return Found(
        candidates=[_candidate(entry, norms) for entry in entries],
        folders={entry.name: entry.folder for entry in entries if entry.folder.is_dir()},
        sweep=alone,
        grid=_grid(alone) if alone else {},
    )


@dataclass(frozen=True)
class _Entry:
    """One candidate: its name, its folder, and what a sweep says of it."""

    name: str
    folder: Path
    status: str | None = None
    why: str | None = None


def _folder(path: str | Path) -> Path:
    folder = Path(expanduser(path))
    if not folder.exists():
        near = near_path(str(path))
        raise DecalError(
            f"there is nothing at `{path}`", hint=f"did you mean `{near}`?" if near else None
        )
    if not folder.is_dir():
        raise DecalError(f"`{path}` is a file", hint="name the run's folder")
    if (folder / "run.yaml").is_file() or (folder / SWEEP).is_file():
        return folder
    if not any(folder.iterdir()):
        raise DecalError(f"`{path}` is empty", hint="name the `output` of a run")
    hint = "expected run.yaml or sweep.json in it"
    if (folder / CONFIG_NAME).exists():
        hint = f"`decal inspect {path} --spectrum` shows what an adapter learned"
    inner = sorted(f.parent for f in folder.glob("*/run.yaml"))
    if inner:
        hint = f"there are runs in it: `decal report {' '.join(map(str, inner[:3]))}`"
    raise DecalError(f"`{path}` is neither a run nor a sweep", hint=hint)


def _grid(folder: Path) -> Mapping[str, Any]:
    grid = read_json(folder / SWEEP, OutputError).get("grid")
    return grid if isinstance(grid, dict) else {}


def _swept(folder: Path) -> list[_Entry]:
    """The candidates of a sweep, in its order."""
    listed = read_json(folder / SWEEP, OutputError).get("candidates")
    if not isinstance(listed, list) or not listed:
        raise OutputError(f"`{folder / SWEEP}` lists no candidates")
    return [_swept_entry(folder, entry) for entry in listed]


def _swept_entry(folder: Path, entry: Any) -> _Entry:
    known = entry if isinstance(entry, dict) else {}
    name, status, why = (known.get(key) for key in ("name", "status", "why"))
    inside = isinstance(name, str) and may_be_path(name) and Path(name).name == name
    if not isinstance(name, str) or not inside or name == ".." or status not in _STATES:
        raise OutputError(f"`{folder / SWEEP}` holds a candidate that is none: {entry!r:.200}")
    return _Entry(name, folder / name, status, why if isinstance(why, str) else None)


def _unambiguous(entries: list[_Entry]) -> list[_Entry]:
    """Names made longer from the left where two folders have the same."""
    counts = Counter(entry.name for entry in entries)
    longer = [
        replace(entry, name=f"{entry.folder.resolve().parent.name}/{entry.name}")
        if counts[entry.name] > 1 else entry
        for entry in entries
    ]  # fmt: skip
    counts = Counter(entry.name for entry in longer)
    twice = next((entry for entry in longer if counts[entry.name] > 1), None)
    if twice is None:
        return longer
    folders = Counter(entry.folder.resolve() for entry in entries)
    if folders[twice.folder.resolve()] > 1:
        raise DecalError(f"`{twice.folder}` is named twice", hint="name each folder once")
    return [replace(e, name=str(e.folder)) if counts[e.name] > 1 else e for e in longer]


def _candidate(entry: _Entry, norms: BaseNorms | None) -> Candidate:
    folder = entry.folder
    if not (folder / "run.yaml").is_file():
        return Candidate(name=entry.name, status="waiting", why=entry.why)
    run = RunFolder.look(folder)
    info, faults = run.info(), []
    result, planned = (_mapping(info.get(name)) for name in ("result", "planned"))
    status = "done" if result else "unfinished"
    if entry.status in ("stopped", "failed"):
        status = entry.status
    try:
        settings = dict(_flat(load_run(folder / "run.yaml").model_dump(mode="json", by_alias=True)))
    except DecalError as error:
        settings = {}
        faults.append(f"its settings cannot be read: {error.message}")
    learned = None
    if norms is not None and (folder / "adapter").is_dir():
        try:
            learned = spectrum(folder / "adapter", norms=norms)
        except DecalError as error:
            faults.append(f"its adapter cannot be read: {error.message}")
    trainable, total, nbytes = _sizes(folder, result, settings)
    return Candidate(
        name=entry.name,
        status=status,
        why=entry.why,
        rows=[row for row in run.metrics() if "step" in row],
        settings=settings,
        steps=_count(info.get("steps")),
        result=result,
        planned=planned or None,
        trainable=trainable,
        total=total,
        nbytes=nbytes,
        learned=learned,
        data=_text(info.get("data")),
        base=_text(info.get("base_fingerprint")),
        about={name: info[name] for name in _ABOUT if name in info},
        faults=faults,
    )


def _sizes(
    folder: Path, result: Mapping[str, Any], settings: Mapping[str, Any]
) -> tuple[int | None, int | None, int | None]:
    """(trainable parameters, all parameters, bytes), from the result or from files' headers."""
    known = [_count(result.get(k)) for k in ("trainable_params", "total_params", "adapter_bytes")]
    trainable, total, nbytes = known
    try:
        if (folder / "adapter").is_dir():
            trainable = trainable or peek_adapter(folder / "adapter").parameters
            files = [f for f in (folder / "adapter").iterdir() if f.name.startswith("adapter_")]
            nbytes = nbytes or sum(file.stat().st_size for file in files)
        elif (folder / "model").is_dir():
            nbytes = nbytes or open_base(folder / "model").nbytes
    except DecalError:  # said where the adapter is read
        pass
    return trainable, total, nbytes


def _flat(value: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, inner in value.items():
        if isinstance(inner, Mapping) and inner:
            yield from _flat(inner, f"{prefix}{key}.")
        else:
            yield prefix + key, inner


def _mapping(value: object) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}


def _count(value: object) -> int | None:
    return value if type(value) is int and value > 0 else None


def _text(value: object) -> str | None:
    return value if isinstance(value, str) else None
