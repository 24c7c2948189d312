"""`decal verify`: whether an adapter, a model or a run is still what was written.

Everything is asked of what is stored: headers, numbers, hashes, the facts that travel with an
adapter, the record that lies in a merged folder. Nothing is trained and no model is built but its
names. A check that cannot be made, because the base is not here or nothing was recorded, is listed
as such; only a check that was made and failed is a problem.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from os.path import expanduser
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from decal.errors import DecalError, first_of
from decal.model.adapter import Adapter
from decal.model.hf import local_folder
from decal.quant.bnb import describe_quantization
from decal.runfile import load_run
from decal.store.base import BaseFiles, open_base
from decal.store.record import RECORD_NAME, changed_since, read_record
from decal.store.run import RunFolder
from decal.store.tensorfile import TORCH_DTYPES, load_tensor
from decal.verbs.load import labels_of
from decal.verbs.merge import changes_onto
from decal.verbs.plan_merge import Merging, changes_of, merging
from decal.verbs.provenance import runs_of
from decal.verbs.same_base import base_fingerprint
from decal.verbs.target import BASE, QUANTIZER, base_of, metadata_json, read, resolve
from decal.weights.merge import check_fit, compare_files
from decal.weights.verify import Verification

Observe = Callable[[str, int, int], None]


@dataclass
class _Checks:
    """What was asked, and what came of it."""

    observe: Observe | None = None
    rows: list[dict[str, str]] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    def good(self, check: str, detail: str = "") -> None:
        self.rows.append({"check": check, "result": "ok", "detail": detail})

    def bad(self, check: str, *problems: str) -> None:
        detail = first_of(problems)
        self.rows.append({"check": check, "result": "PROBLEM", "detail": detail})
        self.problems += [f"{check}: {problem}" for problem in problems]

    def left(self, check: str, why: str) -> None:
        """A check that was not made."""
        self.rows.append({"check": check, "result": "not checked", "detail": why})

    @contextmanager
    def asking(self, check: str) -> Iterator[None]:
        """An error of the block is the check's problem."""
        try:
            yield
        except (DecalError, OSError) as error:
            text = error.message if isinstance(error, DecalError) else str(error)
            details = error.details if isinstance(error, DecalError) else ()
            self.bad(check, "; ".join([text, *details[:1]]))

    def stage(self, name: str) -> Callable[[int, int], None]:
        def watch(done: int, total: int) -> None:
            if self.observe is not None:
                self.observe(name, done, total)

        return watch


def verify(
    path: str | Path,
    *,
    base: str | None = None,
    adapter: str | Path | None = None,
    full: bool = False,
    trust_remote_code: bool = False,
    observe: Observe | None = None,
) -> dict[str, Any]:
    """Checks what is stored at `path` again; changes nothing.

    Args:
        path: run, adapter or model folder, or hub id.
        base: the base, if it is not where the adapter or the merge recorded it.
        adapter: of a merged model the adapter, if it is not where it was.
        full: also packs the base again, to compare the identity of its quantized weights.
        trust_remote_code: run Python code that comes with the base; its names need it.
        observe: called with what is read, how much of it is, and all of it.

    Returns:
        {"kind", "path", "checks": [{"check", "result", "detail"}], "problems": […]}; no problems
        means that every check that could be made was passed.

    Raises:
        DecalError: there is nothing to verify.
    """
    checks = _Checks(observe)
    folder = Path(expanduser(path))
    if (folder / "run.yaml").exists():
        kind = "run"
        _run(checks, folder, base, full, trust_remote_code)
    else:
        found = resolve(path)
        kind = found.kind
        if kind == "adapter":
            _adapter(checks, str(path), base, full, trust_remote_code)
        else:
            place = local_folder(found.path, found.revision)
            _model(checks, place, base, adapter, trust_remote_code)
    return {"kind": kind, "path": str(path), "checks": checks.rows, "problems": checks.problems}


# --- adapters -----------------------------------------------------------------------------------


def _adapter(
    checks: _Checks, path: str, base: str | None, full: bool, trust_remote_code: bool
) -> Adapter | None:
    adapter: Adapter | None = None
    with checks.asking("files"):
        adapter = read(path)[1]
        checks.good("files", f"settings and {len(adapter.tensors)} A/B pairs fit each other")
    if adapter is None:
        return None
    _numbers(checks, adapter)
    recorded = runs_of(adapter.metadata)
    wanted = recorded[-1].get("weights_sha256") if recorded else None
    if wanted is None:
        checks.left("weights", "their hash is not recorded")
    elif adapter.digest() == wanted:
        checks.good("weights", "are those that were recorded when they were saved")
    else:
        checks.bad("weights", "are not those that were recorded when they were saved")
    plan = _with_base(checks, adapter, base, trust_remote_code)
    if plan is not None:
        with checks.asking("fits the base"):
            stored = describe_quantization(plan.files.config) is not None
            changes = changes_onto(plan, "trained") if stored else changes_of(plan)
            check_fit(plan.files, changes)
            checks.good("fits the base", f"{len(changes.touched)} tensors, names and shapes")
    _packed(checks, adapter, plan, full)
    return adapter


