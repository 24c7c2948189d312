"""Base + adapter -> a new model folder, streamed: one tensor in memory, whatever the model's size.

Every tensor of the base is in exactly one class:

    targeted     W' = round(W_trained + scale * B A)           (delta.py)
    replaced     W' = round(the adapter's own tensor): modules_to_save, biases
    dequantized  W' = round(W_trained), no delta
    dropped      not written: the head of another task
    untouched    W' = W: the stored bytes, or a cast where another dtype is asked for

and tensors may be added that the base does not have, a classifier's head.

W_trained is what training computed with. Training a 4-bit base computes with the dequantized
weights, and so the delta belongs to these; `dequantized` gives, per file key, the function from the
stored weight to that one. All quantized layers must be in it, those without an adapter as well:
leaving them at 16 bits would be a third model that nobody trained or measured. Merging onto the
original weights is the same call with no `dequantized`.

A tied pair (one matrix as embedding and head) stays tied unless one side alone changes, or both do
differently; then both are written and the config says so. Keeping them tied would put the head's
delta into the embedding.

Each shard is read again after it was written: its header must be the planned one and each tensor's
hash that of the bytes that were meant (for an untouched tensor: of the base's bytes). Then every
tensor that gained a delta or was replaced is read once more and held against what it should be,
made again from the base and the factors (verify.py). The folder is put in place last, so a killed
merge leaves no output; one that fails the second check is kept under another name, to look at.

Knows no model and no quantization format: keys, shapes and functions are given.
"""

from __future__ import annotations

import copy
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from decal.errors import (
    BaseModelError,
    OutputError,
    VerificationError,
    first_of,
)
from decal.store.base import INDEX_NAME, BaseFiles, copy_side_files, side_files
from decal.store.files import atomic_folder, check_free, require_space, write_json, write_text
from decal.store.fingerprint import combine
from decal.store.record import write_record
from decal.store.tensorfile import (
    TORCH_DTYPES,
    TensorEntry,
    TensorSpec,
    load_tensor,
    raw_chunks,
    read_header,
    tensor_bytes,
    write_verified,
)
from decal.weights.changes import FLOATS, Changes, check_changes
from decal.weights.delta import add_delta, cast
from decal.weights.verify import Finding, Verification, check_delta

__all__ = [
    "MergeDtype",
    "MergeReport",
    "check_fit",
    "compare_files",
    "merge_files",
    "wrong_merge",
]

MergeDtype = Literal["keep", "bf16", "fp16", "fp32"]

_DTYPES = {"bf16": "BF16", "fp16": "F16", "fp32": "F32"}
_UNCAST = ("BOOL", "U8", "I8", "U16", "I16", "U32", "I32", "U64", "I64", "C64")
_HEADER_ROOM = 4 << 20
"""Bytes set aside for headers, config and index."""


@dataclass(frozen=True, kw_only=True)
class MergeReport:
    """What a merge wrote."""

    out: Path
    targeted: int
    """Tensors that gained a delta."""
    replaced: int
    """Tensors that the adapter holds whole, those that the base lacks included."""
    dequantized: int
    """Tensors without a delta that hold the weights training computed with."""
    untouched: int
    nbytes: int
    """Bytes of all tensors."""
    dtype: str
    """torch's name of the dtype that most weights have; also in config.json."""
    survival: float | None
    """Share of the deltas that the output holds after rounding; None if all were zero."""
    unmoved: float | None
    """Share of the weights that should have moved and that rounding left as they were."""
    untied: tuple[str, ...]
    """Keys that were tied to another tensor and are now written for themselves."""
    fingerprint: str
    """The merged model's own fingerprint."""
    verification: Verification
    """What was found when the touched tensors were read again."""


def wrong_merge(problem: VerificationError, folder: Path, out: Path) -> VerificationError:
    """Moves a wrong output to a free name beside `out`, and the error that says so."""
    place = Path(os.path.realpath(out))
    aside = place.with_name(f"{place.name}.failed-verification")
    tries = 1
    while aside.exists():
        tries += 1
        aside = place.with_name(f"{place.name}.failed-verification-{tries}")
    os.rename(folder, aside)
    return VerificationError(
        problem.message,
        details=[*problem.details, f"what was written is kept in `{aside}`; `{out}` was not made"],
        hint=problem.hint or "this is a bug in decal or a faulty disk; please report it",
    )


@contextmanager
def _kept_aside(folder: Path, out: Path) -> Iterator[None]:
    """If the block finds the complete `folder` wrong, it is kept under another name."""
    try:
        yield
    except VerificationError as error:
        raise wrong_merge(error, folder, out) from error


