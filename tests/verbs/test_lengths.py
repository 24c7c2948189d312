"""The largest micro-batch of a run, without building any."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from decal.config import RunConfig
from decal.data.pack import Batches
from decal.data.sample import Sample
from decal.verbs.lengths import Lengths, lengths_of, load_of
from tests.verbs.conftest import settings


def config(**train: Any) -> RunConfig:
    return RunConfig(base="none", data="none", output="none", train=train)


def samples() -> list[Sample]:
    import numpy as np

    found = []
    for i in range(40):
        count = 5 + (i * 37) % 60
        ids = np.arange(count, dtype=np.int32)
        found.append(Sample(row=i + 1, input_ids=ids, trained=ids >= count // 2))
    return found


def test_it_is_the_one_that_training_cuts() -> None:
    """Both layouts. Mutations: take the longest rows of all instead of a step's; forget padding; a
    step's tokens for a micro-batch's; the order of another seed."""
    for layout in ("flat", "padded"):
        asked = config(batch_size=6, micro_batch_tokens=120, epochs=2, seed=3)
        batches = Batches(
            samples=samples(), batch_size=6, micro_batch_tokens=120, seed=3, layout=layout
        )
        steps = [step for _, step in zip(range(14), batches.steps(), strict=False)]
        micro = [batch for step in steps for batch in step.micro]
        found = load_of(Lengths.of(samples()), asked, layout)
        assert found.tokens == max(batch.input_ids.numel() for batch in micro)
        assert found.several == any(len(step.micro) > 1 for step in steps)
        assert found.trained >= max(batch.trained for batch in micro)


def test_without_rows_every_sample_is_as_long_as_may_be(tmp_path: Path) -> None:
    """Mutations: one sample for a step of many; another length than max_length."""
    asked = settings(tmp_path)
    found = lengths_of(asked, rows=False)
    assert found.tokens == (128,) * 8
    assert not found.known
    assert load_of(found, asked).tokens == 8 * 128
    assert load_of(found, config(batch_size=8, micro_batch_tokens=300)).tokens == 2 * 128


def test_rows_are_read_where_they_are(tmp_path: Path) -> None:
    """Mutation: never read them."""
    found = lengths_of(settings(tmp_path), rows=True)
    assert found.known
    assert len(found.tokens) == 72
    assert found.cut(10).longest == 10
