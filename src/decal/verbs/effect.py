"""A merged folder against base + adapter: the same tokens through both, and how far apart they are.

The merged folder is loaded with plain transformers, as its users will load it; base + adapter are
loaded as training had them (for `--onto original`: the adapter on the base's own weights). Every
distance is relative to the adapter's own effect, the distance of base and base + adapter:

    distance = || merged - adapted || / || adapted - base ||     over all logits looked at

0 is the same model, 1 is as far off as a merge that did nothing. The limit is one half, and more
where 16 bits compute with more noise than that: logits of bfloat16 are off by 1 to 2 % of their
size after some tens of layers (4 u, u = 2^-8), and rounding the weights adds the relative error
that verify.py found. From a limit of 1 on a right merge cannot be told from none; then the distance
is only reported.

Logits are those of random tokens, or of the data's first rows. Rows have losses as well: of base,
adapter and merged model, and for an adapter of a quantized base of both ways to merge it.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from decal.config import DataConfig
from decal.data.batch import IGNORE
from decal.data.chat import Encoder
from decal.data.label import LabelEncoder
from decal.data.source import read_rows
from decal.errors import VerificationError
from decal.model import heads, hf
from decal.model.inject import attach, disabled
from decal.verbs.in_place import merge_in_place
from decal.verbs.load import load_adapter, load_base
from decal.verbs.plan_merge import Merging
from decal.verbs.target import BASE, QUANTIZER, metadata_json
from decal.verbs.text import context_length
from decal.weights.verify import Verification

HALF = 0.5
"""Distance from which a merge is wrong: nearer to no update than to the right one."""
_ROWS = 64
_TOKENS = 64
_POSITIONS = 256
"""Positions whose logits are kept; a vocabulary may have 250,000 tokens."""
_COMPUTE = 4.0
_LONGEST = 1 << 20


class _Row(NamedTuple):
    ids: Tensor
    """int64 [1, T]"""
    targets: Tensor | None
    """int64 [T], or [1] for a class; None for random tokens."""


@dataclass
class _Seen:
    """What one model said."""

    logits: Tensor
    """float32 [N, V]"""
    loss: float | None
    eps: float = 0.0


@dataclass
class _Work:
    """The rows, once a tokenizer is known, and how far all is."""

    data: DataConfig | None
    observe: Callable[[int, int], None] | None
    steps: int
    rows: list[_Row] = field(default_factory=list)
    done: int = 0

    def look(self, model: Any, within: AbstractContextManager[Any] | None = None) -> _Seen:
        """Runs all rows through a model."""
        with within or nullcontext():
            seen = _look(model, self.rows)
        self.done += 1
        if self.observe is not None:
            self.observe(self.done, self.steps)
        return seen


def compare_effect(
    plan: Merging,
    onto: str,
    folder: Path,
    found: Verification,
    *,
    data: DataConfig | None = None,
    observe: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Loads base + adapter and the merged `folder`, and compares what they compute.

    Args:
        onto: `trained` or `original`, which the folder holds.
        found: what was found of the folder's weights.
        data: rows with known answers; None takes random tokens.
        observe: called with models looked at and their number.

    Returns:
        `distance` and its `limit`, `max_difference`, `kl`, `top_1_agreement`, each beside the same
        of the base (`…_of_base`); with data `losses` by model.

    Raises:
        VerificationError: the merged model is further from base + adapter than the limit.
        DataError: rows that cannot be read.
    """
    quantized = metadata_json(plan.adapter, QUANTIZER) is not None
    both = quantized and data is not None
    work = _Work(data, observe, 5 if both else 3)
    base, adapted, losses = _unmerged(plan, onto, work, both)
    auto = AutoModelForCausalLM if plan.labels is None else AutoModelForSequenceClassification
    with hf.Quiet():
        merged = work.look(
            auto.from_pretrained(folder, dtype="auto", trust_remote_code=plan.trust_remote_code)
        )
    losses[f"merged --onto {onto}" if both else "merged"] = merged.loss
    facts = _distances(base, adapted, merged, found)
    if data is not None:
        facts["rows"] = len(work.rows)
        facts["losses"] = losses
    far = facts["distance"] > facts["limit"] and facts["limit"] < 1
    if far or not math.isfinite(facts["distance"]):
        raise VerificationError(
            f"the merged model is {facts['distance']:.2f} of the adapter's effect away from base +"
            f" adapter (0 is the same, 1 is no update; the limit is {facts['limit']:.2f})",
            details=[
                f"largest difference of a logit {facts['max_difference']:.3g}, the adapter moves"
                f" them by up to {facts['max_difference_of_base']:.3g}"
            ],
        )
    return facts


