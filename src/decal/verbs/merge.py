"""`decal merge`: an adapter folded into its base, as a plain model folder that was checked."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

from decal.config import DataConfig, QuantConfig
from decal.errors import ConfigError, DecalWarning, VerificationError
from decal.quant.bnb import describe_quantization
from decal.store.base import open_base
from decal.store.files import atomic_folder, check_free, require_space, scratch_folder, size_text
from decal.store.fingerprint import fingerprint
from decal.store.record import amend_record
from decal.verbs.as_trained import as_trained
from decal.verbs.compare import rows_as_read
from decal.verbs.effect import compare_effect
from decal.verbs.load import labels_of
from decal.verbs.plan_merge import Merging, changes_of, merging
from decal.verbs.requantize import requantize
from decal.verbs.same_base import base_fingerprint, check_files
from decal.verbs.target import (
    QUANTIZER,
    Target,
    base_of,
    data_settings,
    metadata_json,
    read,
)
from decal.version import __version__
from decal.weights.changes import Changes
from decal.weights.merge import (
    MergeDtype,
    MergeReport,
    merge_files,
    wrong_merge,
)
from decal.weights.verify import NOISY, Verification

Onto = Literal["trained", "original"]
Observe = Callable[[str, int, int], None]
LOGITS = "logits"
"""The value of `verify` that is no file."""


@dataclass(frozen=True, kw_only=True)
class Merged:
    """What a merge did, and how it was checked."""

    base: str
    adapter: str
    onto: Onto
    report: MergeReport
    effect: dict[str, Any] | None = None
    """What `verify` found, as `compare_effect` returns it."""
    packed: dict[str, Any] | None = None
    """What `quantize` left of the update: format, survival, error."""

    def summary(self) -> dict[str, Any]:
        """The merge in a few facts, for printing."""
        r = self.report
        return {
            "merged": str(r.out),
            "base": self.base,
            "adapter": self.adapter,
            "onto": self.onto,
            "targeted": r.targeted,
            "replaced": r.replaced,
            "dequantized": r.dequantized,
            "untouched": r.untouched,
            "untied": list(r.untied),
            "dtype": r.dtype,
            "bytes": r.nbytes,
            "delta_kept_by_rounding": r.survival,
            "weights_unmoved_by_rounding": r.unmoved,
            "fingerprint": r.fingerprint,
            "verification": r.verification.facts(),
            "quantization_error_over_delta": r.verification.quantization,
            "effect": self.effect,
            "quantized": self.packed,
        }

    def readable(self) -> dict[str, Any]:
        """The merge as a person reads it: what was written, and how it was checked."""
        r = self.report
        parts = {"with the update": r.targeted, "trained whole": r.replaced,
                 "dequantized": r.dequantized, "as in the base": r.untouched}  # fmt: skip
        counts = ", ".join(f"{count} {what}" for what, count in parts.items() if count)
        shown: dict[str, Any] = {
            "merged": f"{r.out}  ({size_text(r.nbytes)}, {self._stored})",
            "base": self.base,
            "adapter": self.adapter,
            "onto": _ONTO[self.onto],
            "tensors": counts,
        }
        if r.untied:
            shown["untied"] = list(r.untied)
        checks = _verified(r)
        if self.packed is not None and self.packed["survival"] is not None:
            checks["in the codes"] = (
                f"{self.packed['survival']:.1%} of the update; their error is"
                f" {self.packed['error']:.2f} times its size"
            )
        shown["verified"] = checks
        return shown | ({"compared": _compared(self.effect)} if self.effect else {})

    @property
    def _stored(self) -> str:
        return self.packed["stored"] if self.packed else self.report.dtype


def merge(
    base: str | None,
    adapter: str | Path,
    out: str | Path,
    *,
    dtype: MergeDtype = "keep",
    onto: Onto | None = None,
    force: bool = False,
    quantize: Literal["nf4", "fp4", "int8"] | QuantConfig | None = None,
    verify: str | Path | None = None,
    trust_remote_code: bool = False,
    allow_other_base: bool = False,
    observe: Observe | None = None,
) -> Merged:
    """Writes base + adapter as a plain model folder, one tensor in memory at a time.

    What was written is read again and held against base and adapter (weights/verify.py).

    Args:
        base: hub id or folder; None takes the one the adapter names.
        adapter: run or adapter folder.
        dtype: of the written weights; `keep` leaves each tensor's own.
        onto: `trained` adds the delta to the weights that training computed with (for QLoRA the
            dequantized ones), `original` to the base's own. Default: trained, if the adapter or
            the base is of a quantized kind.
        quantize: packs the merged weights again, as bitsandbytes stores them; refused where less
            than half of the update outlives it.
        verify: `logits` also loads base + adapter and the merged folder and compares what they
            compute on random tokens; a file of rows does that on its first rows.
        trust_remote_code: run Python code that comes with the base; its names need it.
        allow_other_base: warn where the base is not the one of the training, instead of refusing;
            tensors must fit all the same.
        observe: called with what is being done, how much of it is done, and all of it.

    Raises:
        AdapterError: it does not fit, or this is not the base it was trained on.
        ConfigError: `trained` for an adapter that records no quantized base.
        VerificationError: what was written is not base + adapter; it is kept beside `out`.
        Whatever `merge_files` raises.
    """
    target, loaded = read(adapter)
    path, revision = base_of(loaded, base)
    check_files(loaded, path, revision, allow_other_base=allow_other_base)
    flags = {"trust_remote_code": trust_remote_code, "allow_other_base": allow_other_base}
    plan = merging(loaded, path, revision, labels=labels_of(loaded), **flags)
    onto = _onto(plan, onto)
    work = _Work(plan, onto, dtype, force, observe, _rows(verify, target), verify is not None)
    quant = QuantConfig(format=quantize) if isinstance(quantize, str) else quantize
    if quant is None or quant.format == "none":
        report, packed = work.write(Path(out), changes_onto(plan, onto)), None
    else:
        report, packed = work.write_quantized(Path(out), quant)
    _warn(report)
    done = Merged(base=path, adapter=str(adapter), onto=onto, report=report)
    return replace(done, effect=work.effect, packed=packed)


@dataclass
class _Work:
    """One merge as it was asked for."""

    plan: Merging
    onto: Onto
    dtype: MergeDtype
    force: bool
    observe: Observe | None
    rows: DataConfig | None
    compare: bool
    effect: dict[str, Any] | None = None

    def stage(self, name: str) -> Callable[[int, int], None] | None:
        """What is told how far one part of the work is."""
        return partial(self.observe, name) if self.observe is not None else None

    def write(self, out: Path, changes: Changes) -> MergeReport:
        """Merges into `out`, checked."""
        return merge_files(
            self.plan.files,
            out,
            changes,
            dtype=self.dtype,
            force=self.force,
            observe=self.stage("merging"),
            facts=_facts(self.plan, self.onto, self.dtype),
            check=self._look if self.compare else None,
        )

    def _look(self, folder: Path, found: Verification) -> dict[str, Any]:
        self.effect = compare_effect(
            self.plan,
            self.onto,
            folder,
            found,
            data=self.rows,
            observe=self.stage("comparing models"),
        )
        return {"effect": self.effect}

    def write_quantized(self, out: Path, quant: QuantConfig) -> tuple[MergeReport, dict[str, Any]]:
        """Merges beside `out`, packs that into `out`, and measures what is left of the update."""
        changes = changes_onto(self.plan, self.onto)
        check_free(out, force=self.force, marker="config.json")
        require_space(out, 3 * self.plan.files.nbytes)
        with scratch_folder(Path(os.path.realpath(out))) as scratch:
            report = self._beside(scratch, out, changes)
            packed = scratch / "packed"
            observe = self.stage("quantizing")
            converted, left = requantize(
                self.plan, changes, scratch / "merged", packed, quant, observe
            )
            facts = _facts(self.plan, self.onto, self.dtype)
            facts |= {"quantized": left, "stored": converted.stored}
            amend_record(packed, {"verification": report.verification.facts(), **facts})
            with atomic_folder(out, force=self.force, marker="config.json") as folder:
                for file in packed.iterdir():
                    os.rename(file, folder / file.name)
        written = open_base(out)
        report = replace(report, out=out, nbytes=converted.nbytes, fingerprint=fingerprint(written))
        return report, {**left, "stored": converted.stored}

    def _beside(self, scratch: Path, out: Path, changes: Changes) -> MergeReport:
        """The 16-bit merge that is packed then; a wrong one is kept beside `out` all the same."""
        try:
            return self.write(scratch / "merged", changes)
        except VerificationError as error:
            wrong = scratch / "merged.failed-verification"
            if not wrong.exists():
                raise
            *details, _ = error.details  # the last one names a folder that is about to go
            problem = VerificationError(error.message, details=details, hint=error.hint)
            raise wrong_merge(problem, wrong, out) from error


def _rows(verify: str | Path | None, target: Target) -> DataConfig | None:
    """The rows to compare on, read as the run of the adapter read its own."""
    if verify is None or str(verify) == LOGITS:
        return None
    return rows_as_read(str(verify), data_settings(target) or DataConfig(path="-"), None)


def changes_onto(plan: Merging, onto: Onto) -> Changes:
    """What the adapter makes of the weights of training, or of the base's own."""
    changes = changes_of(plan)
    if onto == "trained":
        return as_trained(plan, changes)
    stored = describe_quantization(plan.files.config) is not None
    if stored or metadata_json(plan.adapter, QUANTIZER) is None:
        return changes
    return replace(changes, compared=as_trained(plan, changes).dequantized)