@dataclass
class _Job:
    """One merge under way."""

    base: BaseFiles
    changes: Changes
    sources: dict[str, TensorEntry]
    """Output key -> the base's tensor it is made of."""
    shards: dict[str, dict[str, TensorSpec]]
    """File name -> its tensors."""
    untied: tuple[str, ...]
    observe: Callable[[int, int], None] | None
    used: Counter[str] = field(default_factory=Counter)
    """File key -> how often its delta was added."""
    done: int = 0
    specs: dict[str, TensorSpec] = field(init=False)
    nbytes: int = field(init=False)
    work: int = field(init=False)
    """Bytes to be written, to be read again, and to be held against the base."""

    def __post_init__(self) -> None:
        self.specs = {key: spec for shard in self.shards.values() for key, spec in shard.items()}
        self.nbytes = sum(spec.nbytes for spec in self.specs.values())
        checked = self.changes.deltas.keys() & self.specs.keys()
        self.work = 2 * self.nbytes + sum(self.specs[key].nbytes for key in checked)

    def advance(self, count: int) -> None:
        """Tells how far the work is."""
        self.done += count
        if self.observe is not None:
            self.observe(self.done, self.work)


def merge_files(
    base: BaseFiles,
    out: str | Path,
    changes: Changes,
    *,
    dtype: MergeDtype = "keep",
    force: bool = False,
    observe: Callable[[int, int], None] | None = None,
    facts: Mapping[str, Any] | None = None,
    check: Callable[[Path, Verification], Mapping[str, Any]] | None = None,
) -> MergeReport:
    """Writes the merged model to the folder `out`.

    Args:
        base: the opened base; stored in floating point, or `changes` dequantizes it all.
        out: the new folder; a non-empty one is replaced only with `force`.
        changes: what becomes of which tensor. Every delta and tensor is used exactly once.
        dtype: of all floating tensors; `keep` leaves each as it is stored.
        observe: called with bytes done and bytes in total, reading again included.
        facts: what the folder's record says of base and adapter (store/record.py).
        check: a further look at the complete folder before it is put in place; what it returns
            goes into the record, and its VerificationError fails the merge.

    Raises:
        AdapterError: changes of keys the base lacks, or of other shapes (all collected).
        BaseModelError: the base is quantized, or a file became unreadable.
        QuantError: the changes dequantize keys the base lacks.
        OutputError, StorageError: `out` is taken, or the disk refuses or is too small.
        VerificationError: a value does not fit the dtype, rounding removed a whole delta, or what
            was read again is not what was meant.
    """
    target = Path(out)
    if "quantization_config" not in changes.config:
        _plain_base(base)
    _apart(base, target)
    check_free(target, force=force, marker="config.json")
    job = _plan(base, changes, dtype)
    job.observe = observe
    require_space(target, job.nbytes + _side_bytes(base) + _HEADER_ROOM)
    with atomic_folder(target, force=force, marker="config.json") as folder:
        hashes: dict[str, str] = {}
        for name, specs in job.shards.items():
            hashes.update(_write_shard(job, folder / name, specs))
        _write_rest(job, folder)
        with _kept_aside(folder, target):
            verification = _verified(job, folder)
        _survived(verification)
        with _kept_aside(folder, target):
            looked = check(folder, verification) if check is not None else {}
        report = _report(job, target, hashes, verification)
        said = {**(facts or {}), "verification": {**verification.facts(), **looked}}
        write_record(folder, said, report.fingerprint, hashes)
    return report


def _plain_base(base: BaseFiles) -> None:
    method = base.config.get("quantization_config")
    if method:
        name = method.get("quant_method", "unknown") if isinstance(method, dict) else "unknown"
        raise BaseModelError(
            f"base `{base.folder}` is stored quantized ({name}), a delta cannot be added to codes",
            hint="merge onto the 16-bit model it was made of, or make one: `decal dequantize`",
        )


def _apart(base: BaseFiles, out: Path) -> None:
    source, target = base.folder.resolve(), out.resolve()
    if target == source or target in source.parents:
        raise OutputError(
            f"output `{out}` holds the base `{base.folder}`", hint="choose another output"
        )


def _plan(base: BaseFiles, changes: Changes, dtype: MergeDtype) -> _Job:
    lost = [source for source in changes.tied.values() if source not in base.tensors]
    if lost:
        raise BaseModelError(f"base `{base.folder}` has no tensor `{lost[0]}` to tie to")
    untied = tuple(sorted(key for key in changes.tied if _parts(changes, key)))
    sources = {key: entry for key, entry in base.tensors.items() if key not in changes.dropped}
    for key in untied:
        sources[key] = base.tensors[changes.tied[key]]
    specs = {key: _trained_spec(changes, key, entry.spec) for key, entry in sources.items()}
    follows = {k: specs[source] for k, source in changes.tied.items() if k not in specs}
    check_changes(base, changes, {**follows, **specs})
    shards: dict[str, dict[str, TensorSpec]] = {shard.path.name: {} for shard in base.shards}
    for key, entry in sources.items():
        place = base.tensors.get(key, entry).file.name
        kind = _output_dtype(base, key, specs[key].dtype, dtype)
        shards[place][key] = TensorSpec(kind, specs[key].shape)
    main = _main_kind(specs)
    for key, tensor in changes.added.items():
        kind = main if dtype == "keep" else _DTYPES[dtype]
        shards[base.shards[-1].path.name][key] = TensorSpec(kind, tuple(tensor.shape))
    return _Job(base, changes, sources, {n: s for n, s in shards.items() if s}, untied, None)


