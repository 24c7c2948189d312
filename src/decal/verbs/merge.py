"""`decal merge`: an adapter folded into its base, as a plain model folder."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from decal.adapters.base import LowRank
from decal.errors import AdapterError, ConfigError
from decal.model import hf, names
from decal.model.adapter import Adapter
from decal.model.quantizer import quantizable_modules
from decal.quant import quant_format
from decal.quant.base import Recipe
from decal.quant.identity import combine, digest
from decal.store.base import open_base
from decal.verbs.load import as_dtype, check_fingerprint, recorded_quant
from decal.verbs.target import QUANTIZER, base_of, metadata_json, read
from decal.weights.delta import Deltas, FileDelta
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
            "dequantized": r.dequantized,
            "untouched": r.untouched,
            "untied": list(r.untied),
            "dtype": r.dtype,
            "bytes": r.nbytes,
            "delta_kept_by_rounding": r.survival,
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

    def converter(self, module: str, transposed: bool) -> Callable[[Tensor], Tensor]:
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
        observe: called with bytes done and bytes in total.

    Raises:
        AdapterError: it does not fit, or this is not the base it was trained on.
        ConfigError: `trained` for an adapter that records no quantized base.
        Whatever `merge_files` raises.
    """
    _, loaded = read(adapter)
    path, revision = base_of(loaded, base)
    onto = _onto(loaded, onto)
    files = open_base(hf.local_folder(path, revision))
    check_fingerprint(loaded, path, revision)
    skeleton = names.skeleton(path, revision=revision)
    keys = {name: key for key, name in names.name_map(skeleton, sorted(files.tensors)).items()}
    transposed = names.transposed_modules(skeleton)
    converters: dict[str, Callable[[Tensor], Tensor]] = {}
    if onto == "trained":
        as_trained = _AsTrained(loaded, path)
        for module in quantizable_modules(skeleton, as_trained.skip):
            key = keys.get(f"{module}.weight", f"{module}.weight")
            converters[key] = as_trained.converter(module, module in transposed)
    report = merge_files(
        files,
        out,
        _deltas(loaded, keys, transposed, adapter),
        dequantized=converters,
        tied=_tied(skeleton, keys),
        dtype=dtype,
        force=force,
        observe=observe,
    )
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


def _deltas(
    adapter: Adapter, keys: dict[str, str], transposed: set[str], source: str | Path
) -> Deltas:
    scale = adapter.config.scaling
    by_key = {}
    for module, (A, B, *_) in adapter.tensors.items():
        key = keys.get(f"{module}.weight", f"{module}.weight")
        by_key[key] = FileDelta(LowRank(A, B, scale, 0.0), module in transposed, module)
    return Deltas(by_key, name=str(source), trained_on=adapter.base)


def _tied(skeleton: Any, keys: dict[str, str]) -> dict[str, str]:
    """File key of a tied tensor -> file key of the tensor it shares, where the file has one."""
    tied = getattr(skeleton, "all_tied_weights_keys", None) or {}
    return {keys.get(k, k): keys[source] for k, source in tied.items() if source in keys}