def _numbers(checks: _Checks, adapter: Adapter) -> None:
    """Reading refused NaN and infinity; what is left to say is how much is zero."""
    zero = sum(not bool(parts.B.any()) for parts in adapter.tensors.values())
    note = f"; {zero} of {len(adapter.tensors)} updates are zero" if zero else ""
    checks.good("numbers", f"{adapter.parameters:,} parameters are finite{note}")


def _with_base(
    checks: _Checks, adapter: Adapter, base: str | None, trust_remote_code: bool
) -> Merging | None:
    """The base's names, if it is here, after its fingerprint was compared."""
    try:
        path, revision = base_of(adapter, base)
    except DecalError:
        checks.left("base", "the adapter does not say which it belongs to; name it with --base")
        return None
    if base is None and not Path(path).is_dir():
        checks.left("base", f"`{path}` is not on this disk; name it with --base")
        return None
    wanted = (metadata_json(adapter, BASE) or {}).get("fingerprint")
    with checks.asking("base"):
        if wanted is None:
            checks.left("base", "its fingerprint is not recorded")
        elif base_fingerprint(path, revision) == wanted:
            checks.good("base", f"`{path}` holds the weights of the training")
        else:
            checks.bad("base", f"`{path}` does not hold the weights of the training")
        return merging(
            adapter,
            path,
            revision,
            labels=labels_of(adapter),
            trust_remote_code=trust_remote_code,
        )
    return None


def _packed(checks: _Checks, adapter: Adapter, plan: Merging | None, full: bool) -> None:
    """The identity of the quantized base: all its weights are packed again."""
    recorded = metadata_json(adapter, QUANTIZER)
    if recorded is None or plan is None:
        return
    if not full:
        checks.left("quantized base", "packing it again takes a while; --full does it")
        return
    with checks.asking("quantized base"):
        weights = changes_onto(plan, "trained").dequantized
        for done, (key, weight) in enumerate(weights.items(), start=1):
            weight.convert(plan.files.read(key))
            checks.stage("packing the base")(done, len(weights))
        checks.good("quantized base", f"{len(weights)} weights pack to the codes of the training")


# --- models -------------------------------------------------------------------------------------


def _model(
    checks: _Checks,
    folder: Path,
    base: str | None,
    adapter: str | Path | None,
    trust_remote_code: bool,
) -> None:
    files: BaseFiles | None = None
    with checks.asking("files"):
        files = open_base(folder)
        checks.good("files", f"{len(files.tensors)} tensors in {len(files.shards)} files")
    if files is None:
        return
    record: dict[str, Any] | None = None
    with checks.asking("record"):
        record = read_record(folder)
        if record is None:
            checks.left("record", f"the folder has no {RECORD_NAME}: decal did not write it")
        else:
            changed = changed_since(folder, record, checks.stage("hashing"))
            if changed:
                checks.bad("record", *changed)
            else:
                checks.good("record", "every tensor and file is as it was written")
    _finite(checks, files)
    if record is not None and record.get("made_by") == "merge":
        _merged(checks, files, record, base, adapter, trust_remote_code)


def _finite(checks: _Checks, files: BaseFiles) -> None:
    wrong = []
    for done, (key, entry) in enumerate(files.tensors.items(), start=1):
        dtype = TORCH_DTYPES.get(entry.spec.dtype)
        if dtype is not None and dtype.is_floating_point:
            with checks.asking("numbers"):
                if not bool(load_tensor(entry).isfinite().all()):
                    wrong.append(f"`{key}` holds NaN or infinity")
        checks.stage("reading")(done, len(files.tensors))
    if wrong:
        checks.bad("numbers", *wrong)
    else:
        checks.good("numbers", "all weights are finite")


def _merged(
    checks: _Checks,
    files: BaseFiles,
    record: Mapping[str, Any],
    base: str | None,
    adapter: str | Path | None,
    trust_remote_code: bool,
) -> None:
    """Base + adapter once more, where both are here, against every number of the merged model."""
    check = "base + adapter"
    if "quantized" in record:
        checks.left(check, "the merged weights were packed again")
        return
    source, facts = adapter or record["adapter"]["path"], record["base"]
    path = base or facts["path"]
    for option, given, place in (("--adapter", adapter, source), ("--base", base, path)):
        if given is None and not Path(place).is_dir():
            checks.left(check, f"`{place}` is not on this disk; name it with {option}")
            return
    with checks.asking(check):
        loaded = read(source)[1]
        revision = None if base else facts.get("revision")
        if loaded.digest() != record["adapter"]["sha256"]:
            checks.bad(check, f"`{source}` is not the adapter that was merged")
            return
        if base_fingerprint(path, revision) != facts["fingerprint"]:
            checks.bad(check, f"`{path}` is not the base that was merged")
            return
        plan = merging(
            loaded, path, revision, labels=labels_of(loaded), trust_remote_code=trust_remote_code
        )
        changes = changes_onto(plan, record["onto"])
        found = compare_files(plan.files, changes, files.read)
        problems = [finding.problem() for finding in found if not finding.right]
        if problems:
            checks.bad(check, *problems)
        else:
            worst = Verification(findings=found, pairs=len(found)).worst
            said = f"; worst layer off by {worst.relative:.2%} of the update" if worst else ""
            checks.good(check, f"{len(found)} weights are the sum, rounded once{said}")


