"""When memory runs out: the same step again, in smaller micro-batches.

The loss of a step is a sum over its tokens divided by their number, so how it is cut changes memory
and rounding and nothing else (loop.py). A forward or backward pass that finds no memory therefore
need not end a run: the gradients so far are forgotten, torch's generators are set back, the
micro-batch that did not fit is halved, and the step begins anew. Dropout is a function of sample
and position and is the same. The smaller size stays for the rest of the run and is part of the
checkpoint, so that a resumed run cuts its steps as the other would have. Nothing can be cut below
one sample: then it is an error that says what else needs less.

Rejected: growing back later (the next long step would fail again, and costs a step each time), and
retrying the update of the optimizer, whose need does not depend on the batch. Where the system
hands out more memory than it has (Linux does) and kills the process later, there is no error to
catch: such a run is resumed with a smaller train.micro_batch_tokens.

Knows what a batch is (data/pack.py cuts it), and nothing of models.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch

from decal.data.batch import Batch
from decal.data.pack import split
from decal.errors import TrainingError
from decal.train.checkpoint import Progress
from decal.train.events import Job, Note

_SIGNS = (
    "out of memory",
    "can't allocate memory",
    "not enough memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
)
"""What allocators write that have no exception of their own: CPU, MPS, cuBLAS."""

T = TypeVar("T")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocator of the CPU or of a GPU found no memory."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in _SIGNS)


def fitted(
    job: Job,
    progress: Progress,
    batches: Sequence[Batch],
    work: Callable[[Batch], T],
    *,
    undo: Callable[[], None],
    tell: Callable[[int, int], None],
    where: str,
) -> tuple[list[Batch], list[T]]:
    """`work` of every batch, cut so that memory suffices; returns the batches and what came of it.

    Where memory runs out, `undo` is called and all of it begins anew with smaller batches. `tell`
    hears after each how many are done, and of how many. `where` says what is done: `in step 7`.

    Raises:
        TrainingError: one sample alone needs too much.
    """
    device = next(iter(job.parameters.values())).device
    generators = _generators(device)
    while True:
        cut = fitting(batches, progress.micro_batch_tokens)
        results: list[T] = []
        try:
            for number, batch in enumerate(cut, 1):
                results.append(work(batch))
                tell(number, len(cut))
            return cut, results
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            failed = cut[len(results)]
            if len(failed.rows) == 1:
                raise hopeless(job, failed, where, error) from error
        # The error is gone here, and with it the frames that held activations.
        del results
        undo()
        _set_generators(device, generators)
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
        tokens = failed.input_ids.numel() // 2
        progress.micro_batch_tokens = tokens
        text = (
            f"memory ran out {where} with {failed.input_ids.numel():,} tokens at once: from here "
            f"on at most {tokens:,}; the result is the same"
        )
        job.observe(Note(text=text))


def fitting(batches: Sequence[Batch], tokens: int | None) -> list[Batch]:
    """The batches, split to at most so many tokens; None leaves them as they are."""
    if tokens is None:
        return list(batches)
    return [part for batch in batches for part in split(batch, tokens)]


def _generators(device: torch.device) -> list[torch.Tensor]:
    states = [torch.get_rng_state()]
    return [*states, torch.cuda.get_rng_state(device)] if device.type == "cuda" else states


def _set_generators(device: torch.device, states: Sequence[torch.Tensor]) -> None:
    torch.set_rng_state(states[0])
    if device.type == "cuda":
        torch.cuda.set_rng_state(states[1], device)


def hopeless(job: Job, batch: Batch, where: str, error: BaseException) -> TrainingError:
    ways = ["data.max_length"]
    if not job.settings.gradient_checkpointing:
        ways.insert(0, "train.gradient_checkpointing: true")
    text = " ".join(str(error).split())
    return TrainingError(
        f"out of memory {where}: row {batch.rows[0]} alone, {batch.tokens:,} tokens, is too much",
        details=[text[:200]] if text else [],
        hint=f"{', a smaller '.join(ways)}, or a base in fewer bits (quant: nf4) needs less; "
        "checkpoints written before are intact",
    )