def _parts(changes: Changes, key: str) -> bool:
    """Whether a tied pair no longer holds one value."""
    pair = {key, changes.tied[key]}
    if not pair & changes.touched:
        return False
    both = [changes.replaced[k] for k in pair if k in changes.replaced]
    return bool(pair & changes.deltas.keys()) or len(both) < 2 or not torch.equal(*both)


def _trained_spec(changes: Changes, key: str, stored: TensorSpec) -> TensorSpec:
    weight = changes.dequantized.get(key)
    return stored if weight is None or weight.spec is None else weight.spec


def _output_dtype(base: BaseFiles, key: str, stored: str, dtype: MergeDtype) -> str:
    if dtype == "keep" or stored in _UNCAST:
        return stored
    if stored not in FLOATS:
        raise BaseModelError(
            f"base `{base.folder}` stores `{key}` in {stored}, which cannot be converted",
            hint="merge with --dtype keep",
        )
    return _DTYPES[dtype]


def _side_bytes(base: BaseFiles) -> int:
    return sum((base.folder / name).stat().st_size for name in side_files(base.folder))


def _write_shard(job: _Job, path: Path, specs: Mapping[str, TensorSpec]) -> dict[str, str]:
    metadata = {"format": "pt"}
    for shard in job.base.shards:
        if shard.path.name == path.name:
            metadata |= shard.metadata
    return write_verified(
        path, specs, lambda key: _chunks(job, key, specs[key]), metadata, job.advance
    )


def _chunks(job: _Job, key: str, spec: TensorSpec) -> Iterator[bytes | memoryview]:
    try:
        tensor = _made(job, key, spec)
        if tensor is None:
            yield from raw_chunks(job.sources[key])
        else:
            yield tensor_bytes(tensor)
    except OSError as error:
        # Raised while a chunk was being made, so it is about the base and not about the output.
        name = job.sources[key].file if key in job.sources else job.base.folder
        raise BaseModelError(f"`{name}` cannot be read: {error.strerror}") from error
    job.advance(spec.nbytes)


def _made(job: _Job, key: str, spec: TensorSpec) -> Tensor | None:
    """The tensor to write; None where the base's stored bytes are it."""
    c, entry = job.changes, job.sources.get(key)
    delta, dtype = c.deltas.get(key), TORCH_DTYPES[spec.dtype]
    touched = any(key in part for part in (c.deltas, c.replaced, c.added, c.dequantized))
    if not touched and entry is not None and entry.spec.dtype == spec.dtype:
        return None
    before = _before(job, key)
    if delta is None:
        return cast(key, before, dtype)
    job.used[key] += 1
    return add_delta(key, before, delta, dtype)


def _before(job: _Job, key: str) -> Tensor:
    """The weight without its delta: the adapter's own where it holds one, else as in training."""
    changes = job.changes
    own = changes.replaced.get(key, changes.added.get(key))
    weight = changes.dequantized.get(key)
    if own is not None and weight is None:
        return own
    trained = load_tensor(job.sources[key])
    if weight is not None:
        # Also of a weight that is replaced: the whole base is checked by what was packed.
        trained = weight.convert(trained)
    return trained if own is None else own


def _verified(job: _Job, folder: Path) -> Verification:
    """Reads what was touched once more; raises VerificationError if it is not what it should be."""
    unused = [key for key in job.changes.deltas if job.used[key] != 1]
    if unused:
        raise VerificationError(
            f"{len(unused)} of {len(job.changes.deltas)} A/B pairs were not used exactly once",
            details=[f"{unused[0]}: used {job.used[unused[0]]} times"],
        )
    shards = {name: read_header(folder / name, VerificationError) for name in job.shards}
    entries = {key: entry for shard in shards.values() for key, entry in shard.entries.items()}
    # A key that stays tied to another has no tensor of its own.
    whole = (job.changes.replaced.keys() | job.changes.added.keys()) & entries.keys()
    alone = sorted(whole - job.changes.deltas.keys())
    wrong = [key for key in alone if not _same(job, entries[key])]
    findings = tuple(_checked(job, key, entries[key]) for key in job.changes.deltas)
    problems = [f"{key}: is not the adapter's own tensor" for key in wrong]
    problems += [found.problem() for found in findings if not found.right]
    if problems:
        raise VerificationError(
            f"{len(problems)} of {len(findings) + len(alone)} merged tensors, read again, are not"
            " base + adapter",
            details=[first_of(problems)],
        )
    same = len(entries) - len(findings) - len(wrong)
    return Verification(findings=findings, pairs=len(findings), same=same)


