"""Base + adapter -> a new model folder, streamed: one tensor in memory, whatever the model's size.

Every tensor of the base is in exactly one class:

    targeted     W' = round(W_trained + scale * B A)           (delta.py)
    dequantized  W' = round(W_trained), no delta
    untouched    W' = W: the stored bytes, or a cast where another dtype is asked for

W_trained is what training computed with. Training a 4-bit base computes with the dequantized
weights, and so the delta belongs to these; `dequantized` gives, per file key, the function from the
stored weight to that one. All quantized layers must be in it, those without an adapter as well:
leaving them at 16 bits would be a third model that nobody trained or measured. Merging onto the
original weights is the same call with no `dequantized`.

A tied pair (one matrix as embedding and head) stays tied unless one side has a delta; then both are
written and the config says so. Keeping them tied would put the head's delta into the embedding.

Each shard is read again after it was written: its header must be the planned one and each tensor's
hash that of the bytes that were meant (for an untouched tensor: of the base's bytes). The folder is
put in place last, so a killed merge leaves no output.

Knows no model and no quantization format: keys, shapes and functions are given.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from decal.errors import (
    AdapterError,
    BaseModelError,
    OutputError,
    QuantError,
    VerificationError,
    nearest,
)
from decal.store.base import INDEX_NAME, BaseFiles, copy_side_files, side_files
from decal.store.files import atomic_folder, check_free, require_space, write_json
from decal.store.fingerprint import combine
from decal.store.tensorfile import (
    TORCH_DTYPES,
    TensorEntry,
    TensorSpec,
    load_tensor,
    raw_chunks,
    tensor_bytes,
    write_verified,
)
from decal.weights.delta import Deltas, Effect, add_delta, cast

__all__ = ["MergeDtype", "MergeReport", "merge_files"]

MergeDtype = Literal["keep", "bf16", "fp16", "fp32"]

_DTYPES = {"bf16": "BF16", "fp16": "F16", "fp32": "F32"}
_FLOATS = ("F64", "F32", "F16", "BF16")
_UNCAST = ("BOOL", "U8", "I8", "U16", "I16", "U32", "I32", "U64", "I64", "C64")
_HEADER_ROOM = 4 << 20
"""Bytes set aside for headers, config and index."""


@dataclass(frozen=True, kw_only=True)
class MergeReport:
    """What a merge wrote."""

    out: Path
    targeted: int
    """Tensors that gained a delta."""
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


@dataclass
class _Job:
    """One merge under way."""

    base: BaseFiles
    deltas: Deltas
    dequantized: Mapping[str, Callable[[Tensor], Tensor]]
    sources: dict[str, TensorEntry]
    """Output key -> the base's tensor it is made of."""
    shards: dict[str, dict[str, TensorSpec]]
    """File name -> its tensors."""
    untied: tuple[str, ...]
    observe: Callable[[int, int], None] | None
    effect: Effect = field(default_factory=Effect)
    done: int = 0
    specs: dict[str, TensorSpec] = field(init=False)
    nbytes: int = field(init=False)

    def __post_init__(self) -> None:
        self.specs = {key: spec for shard in self.shards.values() for key, spec in shard.items()}
        self.nbytes = sum(spec.nbytes for spec in self.specs.values())

    def advance(self, count: int) -> None:
        """Half of the way is writing, half is reading again."""
        self.done += count
        if self.observe is not None:
            self.observe(self.done, 2 * self.nbytes)