def _facts(plan: Merging, onto: Onto, dtype: MergeDtype) -> dict[str, Any]:
    """What the folder's record says of base and adapter."""
    adapter = plan.adapter
    return {
        "decal": __version__,
        "made_by": "merge",
        "base": {
            "path": _place(plan.path),
            "revision": plan.revision,
            "fingerprint": base_fingerprint(plan.path, plan.revision),
        },
        "adapter": {"path": _place(adapter.source), "sha256": adapter.digest()},
        "onto": onto,
        "dtype": dtype,
    }


def _place(path: str) -> str:
    """A folder's whole path, so that it is found from anywhere; a hub id as it is."""
    folder = Path(path).expanduser()
    return str(folder.resolve()) if folder.is_dir() else path


def _warn(report: MergeReport) -> None:
    """Says so where 16 bits hold the update badly.

    That is where rounding's noise is half the update's size or more, which leaves a cosine below
    0.9 between what was trained and what was written; or where most updates are faint (verify.py).
    """
    found = report.verification
    faint = len(found.faint)
    if (found.error or 0.0) > NOISY or 2 * faint > len(found.findings):
        warnings.warn(
            f"{report.dtype} holds this update badly: rounding changed it by {found.error:.0%} of"
            f" its size, and {faint} of {len(found.findings)} layers cannot tell it from rounding;"
            " --dtype fp32 keeps all of it",
            DecalWarning,
            stacklevel=3,
        )