def _checked(job: _Job, key: str, entry: TensorEntry) -> Finding:
    found = _finding(job, key, load_tensor(entry))
    job.advance(entry.spec.nbytes)
    return found


def compare_files(
    base: BaseFiles, changes: Changes, read: Callable[[str], Tensor]
) -> tuple[Finding, ...]:
    """Holds tensors of any origin against base + adapter, one finding for each delta.

    Args:
        read: file key -> W' in the file's orientation: a merge of another day, or one that was
            quantized, dequantized again.

    Raises:
        AdapterError, QuantError: as `merge_files`.
    """
    job = _plan(base, changes, "keep")
    return tuple(_finding(job, key, read(key)) for key in changes.deltas)


def check_fit(base: BaseFiles, changes: Changes) -> None:
    """Raises as `merge_files` if the changes do not fit the base; reads no weight."""
    _plan(base, changes, "keep")


def _finding(job: _Job, key: str, after: Tensor) -> Finding:
    changes = job.changes
    before, stored = _before(job, key), None
    source, weight = job.sources[key], changes.dequantized.get(key)
    if key in changes.compared:
        stored = changes.compared[key].convert(load_tensor(source))
    elif weight is not None and weight.spec is None and key not in changes.replaced:
        stored = load_tensor(source)
    return check_delta(key, before, after, changes.deltas[key], stored)


def _same(job: _Job, entry: TensorEntry) -> bool:
    """Whether a tensor that the adapter holds whole is what was read again."""
    changes, found = job.changes, load_tensor(entry)
    own = changes.replaced.get(entry.key, changes.added.get(entry.key))
    assert own is not None
    return torch.equal(found, own.to(found.dtype))


def _survived(verification: Verification) -> None:
    lost = [found.key for found in verification.findings if found.lost]
    if lost:
        raise VerificationError(
            f"rounding removed the whole delta of {len(lost)} of {len(verification.findings)}"
            " tensors",
            details=lost[:1],
            hint="write it with --dtype fp32, or keep the adapter apart",
        )


def _write_rest(job: _Job, folder: Path) -> None:
    specs = job.specs
    if job.base.sharded:
        weight_map = {key: name for name, shard in job.shards.items() for key in shard}
        document = {"metadata": {"total_size": job.nbytes}, "weight_map": weight_map}
        write_json(folder / INDEX_NAME, document)
    write_json(folder / "config.json", _config(job, specs), nan=True)
    copy_side_files(job.base.folder, folder)
    for name, text in job.changes.texts.items():
        write_text(folder / name, text)


def _config(job: _Job, specs: Mapping[str, TensorSpec]) -> dict[str, Any]:
    config = copy.deepcopy(job.base.config)
    name = _main_dtype(specs)
    nested = [value for value in config.values() if isinstance(value, dict)]
    for part in [config, *nested]:
        for field_name in ("dtype", "torch_dtype"):
            if field_name in part:
                part[field_name] = name
    config["dtype"] = name
    if job.untied:
        for part in [config, *nested]:
            if part is config or "tie_word_embeddings" in part:
                part["tie_word_embeddings"] = False
    config |= job.changes.config
    return {
        key: value for key, value in config.items() if job.changes.config.get(key, 0) is not None
    }


def _main_dtype(specs: Mapping[str, TensorSpec]) -> str:
    """torch's name of the dtype that most weights have."""
    return str(TORCH_DTYPES[_main_kind(specs)]).removeprefix("torch.")


def _main_kind(specs: Mapping[str, TensorSpec]) -> str:
    size: dict[str, int] = {}
    for spec in specs.values():
        if spec.dtype in FLOATS:
            size[spec.dtype] = size.get(spec.dtype, 0) + spec.nbytes
    return max(size, key=lambda name: size[name])


def _report(
    job: _Job, out: Path, hashes: Mapping[str, str], verification: Verification
) -> MergeReport:
    specs = job.specs
    changes = job.changes
    plain = [k for k in changes.dequantized if k in specs and k not in changes.touched]
    whole = [k for k in specs if k in changes.replaced or k in changes.added]
    return MergeReport(
        out=out,
        targeted=len(changes.deltas),
        replaced=len(whole),
        dequantized=len(plain),
        untouched=len(specs) - len(changes.deltas) - len(whole) - len(plain),
        nbytes=job.nbytes,
        dtype=_main_dtype(specs),
        survival=verification.survival,
        unmoved=verification.unmoved,
        untied=job.untied,
        fingerprint=combine(specs, hashes),
        verification=verification,
    )