def merge_files(
    base: BaseFiles,
    out: str | Path,
    deltas: Deltas,
    *,
    dequantized: Mapping[str, Callable[[Tensor], Tensor]] | None = None,
    tied: Mapping[str, str] | None = None,
    dtype: MergeDtype = "keep",
    force: bool = False,
    observe: Callable[[int, int], None] | None = None,
) -> MergeReport:
    """Writes the merged model to the folder `out`.

    Args:
        base: the opened base; must be stored in floating point.
        out: the new folder; a non-empty one is replaced only with `force`.
        deltas: file key -> delta. Every one is used exactly once.
        dequantized: file key -> function from the stored weight, in the file's orientation, to the
            weight that training computed with, in any floating dtype.
        tied: key -> key of the tensor it shares, as the architecture ties them.
        dtype: of all floating tensors; `keep` leaves each as it is stored.
        observe: called with bytes done and bytes in total, reading again included.

    Raises:
        AdapterError: deltas for keys the base lacks, or of other shapes (all collected).
        BaseModelError: the base is quantized, or a file became unreadable.
        QuantError: `dequantized` names keys the base lacks.
        OutputError, StorageError: `out` is taken, or the disk refuses or is too small.
        VerificationError: a value does not fit the dtype, rounding removed a whole delta, or what
            was read again is not what was meant.
    """
    target = Path(out)
    _plain_base(base)
    _apart(base, target)
    check_free(target, force=force, marker="config.json")
    job = _plan(base, deltas, dequantized or {}, tied or {}, dtype)
    job.observe = observe
    require_space(target, job.nbytes + _side_bytes(base) + _HEADER_ROOM)
    with atomic_folder(target, force=force, marker="config.json") as folder:
        hashes: dict[str, str] = {}
        for name, specs in job.shards.items():
            hashes.update(_write_shard(job, folder / name, specs))
        _survived(job)
        _write_rest(job, folder)
    return _report(job, target, hashes)


def _plain_base(base: BaseFiles) -> None:
    method = base.config.get("quantization_config")
    if method:
        name = method.get("quant_method", "unknown") if isinstance(method, dict) else "unknown"
        raise BaseModelError(
            f"base `{base.folder}` is stored quantized ({name}), a delta cannot be added to codes",
            hint="merge onto the 16-bit model it was made of",
        )


def _apart(base: BaseFiles, out: Path) -> None:
    source, target = base.folder.resolve(), out.resolve()
    if target == source or target in source.parents:
        raise OutputError(
            f"output `{out}` holds the base `{base.folder}`", hint="choose another output"
        )


def _plan(
    base: BaseFiles,
    deltas: Deltas,
    dequantized: Mapping[str, Callable[[Tensor], Tensor]],
    tied: Mapping[str, str],
    dtype: MergeDtype,
) -> _Job:
    untied = tuple(sorted(k for k, source in tied.items() if {k, source} & deltas.by_key.keys()))
    lost = [source for source in tied.values() if source not in base.tensors]
    if lost:
        raise BaseModelError(f"base `{base.folder}` has no tensor `{lost[0]}` to tie to")
    sources = dict(base.tensors)
    for key in untied:
        sources[key] = base.tensors[tied[key]]
    _check_fit(base, deltas, sources)
    unknown = sorted(dequantized.keys() - sources.keys() - tied.keys())
    if unknown:
        raise QuantError(
            f"{len(unknown)} of {len(dequantized)} quantized weights are not in base "
            f"`{base.folder}`",
            details=unknown[:1],
        )
    shards: dict[str, dict[str, TensorSpec]] = {shard.path.name: {} for shard in base.shards}
    for key, entry in sources.items():
        place = base.tensors.get(key, entry).file.name
        shards[place][key] = TensorSpec(_output_dtype(base, entry, dtype), entry.spec.shape)
    return _Job(base, deltas, dequantized, sources, shards, untied, None)


def _output_dtype(base: BaseFiles, entry: TensorEntry, dtype: MergeDtype) -> str:
    stored = entry.spec.dtype
    if dtype == "keep" or stored in _UNCAST:
        return stored
    if stored not in _FLOATS:
        raise BaseModelError(
            f"base `{base.folder}` stores `{entry.key}` in {stored}, which cannot be converted",
            hint="merge with --dtype keep",
        )
    return _DTYPES[dtype]


