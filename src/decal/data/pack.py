"""Samples -> micro-batches: order, optimizer steps, token budgets, both layouts. Knows no models.

A step takes `batch_size` samples in the order of its epoch; the order is a permutation of the
samples from (seed, epoch) alone (order.py), so any step can be built without those before it: that
is all there is to resuming. The last step of an epoch is smaller if the samples do not divide
evenly; nothing is dropped, nothing is mixed across epochs.

Inside a step the samples are put into as few micro-batches as `micro_batch_tokens` allows: longest
first, each into the fullest micro-batch that still has room (best-fit decreasing). A sample longer
than the budget goes alone. Losses are summed over the step and divided by its trained tokens, so
the cut changes nothing but memory and rounding.

Rejected: packing to a fixed length over the whole data set, which is a little denser but makes the
number of samples in a step, and so the result, depend on the budget.
"""

from __future__ import annotations

import math
from bisect import bisect_left, insort
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import count, pairwise
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from decal.data.batch import IGNORE, Batch
from decal.data.order import permutation
from decal.data.sample import Sample
from decal.errors import DataError

LayoutName = Literal["flat", "padded"]


@dataclass(frozen=True, kw_only=True)
class Step:
    """One optimizer step."""

    index: int
    """Steps before this one; the first is 0."""
    epoch: int
    """Finished passes over the data; the first is 0."""
    micro: list[Batch]
    """What to run forward and backward before the optimizer steps once."""
    trained: int
    """Trained tokens (or samples with labels) in all micro-batches: what the summed loss is divided
    by."""
    tokens: int
    """Tokens in all micro-batches, padding apart."""
    rows: tuple[int, ...]
    """Ids of the samples, in the order of the epoch."""


@dataclass(frozen=True, kw_only=True)
class Batches:
    """The samples as optimizer steps, epoch after epoch; the training loop says when to stop.

    Raises:
        DataError: there are no samples.
    """

    samples: Sequence[Sample]
    batch_size: int
    """Samples per step."""
    micro_batch_tokens: int
    """Most tokens in a micro-batch; in the padded layout padding counts."""
    seed: int = 0
    layout: LayoutName = "flat"
    pad_id: int = 0
    """Fills padded rows. Any id will do: padding is masked by position."""

    def __post_init__(self) -> None:
        if not self.samples:
            raise DataError("there are no rows to train on")

    @property
    def steps_per_epoch(self) -> int:
        """Steps in a whole pass; the last may be smaller."""
        return math.ceil(len(self.samples) / self.batch_size)

    def order(self, epoch: int) -> NDArray[np.int64]:
        """Indices of the samples in the order of an epoch, int64 [n]."""
        return permutation(len(self.samples), self.seed, epoch)

    def steps(self, start: int = 0) -> Iterator[Step]:
        """The steps from index `start` on, without end; each is built when it is asked for."""
        order, order_epoch = self.order(0), 0
        for index in count(start):
            epoch, place = divmod(index, self.steps_per_epoch)
            if epoch != order_epoch:
                order, order_epoch = self.order(epoch), epoch
            chosen = order[place * self.batch_size : (place + 1) * self.batch_size]
            yield self._step(index, epoch, [self.samples[i] for i in chosen.tolist()])

    def _step(self, index: int, epoch: int, samples: Sequence[Sample]) -> Step:
        micro = make_batches(
            samples, self.micro_batch_tokens, layout=self.layout, pad_id=self.pad_id
        )
        return Step(
            index=index,
            epoch=epoch,
            micro=micro,
            trained=sum(batch.trained for batch in micro),
            tokens=sum(batch.tokens for batch in micro),
            rows=tuple(sample.row for sample in samples),
        )


def make_batches(
    samples: Sequence[Sample],
    micro_batch_tokens: int,
    *,
    layout: LayoutName = "flat",
    pad_id: int = 0,
) -> list[Batch]:
    """Put all samples into as few batches as the budget allows: one step, or evaluation.

    Deterministic: depends on the samples, their order and the budget only.
    """
    lengths = [len(sample) for sample in samples]
    build = flat_batch if layout == "flat" else padded_batch
    return [
        build([samples[i] for i in group], pad_id)
        for group in groups(layout, lengths, micro_batch_tokens)
    ]