def _unmerged(
    plan: Merging, onto: str, work: _Work, both: bool
) -> tuple[_Seen, _Seen, dict[str, float | None]]:
    """Base and base + adapter as the folder should be, and all losses by model."""
    losses: dict[str, float | None] = {}
    seen: dict[str, tuple[_Seen, _Seen]] = {}
    for name in ("trained", "original"):
        if name != onto and not both:
            continue
        model, tokenizer = _adapted(plan, name)
        if not work.rows:
            work.rows = _rows(model, tokenizer, work.data)
        if name == onto:
            seen[name] = work.look(model, disabled(model)), work.look(model)
            losses["base"] = seen[name][0].loss
        if name == "trained" and (both or onto == "trained"):
            losses["adapter, not merged"] = seen[name][1].loss if seen else work.look(model).loss
        if both and name != onto:
            merge_in_place(model)
            losses[f"merged --onto {name}"] = work.look(model).loss
        if onto == name == "original" and not both:
            losses["adapter, not merged"] = seen[name][1].loss
    return *seen[onto], losses


def _adapted(plan: Merging, onto: str) -> tuple[Any, Any]:
    """Base + adapter: as in training, or on the base's own weights."""
    given = plan.path
    if plan.revision and not Path(plan.path).is_dir():
        given = f"{plan.path}@{plan.revision}"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what they say was said, or is what was asked for
        if onto == "trained" or metadata_json(plan.adapter, QUANTIZER) is None:
            return load_adapter(
                plan.adapter,
                given,
                "auto",
                trust_remote_code=plan.trust_remote_code,
                allow_other_base=plan.allow_other_base,
            )
        model, tokenizer = load_base(
            plan.path,
            revision=plan.revision,
            dtype=(metadata_json(plan.adapter, BASE) or {}).get("dtype", "bfloat16"),
            trust_remote_code=plan.trust_remote_code,
            labels=plan.labels,
        )
        attach(model, plan.adapter, "default", allow_other_base=plan.allow_other_base)
        return model, tokenizer


def _rows(model: Any, tokenizer: Any, data: DataConfig | None) -> list[_Row]:
    longest = context_length(model) or _LONGEST
    if data is None:
        generator = torch.Generator().manual_seed(0)
        size = model.config.get_text_config().vocab_size
        ids = torch.randint(0, size, (4, 1, min(_TOKENS, longest)), generator=generator)
        return [_Row(row, None) for row in ids]
    settings = data.model_copy(update={"max_length": longest, "limit": data.limit or _ROWS})
    rows = read_rows(settings)
    classes = heads.labels_of(model)
    encoder: Any = Encoder(tokenizer, settings)
    if classes is not None:
        encoder = LabelEncoder(tokenizer, settings, classes)
    found = []
    for sample in encoder.encode_all(rows.examples, rows.source):
        ids = torch.from_numpy(sample.input_ids).long()
        if sample.label is not None:
            targets = torch.tensor([sample.label])
        else:
            targets = ids.where(torch.from_numpy(sample.trained), IGNORE).roll(-1)
            targets[-1] = IGNORE
        found.append(_Row(ids[None], targets))
    return found


@torch.no_grad()
def _look(model: Any, rows: Sequence[_Row]) -> _Seen:
    model.eval()
    kept: list[Tensor] = []
    room, total, count = _POSITIONS, 0.0, 0
    for ids, targets in rows:
        logits = model(input_ids=ids.to(model.device), use_cache=False).logits.cpu().float()
        logits = logits.reshape(-1, logits.shape[-1])
        kept.append(logits[:room].clone())
        room -= kept[-1].shape[0]
        if targets is not None:
            total += float(functional.cross_entropy(logits, targets, reduction="sum"))
            count += int((targets != IGNORE).sum())
        elif room <= 0:
            break
    loss = total / count if count else None
    return _Seen(torch.cat(kept), loss, torch.finfo(model.dtype).eps)


def _distances(base: _Seen, adapted: _Seen, merged: _Seen, found: Verification) -> dict[str, Any]:
    a, b, c = base.logits, adapted.logits, merged.logits
    effect = float((b - a).norm())
    wrong = float((c - b).norm())
    size = float((b - b.mean(dim=-1, keepdim=True)).norm())
    rounding = max(adapted.eps, merged.eps) / 2
    noise = _COMPUTE * rounding * size / effect + (found.error or 0.0) if effect else 1.0
    return {
        "distance": wrong / effect if effect else 0.0,
        "limit": max(HALF, noise),
        "max_difference": float((c - b).abs().max()),
        "max_difference_of_base": float((b - a).abs().max()),
        "kl": _kl(b, c),
        "kl_of_base": _kl(b, a),
        "top_1_agreement": float((b.argmax(-1) == c.argmax(-1)).float().mean()),
        "top_1_agreement_of_base": float((b.argmax(-1) == a.argmax(-1)).float().mean()),
        "positions": b.shape[0],
    }


def _kl(wanted: Tensor, found: Tensor) -> float:
    """KL(wanted || found) of the next token, in nats, mean over positions."""
    p, q = (functional.log_softmax(logits, dim=-1) for logits in (wanted, found))
    return float((p.exp() * (p - q)).sum(dim=-1).mean())
