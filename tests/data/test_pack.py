"""Steps and micro-batches: order, resuming, budgets, both layouts."""

from __future__ import annotations

from collections import Counter
from dataclasses import fields, replace
from itertools import islice

import numpy as np
import pytest
import torch

from decal.data.batch import IGNORE, Batch
from decal.data.pack import (
    Batches,
    Step,
    flat_batch,
    join,
    make_batches,
    padded_batch,
    split,
)
from decal.data.sample import Sample
from decal.errors import DataError


def sample(row: int, length: int, first_trained: int) -> Sample:
    ids = np.arange(length, dtype=np.int32) + 100 * row
    return Sample(row=row, input_ids=ids, trained=np.arange(length) >= first_trained)


def samples(n: int) -> list[Sample]:
    return [sample(row, 3 + (7 * row) % 13, 1 + row % 2) for row in range(1, n + 1)]


def batches(n: int = 11, *, budget: int = 30, seed: int = 5, layout: str = "flat") -> Batches:
    return Batches(
        samples=samples(n),
        batch_size=4,
        micro_batch_tokens=budget,
        seed=seed,
        layout="flat" if layout == "flat" else "padded",
    )


def take(data: Batches, count: int, start: int = 0) -> list[Step]:
    return list(islice(data.steps(start), count))


def test_flat_layout() -> None:
    """Every tensor literally. Mutations: do not shift the targets; shift across samples; let the
    positions run on; give cu_seq_lens without the leading 0."""
    batch = flat_batch([sample(7, 3, 1), sample(9, 4, 2)])
    assert batch.layout == "flat"
    assert batch.input_ids.tolist() == [[700, 701, 702, 900, 901, 902, 903]]
    assert batch.targets.tolist() == [[701, 702, IGNORE, IGNORE, 902, 903, IGNORE]]
    assert batch.positions.tolist() == [[0, 1, 2, 0, 1, 2, 3]]
    assert batch.sample_ids.tolist() == [[7, 7, 7, 9, 9, 9, 9]]
    assert batch.cu_seq_lens is not None
    assert batch.cu_seq_lens.tolist() == [0, 3, 7]
    assert batch.cu_seq_lens.dtype == torch.int32
    assert batch.attention is None
    assert (batch.max_length, batch.rows, batch.trained, batch.tokens) == (4, (7, 9), 4, 7)
    dtypes = {t.dtype for t in (batch.input_ids, batch.targets, batch.positions, batch.sample_ids)}
    assert dtypes == {torch.int64}


def test_padded_layout() -> None:
    """Mutations: pad on the left; train the padding; count padding as tokens."""
    batch = padded_batch([sample(7, 3, 1), sample(9, 4, 2)], pad_id=1)
    assert batch.layout == "padded"
    assert batch.input_ids.tolist() == [[700, 701, 702, 1], [900, 901, 902, 903]]
    assert batch.targets.tolist() == [[701, 702, IGNORE, IGNORE], [IGNORE, 902, 903, IGNORE]]
    assert batch.attention is not None
    assert batch.attention.tolist() == [[1, 1, 1, 0], [1, 1, 1, 1]]
    assert batch.positions.tolist() == [[0, 1, 2, 3]] * 2
    assert batch.sample_ids.tolist() == [[7] * 4, [9] * 4]
    assert batch.cu_seq_lens is None
    assert (batch.max_length, batch.rows, batch.trained, batch.tokens) == (4, (7, 9), 4, 7)


def test_every_epoch_holds_every_row_once() -> None:
    """Mutations: drop the last, smaller step; carry rows over into the next epoch; the same order
    in every epoch."""
    data = batches()
    assert data.steps_per_epoch == 3
    steps = take(data, 6)
    assert [step.index for step in steps] == list(range(6))
    assert [step.epoch for step in steps] == [0, 0, 0, 1, 1, 1]
    assert [len(step.rows) for step in steps] == [4, 4, 3] * 2
    epochs = [[row for step in steps[i : i + 3] for row in step.rows] for i in (0, 3)]
    assert [sorted(epoch) for epoch in epochs] == [list(range(1, 12))] * 2
    assert epochs[0] != epochs[1]
    assert take(batches(seed=6), 1)[0].rows != steps[0].rows


def test_a_step_holds_its_rows_whatever_the_layout_and_budget() -> None:
    """Mutation: count `batch_size` in micro-batches."""
    expected = [(step.rows, step.trained, step.tokens) for step in take(batches(), 5)]
    for layout in ("flat", "padded"):
        for budget in (8, 17, 10_000):
            steps = take(batches(budget=budget, layout=layout), 5)
            assert [(step.rows, step.trained, step.tokens) for step in steps] == expected
            for step in steps:
                rows = Counter(row for batch in step.micro for row in batch.rows)
                assert rows == Counter(step.rows)
                assert step.trained == sum(int((b.targets != IGNORE).sum()) for b in step.micro)