def join(batches: Sequence[Batch]) -> Batch:
    """Batches of one layout as one, in their order; padded ones as wide as the widest."""
    first, *others = batches
    if not others:
        return first
    width = max(batch.input_ids.shape[1] for batch in batches)

    def joined(name: str, fill: int) -> Any:
        parts = [getattr(batch, name) for batch in batches]
        if parts[0] is None:
            return None
        if first.layout == "flat":
            return torch.cat(parts, dim=1)
        room = [width - part.shape[1] for part in parts]
        pairs = zip(parts, room, strict=True)
        return torch.cat([torch.nn.functional.pad(p, (0, n), value=fill) for p, n in pairs])

    positions = joined("positions", 0)
    if first.layout == "padded":
        positions = torch.arange(width).repeat(positions.shape[0], 1)
    return Batch(
        layout=first.layout,
        input_ids=joined("input_ids", 0),
        targets=joined("targets", IGNORE),
        positions=positions,
        attention=joined("attention", 0),
        cu_seq_lens=_bounds(batches) if first.cu_seq_lens is not None else None,
        max_length=max(batch.max_length for batch in batches),
        sample_ids=joined("sample_ids", 0) if first.layout == "flat" else _widened(batches, width),
        rows=tuple(row for batch in batches for row in batch.rows),
        trained=sum(batch.trained for batch in batches),
        tokens=sum(batch.tokens for batch in batches),
        labels=None if first.labels is None else torch.cat([b.labels for b in batches]),  # type: ignore[misc]
    )


def _bounds(batches: Sequence[Batch]) -> Tensor:
    """int32: where each sample of flat batches begins when they lie one after the other."""
    lengths = [batch.cu_seq_lens.diff() for batch in batches]  # type: ignore[union-attr]
    return torch.nn.functional.pad(torch.cat(lengths).cumsum(0), (1, 0)).to(torch.int32)


def _widened(batches: Sequence[Batch], width: int) -> Tensor:
    """int64 [n, width]: the id of every row's sample."""
    return torch.cat([batch.sample_ids[:, :1] for batch in batches]).repeat(1, width)


def split(batch: Batch, micro_batch_tokens: int) -> list[Batch]:
    """The samples of a batch in batches of at most so many tokens; the batch itself if it fits.

    For a machine whose memory turned out too small for a batch: the same samples, targets and ids.
    A sample longer than that goes alone.
    """
    if batch.input_ids.numel() <= micro_batch_tokens or len(batch.rows) == 1:
        return [batch]
    if batch.cu_seq_lens is not None:
        bounds = batch.cu_seq_lens.tolist()
        lengths = [end - begin for begin, end in pairwise(bounds)]
    else:
        assert batch.attention is not None
        lengths = batch.attention.sum(dim=1).tolist()
    part = _flat_part if batch.layout == "flat" else _padded_part
    parts = groups(batch.layout, lengths, micro_batch_tokens)
    return [part(batch, lengths, group) for group in parts]


def _flat_part(batch: Batch, lengths: Sequence[int], chosen: Sequence[int]) -> Batch:
    ends = np.cumsum(lengths)
    ranges = [np.arange(ends[i] - lengths[i], ends[i]) for i in chosen]
    places = torch.from_numpy(np.concatenate(ranges))
    bounds = np.cumsum([0, *(lengths[i] for i in chosen)])
    return _part(
        batch,
        chosen,
        lambda tensor: tensor[:, places],
        cu_seq_lens=torch.from_numpy(bounds.astype(np.int32)),
        max_length=max(lengths[i] for i in chosen),
        tokens=int(bounds[-1]),
    )


def _padded_part(batch: Batch, lengths: Sequence[int], chosen: Sequence[int]) -> Batch:
    longest = max(lengths[i] for i in chosen)
    return _part(
        batch,
        chosen,
        lambda tensor: tensor[list(chosen), :longest].contiguous(),
        max_length=longest,
        tokens=sum(lengths[i] for i in chosen),
    )


def _part(
    batch: Batch, chosen: Sequence[int], take: Callable[[Tensor], Tensor], **changes: Any
) -> Batch:
    targets = take(batch.targets)
    labels = None if batch.labels is None else batch.labels[list(chosen)]
    return replace(
        batch,
        input_ids=take(batch.input_ids),
        targets=targets,
        positions=take(batch.positions),
        attention=None if batch.attention is None else take(batch.attention),
        sample_ids=take(batch.sample_ids),
        rows=tuple(batch.rows[i] for i in chosen),
        trained=int((targets != IGNORE).sum()) if labels is None else len(labels),
        labels=labels,
        **changes,
    )


