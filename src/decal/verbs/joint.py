"""Micro-batches of several candidates in one pass: one base, each row with its own adapter.

Rows of a candidate lie side by side, and the routing says where each begins, what it drops and
which of its rows reach the head. What comes out is every candidate's own sum of losses.

Knows nothing of training; `train/together.py` asks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from decal.adapters import DropoutKey, Routing, routed
from decal.data.batch import Batch
from decal.data.pack import join
from decal.model import attention
from decal.model.inject import adapters_of
from decal.objectives import OBJECTIVES
from decal.train.together import Share
from decal.verbs.loss import batch_losses
from decal.verbs.session import Session


def losses(sessions: Mapping[str, Session], shares: Sequence[Share]) -> list[Tensor]:
    """The sum of each share's token losses, as `Session.loss` of the share alone.

    Args:
        sessions: by name; all with one model, one objective and one layout.
        shares: all learning, or all evaluating.
    """
    first = sessions[shares[0].name]
    model, objective = first.model, OBJECTIVES[first.config.objective]
    learning = shares[0].epoch is not None
    if model.training != learning:
        model.train(learning)
    batch = join([share.batch for share in shares]).to(model.device)
    keep = objective.trained_positions(batch)
    rows = keep * batch.input_ids.shape[1] if objective.POOLS else attention.head_rows(batch, keep)
    with routed(_routing(sessions, shares, batch, rows)):
        found = batch_losses(model, batch, objective, first.head)
    parts = found.split([share.batch.trained for share in shares])
    return [part.sum() for part in parts]


def _routing(
    sessions: Mapping[str, Session], shares: Sequence[Share], batch: Batch, rows: Tensor
) -> Routing:
    """Adapters and dropout of one pass; `rows` of the flattened batch reach the head."""
    flat = batch.layout == "flat"
    width = 1 if flat else batch.input_ids.shape[1]
    ids, positions = batch.sample_ids.flatten(), batch.positions.flatten()
    segments, kept, keys = [], [], []
    start = 0
    for share in shares:
        session = sessions[share.name]
        units = share.batch.input_ids.shape[1] if flat else len(share.batch.rows)
        own = slice(start, start + units * width)
        reach = rows[(rows >= own.start) & (rows < own.stop)] - start
        key = None
        settings = adapters_of(session.model)[session.adapter]
        if share.epoch is not None and settings.lora_dropout > 0:
            seed = session.config.train.seed
            key = DropoutKey(seed, share.epoch, ids[own], positions[own], reach)
        segments.append((session.adapter, units))
        kept.append(reach.numel())
        keys.append(key)
        start = own.stop
    return Routing(segments=tuple(segments), kept=tuple(kept), keys=tuple(keys))