def same(a: Batch, b: Batch) -> bool:
    if a.rows != b.rows or a.trained != b.trained:
        return False
    return torch.equal(a.input_ids, b.input_ids) and torch.equal(a.targets, b.targets)


@pytest.mark.parametrize("start", [1, 3, 5, 8])
def test_resuming_gives_the_same_steps(start: int) -> None:
    """Mutations: begin at the epoch's first step; key by the seed alone."""
    whole, rest = take(batches(), 10)[start:], take(batches(), 10 - start, start)
    assert [step.index for step in rest] == list(range(start, 10))
    for a, b in zip(whole, rest, strict=True):
        assert (a.index, a.epoch, a.rows) == (b.index, b.epoch, b.rows)
        assert all(same(x, y) for x, y in zip(a.micro, b.micro, strict=True))


@pytest.mark.parametrize("layout", ["flat", "padded"])
def test_budget_is_kept(layout: str) -> None:
    """Mutations: allow one sample too many; refuse or cut a sample longer than the budget."""
    many = samples(40)
    groups = make_batches(many, 14, layout="flat" if layout == "flat" else "padded")
    assert sorted(row for batch in groups for row in batch.rows) == list(range(1, 41))
    for batch in groups:
        assert batch.input_ids.numel() <= 14 or len(batch.rows) == 1
    assert any(batch.input_ids.numel() > 14 for batch in groups)


def test_flat_batches_are_dense() -> None:
    """Best fit beats the order given. Mutations: look at the last batch only; take the emptiest."""
    lengths = [2, 6, 5, 3, 4]
    groups = make_batches([sample(i, n, 1) for i, n in enumerate(lengths)], 10)
    assert sorted(batch.tokens for batch in groups) == [10, 10]


def test_no_rows() -> None:
    with pytest.raises(DataError, match="no rows to train on"):
        Batches(samples=[], batch_size=2, micro_batch_tokens=8)


@pytest.mark.parametrize("layout", ["flat", "padded"])
@pytest.mark.parametrize("budget", [1, 15, 16, 40])
def test_a_split_batch_is_its_samples_packed_anew(layout: str, budget: int) -> None:
    """Every field equals that of a batch built from the same samples, with labels and without.

    Fails when bounds, targets or widths are those of the batch that was split.
    """
    for labels in (False, True) if layout == "padded" else (False,):
        chosen = [replace(s, label=s.row % 3 if labels else None) for s in samples(7)]
        build = padded_batch if layout == "padded" else flat_batch
        whole = build(chosen)
        parts = split(whole, budget)
        by_row = {s.row: s for s in chosen}
        assert sorted(row for part in parts for row in part.rows) == sorted(by_row)
        for part in parts:
            assert len(part.rows) == 1 or part.input_ids.numel() <= budget
            again = build([by_row[row] for row in part.rows])
            for field in fields(Batch):
                ours, theirs = getattr(part, field.name), getattr(again, field.name)
                if isinstance(theirs, torch.Tensor):
                    assert ours.dtype == theirs.dtype, field.name
                    assert torch.equal(ours, theirs), field.name
                else:
                    assert ours == theirs, field.name
        assert len(parts) == len(chosen) or budget > 1
        assert [p.rows for p in parts] == [
            p.rows for p in make_batches(chosen, budget, layout=whole.layout)
        ]


def test_a_batch_that_fits_is_not_split() -> None:
    """Fails when it is rebuilt, or when a single long sample is cut."""
    batch = flat_batch(samples(3))
    assert split(batch, batch.tokens) == [batch]
    single = flat_batch(samples(1))
    assert split(single, 1) == [single]


@pytest.mark.parametrize("layout", ["flat", "padded"])
def test_joined_batches_are_one_batch_of_all_samples(layout: str) -> None:
    """Mutations: let bounds begin at zero for each part; pad positions with zeros, or targets with
    a token; forget the ids of the padding."""
    build = flat_batch if layout == "flat" else padded_batch
    some = samples(7)
    parts = [build(some[:3]), build(some[3:4]), build(some[4:])]
    assert same(join(parts), build(some))
    assert join(parts[:1]) is parts[0]


@pytest.mark.parametrize("layout", ["flat", "padded"])
def test_joining_and_splitting_gives_the_parts(layout: str) -> None:
    """Each sample alone is what it was. Mutation: order the samples anew."""
    build = flat_batch if layout == "flat" else padded_batch
    some = samples(6)
    joined = join([build(some[:4]), build(some[4:])])
    alone = {part.rows: part for part in split(joined, 1)}
    assert len(alone) == 6
    for one in some:
        assert same(alone[(one.row,)], build([one]))


def test_labels_are_joined() -> None:
    """Mutation: keep those of the first batch alone."""
    some = [replace(each, label=each.row % 3) for each in samples(5)]
    joined = join([padded_batch(some[:2]), padded_batch(some[2:])])
    assert same(joined, padded_batch(some))
    assert joined.labels is not None
    assert joined.labels.tolist() == [each.label for each in some]
    assert joined.trained == 5