def flat_batch(samples: Sequence[Sample], pad_id: int = 0) -> Batch:
    """All samples in one row, one after the other; `pad_id` is not needed and ignored.

    Raises:
        ValueError: samples with labels: classification heads pool the positions of a row.
    """
    if any(sample.label is not None for sample in samples):
        raise ValueError("samples with labels need the padded layout")
    lengths = np.array([len(sample) for sample in samples], dtype=np.int64)
    bounds = np.concatenate([[0], np.cumsum(lengths)])
    ids = np.concatenate([sample.input_ids for sample in samples]).astype(np.int64)
    targets = np.concatenate([_targets(sample) for sample in samples])
    positions = np.arange(bounds[-1], dtype=np.int64) - np.repeat(bounds[:-1], lengths)
    rows = np.array([sample.row for sample in samples], dtype=np.int64)
    return Batch(
        layout="flat",
        input_ids=torch.from_numpy(ids)[None],
        targets=torch.from_numpy(targets)[None],
        positions=torch.from_numpy(positions)[None],
        attention=None,
        cu_seq_lens=torch.from_numpy(bounds.astype(np.int32)),
        max_length=int(lengths.max()),
        sample_ids=torch.from_numpy(np.repeat(rows, lengths))[None],
        rows=tuple(rows.tolist()),
        trained=int((targets != IGNORE).sum()),
        tokens=int(bounds[-1]),
    )


def padded_batch(samples: Sequence[Sample], pad_id: int = 0) -> Batch:
    """One row per sample, filled up on the right with `pad_id`."""
    lengths = [len(sample) for sample in samples]
    shape = (len(samples), max(lengths))
    ids = np.full(shape, pad_id, dtype=np.int64)
    targets = np.full(shape, IGNORE, dtype=np.int64)
    attention = np.zeros(shape, dtype=np.int64)
    for i, sample in enumerate(samples):
        ids[i, : len(sample)] = sample.input_ids
        targets[i, : len(sample)] = _targets(sample)
        attention[i, : len(sample)] = 1
    rows = np.array([sample.row for sample in samples], dtype=np.int64)
    labels = [sample.label for sample in samples if sample.label is not None]
    return Batch(
        layout="padded",
        input_ids=torch.from_numpy(ids),
        targets=torch.from_numpy(targets),
        positions=torch.arange(shape[1]).repeat(shape[0], 1),
        attention=torch.from_numpy(attention),
        cu_seq_lens=None,
        max_length=shape[1],
        sample_ids=torch.from_numpy(np.repeat(rows[:, None], shape[1], axis=1)),
        rows=tuple(rows.tolist()),
        trained=len(labels) or int((targets != IGNORE).sum()),
        tokens=sum(lengths),
        labels=torch.tensor(labels, dtype=torch.int64) if labels else None,
    )


def _targets(sample: Sample) -> NDArray[np.int64]:
    """The token each position must predict, or IGNORE: ids and mask moved one to the left."""
    targets = np.full(len(sample), IGNORE, dtype=np.int64)
    trained = sample.trained[1:]
    targets[:-1][trained] = sample.input_ids[1:][trained]
    return targets


def groups(layout: LayoutName, lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Samples of these lengths, by their indices, as micro-batches of at most so many tokens."""
    return (_flat_groups if layout == "flat" else _padded_groups)(lengths, budget)


def _longest_first(lengths: Sequence[int]) -> list[int]:
    return sorted(range(len(lengths)), key=lambda i: -lengths[i])


def _flat_groups(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Best-fit decreasing: the total length of a group is at most the budget."""
    groups: list[list[int]] = []
    room: list[tuple[int, int]] = []
    for i in _longest_first(lengths):
        at = bisect_left(room, (lengths[i], -1))
        if at < len(room):
            left, group = room.pop(at)
        else:
            left, group = budget, len(groups)
            groups.append([])
        groups[group].append(i)
        insort(room, (left - lengths[i], group))
    return groups


def _padded_groups(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Neighbours in length together: samples times the longest is at most the budget."""
    groups: list[list[int]] = []
    for i in _longest_first(lengths):
        if not groups or (len(groups[-1]) + 1) * lengths[groups[-1][0]] > budget:
            groups.append([])
        groups[-1].append(i)
    return groups
