"""`decal merge`: an adapter folded into its base, as a plain model folder."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from decal.errors import ConfigError
from decal.quant.bnb import describe_quantization
from decal.verbs.as_trained import as_trained
from decal.verbs.load import labels_of
from decal.verbs.plan_merge import Merging, changes_of, merging
from decal.verbs.same_base import check_files
from decal.verbs.target import QUANTIZER, base_of, metadata_json, read
from decal.weights.merge import MergeDtype, MergeReport, merge_files

Onto = Literal["trained", "original"]


@dataclass(frozen=True, kw_only=True)
class Merged:
    """What a merge did."""

    base: str
    adapter: str
    onto: Onto
    report: MergeReport

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
        }


def merge(
    base: str | None,
    adapter: str | Path,
    out: str | Path,
    *,
    dtype: MergeDtype = "keep",
    onto: Onto | None = None,
    force: bool = False,
    trust_remote_code: bool = False,
    allow_other_base: bool = False,
    observe: Callable[[int, int], None] | None = None,
) -> Merged:
    """Writes base + adapter as a plain model folder, one tensor in memory at a time.

    Args:
        base: hub id or folder; None takes the one the adapter names.
        adapter: run or adapter folder.
        dtype: of the written weights; `keep` leaves each tensor's own.
        onto: `trained` adds the delta to the weights that training computed with (for QLoRA the
            dequantized ones), `original` to the base's own. Default: trained if the adapter was
            trained on a quantized base, or the base is stored quantized.
        trust_remote_code: run Python code that comes with the base; its names need it.
        allow_other_base: warn where the base is not the one of the training, instead of refusing;
            tensors must fit all the same.
        observe: called with bytes done and bytes in total.

    Raises:
        AdapterError: it does not fit, or this is not the base it was trained on.
        ConfigError: `trained` for an adapter that records no quantized base.
        Whatever `merge_files` raises.
    """
    _, loaded = read(adapter)
    path, revision = base_of(loaded, base)
    check_files(loaded, path, revision, allow_other_base=allow_other_base)
    plan = merging(
        loaded,
        path,
        revision,
        labels=labels_of(loaded),
        trust_remote_code=trust_remote_code,
        allow_other_base=allow_other_base,
    )
    onto = _onto(plan, onto)
    changes = changes_of(plan)
    if onto == "trained":
        changes = as_trained(plan, changes)
    report = merge_files(plan.files, out, changes, dtype=dtype, force=force, observe=observe)
    return Merged(base=path, adapter=str(adapter), onto=onto, report=report)


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