def _check_fit(base: BaseFiles, deltas: Deltas, sources: Mapping[str, TensorEntry]) -> None:
    problems: list[str] = []
    missing, wrong = 0, 0
    for key, delta in sorted(deltas.by_key.items()):
        name = delta.module or key
        if key not in sources:
            missing += 1
            close = nearest(key, list(sources))
            problems.append(f"{name}: no tensor `{key}`" + (f", but `{close}`" if close else ""))
            continue
        spec = sources[key].spec
        (a, b), stored = delta.shape, spec.shape
        if len(stored) != 2 or spec.dtype not in _FLOATS:
            wrong += 1
            problems.append(f"{name}: base has {spec.dtype} {list(stored)}, no weight matrix")
        elif (a, b) != stored:
            wrong += 1
            names = ("in", "out") if delta.transposed else ("out", "in")
            i = 1 if b != stored[1] else 0
            problems.append(
                f"{name}: adapter expects {names[i]}={(a, b)[i]}, base has {names[i]}={stored[i]}"
            )
    if not problems:
        return
    counts = [f"{missing} of {len(deltas.by_key)} tensors are not in the base"] * bool(missing)
    counts += [f"{wrong} of {len(deltas.by_key)} tensors have the wrong shape"] * bool(wrong)
    more = f"  (and {len(problems) - 1} more)" if problems[1:] else ""
    known = f"the adapter was trained on `{deltas.trained_on}` (adapter_config.json)"
    raise AdapterError(
        f"adapter `{deltas.name}` does not fit base `{base.folder}`: {', '.join(counts)}",
        details=[problems[0] + more],
        hint=known if deltas.trained_on else "merge onto the base the adapter was trained on",
    )


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
    entry = job.sources[key]
    delta, convert = job.deltas.by_key.get(key), job.dequantized.get(key)
    try:
        if delta is None and convert is None and entry.spec.dtype == spec.dtype:
            yield from raw_chunks(entry)
        else:
            weight = load_tensor(entry)
            dtype = TORCH_DTYPES[spec.dtype]
            if convert is not None:
                weight = convert(weight)
            if delta is not None:
                result = add_delta(key, weight, delta, dtype, job.effect)
            else:
                result = cast(key, weight, dtype)
            yield tensor_bytes(result)
    except OSError as error:
        # Raised while a chunk was being made, so it is about the base and not about the output.
        raise BaseModelError(f"`{entry.file}` cannot be read: {error.strerror}") from error
    job.advance(spec.nbytes)


def _survived(job: _Job) -> None:
    lost = job.effect.lost
    if lost:
        raise VerificationError(
            f"rounding removed the whole delta of {len(lost)} of {len(job.deltas.by_key)} tensors",
            details=lost[:1],
            hint="write it with --dtype fp32, or keep the adapter apart",
        )


def _write_rest(job: _Job, folder: Path) -> None:
    specs = job.specs
    if job.base.sharded:
        weight_map = {key: name for name, shard in job.shards.items() for key in shard}
        document = {"metadata": {"total_size": job.nbytes}, "weight_map": weight_map}
        write_json(folder / INDEX_NAME, document)
    write_json(folder / "config.json", _config(job, specs))
    copy_side_files(job.base.folder, folder)


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
    return config


def _main_dtype(specs: Mapping[str, TensorSpec]) -> str:
    size: dict[str, int] = {}
    for spec in specs.values():
        if spec.dtype in _FLOATS:
            size[spec.dtype] = size.get(spec.dtype, 0) + spec.nbytes
    return str(TORCH_DTYPES[max(size, key=lambda name: size[name])]).removeprefix("torch.")


def _report(job: _Job, out: Path, hashes: Mapping[str, str]) -> MergeReport:
    specs = job.specs
    plain = [k for k in job.dequantized if k in specs and k not in job.deltas.by_key]
    return MergeReport(
        out=out,
        targeted=len(job.deltas.by_key),
        dequantized=len(plain),
        untouched=len(specs) - len(job.deltas.by_key) - len(plain),
        nbytes=job.nbytes,
        dtype=_main_dtype(specs),
        survival=job.effect.survival,
        unmoved=job.effect.unmoved,
        untied=job.untied,
        fingerprint=combine(specs, hashes),
    )
