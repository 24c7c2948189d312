"""F9: labels are all masked, or rows cut after masking: the loss is 0 or NaN and nobody objects."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from decal.data.batch import Batch
from decal.data.pack import flat_batch, padded_batch
from decal.data.sample import Sample
from decal.data.stats import summarize
from decal.errors import DataError, TrainingError
from decal.objectives import sft
from decal.train.loop import train
from tests import zoo
from tests.data.chats import chat, encoder
from tests.train.tiny_run import MemoryRun, TinyStep, job

LONG, SHORT = chat("why? " * 20, "because", row=3), chat("why?", "because", row=4)


def nothing() -> Sample:
    """What cutting after masking leaves of a row whose answer comes last."""
    return Sample(row=3, input_ids=np.arange(5, 25, dtype=np.int32), trained=np.zeros(20, bool))


def test_rows_with_nothing_left_to_train_are_an_error() -> None:
    """All of them in one error, counted. Fails when truncation comes after the check."""
    with pytest.raises(DataError, match="none of the first 40") as error:
        encoder(zoo.tokenizer(), 40).encode(LONG)
    assert "max_length" in str(error.value)
    with pytest.raises(DataError, match="1 of 2 rows"):
        encoder(zoo.tokenizer(), 40).encode_all([LONG, SHORT])


def test_what_truncation_cuts_is_counted() -> None:
    """Half an answer is trained, its end is not, and that is in the lines before step 1.

    Fails when lost tokens are counted after the cut.
    """
    whole = encoder(zoo.tokenizer(), 500).encode(LONG)
    cut = encoder(zoo.tokenizer(), len(whole) - 4).encode(LONG)  # "se", the end and a line break
    assert whole.ended
    assert not cut.ended
    assert (cut.truncated, cut.lost) == (4, 3)
    assert int(cut.trained.sum()) == int(whole.trained.sum()) - 3
    lines = " ".join(summarize([cut]).lines())
    assert "end-of-turn token trained in 0 of 1 row" in lines
    assert "1 row truncated (100.0%): 4 tokens cut, 3 of them trained" in lines


def test_long_rows_are_dropped_on_request_and_counted() -> None:
    """Fails when dropped rows are not counted, or a run goes on with none."""
    dropping = encoder(zoo.tokenizer(), 40, overflow="drop")
    assert [s.row for s in dropping.encode_all([LONG, SHORT])] == [4]
    assert dropping.dropped == (3,)
    with pytest.raises(DataError):
        dropping.encode_all([LONG])


@pytest.mark.parametrize("layout", [flat_batch, padded_batch])
def test_a_batch_with_nothing_to_train_reaches_no_loss(layout: Any) -> None:
    """The encoder's check taken away: the objective refuses, naming the rows."""
    with pytest.raises(DataError, match="rows 3"):
        sft.trained_positions(layout([nothing()]))


def test_a_step_with_nothing_to_train_is_not_taken() -> None:
    """The objective's check taken away too: the loop refuses."""

    def loss(batch: Batch, epoch: int | None) -> tuple[torch.Tensor, int]:
        return torch.zeros((), requires_grad=True), 0

    class Steps:
        steps_per_epoch = 1

        def steps(self, start: int) -> Any:
            yield TinyStep(0, 0, [flat_batch([nothing()])])

    with pytest.raises(TrainingError, match="no trained token"):
        train(job(MemoryRun(), steps=Steps(), loss=loss))


def test_without_the_guards_the_loss_is_nan_or_zero() -> None:
    """What a mean and a sum over no token give, in a real model; the gradient is no error."""
    model, batch = zoo.build("llama").train(), padded_batch([nothing()])
    assert model(input_ids=batch.input_ids, labels=batch.targets).loss.isnan()
    summed = model(input_ids=batch.input_ids, labels=batch.targets, num_items_in_batch=1).loss
    summed.backward()
    assert float(summed.detach()) == 0
    assert float(model.lm_head.weight.grad.norm()) == 0


def test_masking_before_truncation_by_hand() -> None:
    """The same row, masked whole and then cut: not one label is left, and nothing says so."""
    whole = encoder(zoo.tokenizer(), 500).encode(LONG)
    labels = np.where(whole.trained, whole.input_ids, -100)
    assert (labels != -100).sum() == len("because") + 1
    assert (labels[:40] != -100).sum() == 0
