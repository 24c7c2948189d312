"""`decal merge`: an adapter folded into its base, as a plain model folder."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from decal.errors import AdapterError, ConfigError
from decal.model import names
from decal.model.adapter import Adapter
from decal.model.quantizer import quantizable_modules
from decal.quant import quant_format
from decal.quant.base import Recipe
from decal.quant.identity import combine, digest
from decal.verbs.load import as_dtype, check_fingerprint, labels_of, recorded_quant
from decal.verbs.plan_merge import Merging, changes_of, merging
from decal.verbs.target import QUANTIZER, base_of, metadata_json, read
from decal.weights.changes import Dequantized
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


class _AsTrained:
    """Turns stored weights into those that training computed with, and checks that they are.

    Each weight is cast, packed and dequantized exactly as loading did it. When the last one has
    passed, the hash of all packed bytes must be the one recorded with the adapter; the merge is
    then still in its temporary folder.
    """

    def __init__(self, adapter: Adapter, base: str):
        recorded = metadata_json(adapter, QUANTIZER) or {}
        quant = recorded_quant(recorded)
        self._adapter, self._base = adapter, base
        self.skip = quant.skip_modules
        self._identity = recorded.get("identity")
        self._recipe = Recipe(format=quant.format, block_size=quant.block_size, double=quant.double)
        self._dtype = as_dtype(recorded.get("dtype", "bfloat16"))
        self._waiting: set[str] = set()
        self._digests: dict[str, str] = {}

    def weights(self, plan: Merging) -> dict[str, Dequantized]:
        """All weights that were quantized in training, by file key."""
        transposed = names.transposed_modules(plan.skeleton)
        return {
            plan.key(f"{module}.weight"): Dequantized(self._converter(module, module in transposed))
            for module in quantizable_modules(plan.skeleton, self.skip)
        }

    def _converter(self, module: str, transposed: bool) -> Callable[[Tensor], Tensor]:
        self._waiting.add(module)

        def convert(stored: Tensor) -> Tensor:
            weight = stored.T if transposed else stored
            fmt = quant_format(self._recipe.format)
            packed = fmt.quantize(weight.to(self._dtype).contiguous(), self._recipe)
            self._digests[module] = digest(module, packed)
            self._waiting.discard(module)
            if not self._waiting:
                self._check()
            result = fmt.dequantize(packed, self._dtype)
            return result.T.contiguous() if transposed else result

        return convert

    def _check(self) -> None:
        wanted = self._identity
        if wanted and combine(self._digests) != wanted:
            raise AdapterError(
                f"base `{self._base}` is not the one that adapter `{self._adapter.source}` was"
                " trained on: its quantized weights differ",
                details=[f"trained on {wanted[:16]}…, found {combine(self._digests)[:16]}…"],
                hint="name the right base or revision; nothing was written",
            )


def merge(
    base: str | None,
    adapter: str | Path,
    out: str | Path,
    *,
    dtype: MergeDtype = "keep",
    onto: Onto | None = None,
    force: bool = False,
    trust_remote_code: bool = False,
    observe: Callable[[int, int], None] | None = None,
) -> Merged:
    """Writes base + adapter as a plain model folder, one tensor in memory at a time.

    Args:
        base: hub id or folder; None takes the one the adapter names.
        adapter: run or adapter folder.
        dtype: of the written weights; `keep` leaves each tensor's own.
        onto: `trained` adds the delta to the weights that training computed with (for QLoRA the
            dequantized ones), `original` to the base's own. Default: trained if the adapter was
            trained on a quantized base.
        trust_remote_code: run Python code that comes with the base; its names need it.
        observe: called with bytes done and bytes in total.

    Raises:
        AdapterError: it does not fit, or this is not the base it was trained on.
        ConfigError: `trained` for an adapter that records no quantized base.
        Whatever `merge_files` raises.
    """
    _, loaded = read(adapter)
    path, revision = base_of(loaded, base)
    onto = _onto(loaded, onto)
    check_fingerprint(loaded, path, revision)
    plan = merging(
        loaded, path, revision, labels=labels_of(loaded), trust_remote_code=trust_remote_code
    )
    changes = changes_of(plan)
    if onto == "trained":
        changes = replace(changes, dequantized=_AsTrained(loaded, path).weights(plan))
    report = merge_files(plan.files, out, changes, dtype=dtype, force=force, observe=observe)
    return Merged(base=path, adapter=str(adapter), onto=onto, report=report)


def _onto(adapter: Adapter, asked: Onto | None) -> Onto:
    quantized = metadata_json(adapter, QUANTIZER) is not None
    if asked == "trained" and not quantized:
        raise ConfigError(
            f"adapter `{adapter.source}` does not record a quantized base, so there is nothing but"
            " the original to merge onto",
            hint="leave --onto out",
        )
    return asked or ("trained" if quantized else "original")
