"""What goes into a training and what comes out of it: the job, the events on the way, the result.

Only types. `Steps` and `RunFolder` are structural: the loop knows what it needs of the data and of
the run folder, and nothing of packing, files or formats.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor
from torch.nn import Parameter

from decal.config import TrainConfig
from decal.data.batch import Batch
from decal.errors import DecalError

Loss = Callable[[Batch, int | None], tuple[Tensor, int]]
"""(micro-batch, epoch) -> (sum of the token losses: scalar that requires grad, trained tokens).

The epoch is part of the dropout key. None means evaluation: no dropout."""


class Step(Protocol):
    """One optimizer step's data."""

    @property
    def index(self) -> int:
        """Optimizer steps before this one, over the whole run."""
        ...

    @property
    def epoch(self) -> int: ...

    @property
    def micro(self) -> Sequence[Batch]:
        """The step's samples, cut into forward passes."""
        ...


class Steps(Protocol):
    """The training data as optimizer steps, endless or at least as long as the run."""

    @property
    def steps_per_epoch(self) -> int: ...

    def steps(self, start: int) -> Iterator[Step]:
        """The steps from index `start` on, the same ones whatever was asked for before."""
        ...


class Checkpoint(Protocol):
    """One checkpoint on disk, found sound."""

    @property
    def step(self) -> int: ...

    @property
    def state(self) -> Mapping[str, Any]: ...

    @property
    def warning(self) -> str | None:
        """Set if a newer checkpoint was damaged and passed over."""
        ...

    def tensors(self, stem: str) -> dict[str, Tensor]:
        """The tensors of `<stem>.safetensors`, on the CPU."""
        ...


class RunFolder(Protocol):
    """Where metrics and checkpoints go (store/run.py). Every write is whole or not at all, and
    raises StorageError if the disk refuses."""

    def append_metrics(self, row: Mapping[str, Any]) -> None: ...

    def truncate_metrics(self, step: int) -> None:
        """Drops the rows of later steps."""
        ...

    def metrics(self) -> list[dict[str, Any]]: ...

    def write_checkpoint(
        self,
        step: int,
        tensors: Mapping[str, Mapping[str, Tensor]],
        state: Mapping[str, Any],
        *,
        best: int | None = None,
    ) -> object:
        """Keeps the newest two, and for each the one that was the best at the time."""
        ...

    def rotate(self, newest: int) -> None:
        """Removes what `write_checkpoint` does not keep, where it was killed before it could."""
        ...

    def require_space(self, checkpoint: int, count: int, result: int) -> None:
        """StorageError unless `count` checkpoints of so many bytes, or as many as are kept, and
        the result have room."""
        ...

    def latest_checkpoint(self) -> Checkpoint | None:
        """The newest sound one; None if the run has none yet."""
        ...

    def checkpoint(self, step: int) -> Checkpoint:
        """The checkpoint of that step; StorageError if it is missing or damaged."""
        ...


@dataclass(frozen=True, kw_only=True)
class StepDone:
    """One optimizer step is over. `step` counts from 1."""

    step: int
    total: int
    epoch: int
    loss: float
    lr: float
    grad_norm: float | None
    """Before clipping. None: fp16 overflowed, the update was skipped and the scale lowered."""
    skipped: int = 0
    """Updates that were skipped for that reason so far."""
    tokens: int
    tokens_per_second: float
    """Over the last steps, evaluations and checkpoints apart."""
    eta: float
    """Seconds to the end of the run, evaluations and checkpoints included."""


@dataclass(frozen=True, kw_only=True)
class Evaluating:
    """An evaluation is running: `batch` of `batches` are done."""

    step: int
    batch: int
    batches: int


@dataclass(frozen=True, kw_only=True)
class EvalDone:
    """An evaluation is over."""

    step: int
    eval_loss: float
    best: bool
    """The lowest so far."""


@dataclass(frozen=True, kw_only=True)
class Saved:
    """The checkpoint of this step is on disk."""

    step: int


@dataclass(frozen=True, kw_only=True)
class Note:
    """Something the user should read; a warning unless it only reports progress."""

    text: str
    warning: bool = True


@dataclass(frozen=True, kw_only=True)
class Over:
    """One of several trainings has ended; `error` says why it failed, if it did."""

    error: DecalError | None


Event = StepDone | Evaluating | EvalDone | Saved | Note | Over


@dataclass(frozen=True, kw_only=True)
class Job:
    """One training."""

    loss: Loss
    parameters: Mapping[str, Parameter]
    """What is trained, by name. float32 ones are updated in place; for 16-bit ones the optimizer
    holds float32 masters."""
    steps: Steps
    eval_batches: Sequence[Batch] = ()
    settings: TrainConfig
    run: RunFolder
    observe: Callable[[Event], None] = field(default=lambda event: None)
    rates: Mapping[str, float] = field(default_factory=dict)
    """Factors on the learning rate by parameter name; 1 for those that are not named."""
    whole_model: bool = False
    """All weights of a model are trained. Parts of it that the loss does not reach (a vision tower,
    in training on text) are then warned of; of an adapter they are an error."""
    scale_loss: bool = False
    """The callable computes in float16: losses are scaled so that small gradients survive."""
    resume: bool = False
    """Go on from the newest checkpoint of the run folder."""


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Peak memory in bytes; None where the system does not say."""

    anonymous: int | None
    """Memory that only this process holds; what counts on a CPU."""
    mapped: int | None
    """Pages of mapped files that were in memory at that moment; the system can drop them."""
    resident: int | None
    """Both together, at their highest."""
    device: int | None
    """Memory allocated on the GPU."""

    @property
    def bytes(self) -> int | None:
        """The one number to quote: the GPU's where there is one, else anonymous memory."""
        if self.device is not None:
            return self.device
        return self.anonymous if self.anonymous is not None else self.resident


@dataclass(frozen=True, kw_only=True)
class Result:
    """What a finished training did. Losses are per trained token."""

    steps: int
    """Optimizer steps that were done."""
    stopped: str | None
    """Why it ended before its last step (early stopping), in a sentence; None if it did not."""
    halted: bool = False
    """Whether it was ended in favour of others."""
    micro_batch_tokens: int | None
    """Most tokens in a forward pass since memory ran out (room.py); None if it never did."""
    skipped: int
    """Steps whose update was skipped because float16 gradients overflowed."""
    loss: float
    """Of the last step."""
    eval_loss: float | None
    """Of the last evaluation."""
    best_eval_loss: float | None
    best_step: int | None
    kept_step: int
    """The step whose weights the parameters now hold."""
    seconds: float
    """Wall time, all sittings of a resumed run together."""
    tokens: int
    trained_tokens: int
    tokens_per_second: float
    """Tokens over the seconds of the steps alone."""
    memory: Memory
    """Of this process."""
    curve: tuple[tuple[int, float], ...]
    """(step, loss) of every step that metrics.jsonl knows: all, unless it was damaged."""
    eval_curve: tuple[tuple[int, float], ...]
    """(step, eval loss)."""