_ONTO = {
    "trained": "trained (the weights that training computed with)",
    "original": "original (the base's own weights)",
}


def _compared(effect: dict[str, Any]) -> dict[str, Any]:
    """The comparison of models in words."""
    e = effect
    shown: dict[str, Any] = {
        "merged model": f"{e['distance']:.1%} of the adapter's effect away from base + adapter"
        f" (100% is no update, the limit is {e['limit']:.0%})",
        "largest difference": f"{e['max_difference']:.3g} in a logit; the adapter moves them by up"
        f" to {e['max_difference_of_base']:.3g}",
        "KL": f"{e['kl']:.2g} nats from base + adapter; the base is {e['kl_of_base']:.2g} away",
        "same top token": f"{e['top_1_agreement']:.1%} of {e['positions']} positions; base"
        f" {e['top_1_agreement_of_base']:.1%}",
    }
    if "losses" in e:
        shown[f"loss on {e['rows']} rows"] = e["losses"]
    return shown


def _verified(report: MergeReport) -> dict[str, Any]:
    """The verification in words."""
    found, worst = report.verification, report.verification.worst
    shown: dict[str, Any] = {}
    if worst is not None:
        count = len(found.findings)
        shown["A/B pairs"] = f"{found.pairs} of {found.pairs} used once, none left over"
        shown["read again"] = f"{count} of {count} weights are base + update, rounded once"
        shown["worst layer"] = f"{worst.relative:.2%} of the update off, in {worst.module}"
        shown["to compare"] = (
            f"rounding explains up to {worst.allowed:.2%}, no update at all would be 100%"
        )
    if found.faint:
        shown["too small"] = (
            f"{len(found.faint)} of {len(found.findings)} updates are below what {report.dtype}"
            " shows in a layer's output"
        )
    shown["other tensors"] = f"{found.same} of {found.same} hold the bytes that were meant"
    if report.survival is not None and report.unmoved is not None:
        shown["update kept"] = (
            f"{report.survival:.2%} after rounding to {report.dtype}; {report.unmoved:.1%} of the"
            " weights did not move"
        )
    if found.quantization is not None:
        shown["quantization"] = (
            f"the weights of training are {found.quantization['all']:.2f} times the update away"
            " from the original"
        )
        kinds = (f"{kind} {x:.2f}" for kind, x in found.quantization.items() if kind != "all")
        shown["by layer"] = ", ".join(kinds)
    return shown


def _onto(plan: Merging, asked: Onto | None) -> Onto:
    adapter = plan.adapter
    recorded = metadata_json(adapter, QUANTIZER) is not None
    quantized = recorded or describe_quantization(plan.files.config) is not None
    if asked == "trained" and not quantized:
        raise ConfigError(
            f"adapter `{adapter.source}` does not record a quantized base, so there is nothing but"
            " the original to merge onto",
            hint="leave --onto out",
        )
    return asked or ("trained" if quantized else "original")
