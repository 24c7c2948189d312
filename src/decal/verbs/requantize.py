"""`decal merge --quantize`: merged weights packed again, and whether the update outlives that.

Codes are coarse. The step between two of NF4's values is some tenths of a block's largest weight,
and a weight that training found on such a value goes back to it unless the update moves it by half
a step. So a light fine-tune that is merged onto the dequantized weights of its training and packed
again is gone, to the last code, and the model looks well. It is measured, tensor by tensor from
what was written, as

    survival = <W'' - W, D> / <D, D>      W'' the new codes dequantized, W what D was added to

1 if the update is all there, 0 if nothing is. Noise that has nothing to do with D adds nothing to
it; how large that is beside D is given as `error` = ||W'' - W - D|| / ||D||. Measured on normal
weights, NF4 in blocks of 64 with double quantization, an update of rank 16:

    ||D|| / ||W||         0.0125   0.037   0.10   0.15   0.20   0.37
    onto trained   s, e   0.02 1.1   0.10 1.1   0.84 0.8   0.96 0.6   0.99 0.5   1.00 0.3
    onto original  s, e   1.00 7.4   1.00 2.5   1.00 0.9   0.99 0.6   1.00 0.5   1.00 0.3

Below one half more of the update is lost than kept, and the output is refused. An error above 1 is
no loss of the update, but the codes' noise is larger than all that was trained, and it is another
noise than that of the training; it is said.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from decal.config import QuantConfig
from decal.errors import DecalWarning, VerificationError
from decal.quant import quant_format
from decal.quant.bnb import from_bnb
from decal.store.base import BaseFiles, open_base
from decal.verbs.plan_merge import Merging
from decal.verbs.quantize import Converted, quantize, stored_weights
from decal.weights.changes import Changes
from decal.weights.merge import compare_files
from decal.weights.verify import Verification

SURVIVES = 0.5
"""Share of the update that the new codes must hold."""
WELL = 0.9
"""Share below which it is said."""
LOUD = 1.0
"""Error of the codes, relative to the update, from which it is said."""


def requantize(
    plan: Merging,
    changes: Changes,
    merged: Path,
    out: Path,
    quant: QuantConfig,
    observe: Callable[[int, int], None] | None = None,
) -> tuple[Converted, dict[str, Any]]:
    """Packs the folder `merged` into the folder `out` and measures what is left of the update.

    Raises:
        VerificationError: less than half of it.
        QuantError: weights that the format cannot hold.
        Whatever `quantize` raises.
    """
    packed = quantize(merged, out, quant, observe=observe)
    files = open_base(out)
    findings = compare_files(plan.files, changes, _reader(files, changes))
    found = Verification(findings=findings, pairs=len(findings))
    facts = {"format": quant.format, "survival": found.survival, "error": found.error}
    share = found.survival
    if share is None:
        return packed, facts
    least = min((f for f in findings if f.meant), key=lambda f: f.kept / f.meant)
    said = f"packing the merged weights as {quant.format} keeps {share:.1%} of the update"
    detail = (
        f"least in {least.module}: {least.kept / least.meant:.1%}; the error of the new codes is"
        f" {found.error:.2f} times the update"
    )
    if not share >= SURVIVES:
        raise VerificationError(
            f"{said}: the fine-tune would be lost",
            details=[detail],
            hint="leave --quantize out and keep 16 bits, or keep the adapter apart from its"
            " quantized base; --onto original and int8 lose less",
        )
    if share < WELL or (found.error or 0.0) > LOUD:
        warnings.warn(f"{said}; {detail}", DecalWarning, stacklevel=4)
    return packed, facts


def _reader(files: BaseFiles, changes: Changes) -> Callable[[str], Tensor]:
    """File key -> the written weight, dequantized where it is packed, as the base's file holds it.

    Packed ones are [out, in] in any file, GPT-2's too.
    """
    stored = stored_weights(files)

    def read(key: str) -> Tensor:
        prefix = key.removesuffix(".weight")
        if prefix not in stored:
            return files.read(key)
        packed = from_bnb(prefix, {name: files.read(name) for name in stored[prefix]})
        weight = quant_format(packed.recipe.format).dequantize(packed, torch.float32)
        return weight.T.contiguous() if changes.deltas[key].transposed else weight

    return read