# --- runs ---------------------------------------------------------------------------------------


def _run(
    checks: _Checks, folder: Path, base: str | None, full: bool, trust_remote_code: bool
) -> None:
    run = RunFolder.look(folder)
    left = ("info.json", "metrics.jsonl", "checkpoints", "adapter", "model")
    if not any((folder / name).exists() for name in left):
        raise DecalError(
            f"`{folder}` has a run.yaml and nothing that a run leaves: there is nothing to verify",
            hint="name the run's output folder",
        )
    with checks.asking("settings"):
        load_run(folder / "run.yaml")
        checks.good("settings", "run.yaml can be read")
    info: dict[str, Any] = {}
    with checks.asking("info"):
        info = run.info()
        done = "result" in info
        checks.good("info", "the run has finished" if done else "the run has not finished")
    result = info.get("result") or {}
    _metrics(checks, run, result)
    kept = _checkpoints(checks, run, result)
    if (folder / "adapter").is_dir():
        adapter = _adapter(checks, str(folder / "adapter"), base, full, trust_remote_code)
        if adapter is not None:
            _consistent(checks, adapter, info)
            _kept(checks, adapter, kept)
    elif (folder / "model").is_dir():
        _model(checks, folder / "model", base, None, trust_remote_code)
    elif result:
        checks.bad("result", "the run has finished, but its weights are gone")


def _metrics(checks: _Checks, run: RunFolder, result: Mapping[str, Any]) -> None:
    """One line for each step, in order, up to the last."""
    with checks.asking("metrics"):
        steps = [row.get("step") for row in run.metrics() if "loss" in row]
        last = result.get("steps", len(steps))
        if steps == list(range(1, last + 1)):
            checks.good("metrics", f"{len(steps)} steps, none missing")
            return
        wanted = range(1, last + 1)
        missing = [step for step in wanted if step not in steps]
        detail = f"{len(missing)} of {last} steps are missing" if missing else "out of order"
        first = f", the first is step {missing[0]}" if missing else ""
        checks.bad("metrics", f"{detail}{first}")


def _checkpoints(
    checks: _Checks, run: RunFolder, result: Mapping[str, Any]
) -> dict[str, Tensor] | None:
    """Every checkpoint against its hashes; the tensors of the one that became the result."""
    steps, kept = run.steps(), None
    sound = 0
    for step in steps:
        with checks.asking("checkpoints"):
            found = run.checkpoint(step)
            sound += 1
            if step == result.get("kept_step"):
                kept = found.tensors("trainable")
    if sound == len(steps):
        checks.good("checkpoints", f"{sound} are as they were written")
    return kept


def _consistent(checks: _Checks, adapter: Adapter, info: Mapping[str, Any]) -> None:
    """The facts in the adapter against those of the run."""
    base, packed = metadata_json(adapter, BASE) or {}, metadata_json(adapter, QUANTIZER) or {}
    pairs = {
        "base_fingerprint": base.get("fingerprint"),
        "quantizer_identity": packed.get("identity"),
    }
    wrong = [
        f"{key} is {str(info[key])[:16]}… in info.json, {str(value)[:16]}… in the adapter"
        for key, value in pairs.items()
        if key in info and info[key] != value
    ]
    if wrong:
        checks.bad("same run", *wrong)
    else:
        checks.good("same run", "adapter and info.json name the same base")


def _kept(checks: _Checks, adapter: Adapter, kept: Mapping[str, Tensor] | None) -> None:
    """The adapter's tensors against those of the checkpoint that was kept, whatever their names."""
    if kept is None:
        checks.left("kept checkpoint", "the run has none of the step of these weights")
        return
    tensors = [*adapter.full.values()]
    tensors += [part for parts in adapter.tensors.values() for part in parts if part is not None]
    waiting = [tensor.float() for tensor in kept.values()]
    lost = 0
    for tensor in tensors:
        same = (i for i, other in enumerate(waiting) if torch.equal(other, tensor.float()))
        place = next(same, None)
        if place is None:
            lost += 1
        else:
            waiting.pop(place)
    if lost or waiting:
        checks.bad("kept checkpoint", f"{lost} of {len(tensors)} tensors are not those it holds")
    else:
        checks.good("kept checkpoint", f"all {len(tensors)} tensors are those it holds")
