"""A training of a few hundred numbers: bigram model with a low-rank delta, random token batches.

Run as a script it trains in a folder and can be killed from outside; it prints every step:
`python tiny_run.py FOLDER [resume]`.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from decal.config import TrainConfig
from decal.data.batch import IGNORE, Batch
from decal.errors import DecalError
from decal.store.run import RunFolder
from decal.train import train
from decal.train.events import Event, Job, StepDone

VOCABULARY, WIDTH, RANK, ALPHA = 13, 7, 3, 5.0
ROWS = 24


def sample(row: int) -> tuple[list[int], list[int]]:
    """Tokens and shifted targets of a row; the first third is not trained."""
    generator = torch.Generator().manual_seed(1000 + row)
    length = 3 + row % 6
    tokens = torch.randint(0, VOCABULARY, (length,), generator=generator).tolist()
    targets = [*tokens[1:], IGNORE]
    return tokens, [IGNORE] * (length // 3) + targets[length // 3 :]


def flat(rows: Sequence[int]) -> Batch:
    """One flattened micro-batch of these rows."""
    samples = [sample(row) for row in rows]
    lengths = [len(tokens) for tokens, _ in samples]
    ids = [[row] * n for row, n in zip(rows, lengths, strict=True)]
    targets = [t for _, ts in samples for t in ts]
    return Batch(
        layout="flat",
        input_ids=torch.tensor([[t for tokens, _ in samples for t in tokens]]),
        targets=torch.tensor([targets]),
        positions=torch.tensor([[p for n in lengths for p in range(n)]]),
        attention=None,
        cu_seq_lens=torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()]).int(),
        max_length=max(lengths),
        sample_ids=torch.tensor([[i for row in ids for i in row]]),
        rows=tuple(rows),
        trained=sum(t != IGNORE for t in targets),
        tokens=sum(lengths),
    )


@dataclass(frozen=True)
class TinyStep:
    index: int
    epoch: int
    micro: list[Batch]


class TinySteps:
    """Shuffled rows, `batch_size` a step, cut into `cuts` micro-batches."""

    def __init__(self, batch_size: int = 8, cuts: int = 2, pause: float = 0.0):
        self.batch_size = batch_size
        self.cuts = cuts
        self.pause = pause
        self.steps_per_epoch = ROWS // batch_size

    def steps(self, start: int) -> Iterator[TinyStep]:
        index = start
        while True:
            epoch, place = divmod(index, self.steps_per_epoch)
            order = torch.randperm(ROWS, generator=torch.Generator().manual_seed(epoch)).tolist()
            rows = order[place * self.batch_size : (place + 1) * self.batch_size]
            size = -(-len(rows) // self.cuts)
            micro = [flat(rows[i : i + size]) for i in range(0, len(rows), size)]
            time.sleep(self.pause)
            yield TinyStep(index, epoch, micro)
            index += 1


class TinyModel:
    """Logits of the next token: E[x] @ (W + alpha / r * B A)^T + bias, and noise from torch."""

    def __init__(self, dtype: torch.dtype = torch.float32, *, noise: float = 0.0):
        generator = torch.Generator().manual_seed(5)

        def draw(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

        self.E, self.W = draw(VOCABULARY, WIDTH), draw(VOCABULARY, WIDTH)
        self.parameters = {
            "head.lora_A": Parameter(draw(RANK, WIDTH)),
            "head.lora_B": Parameter(torch.zeros(VOCABULARY, RANK, dtype=dtype)),
            "head.bias": Parameter(draw(VOCABULARY)),
        }
        self.noise = noise

    def loss(self, batch: Batch, epoch: int | None) -> tuple[Tensor, int]:
        A, B, bias = self.parameters.values()
        x = self.E[batch.input_ids[0]]
        if self.noise and epoch is not None:
            x = x + self.noise * torch.randn(x.shape, dtype=x.dtype)
        logits = x @ self.W.T + (ALPHA / RANK) * (x @ A.T) @ B.T + bias
        targets = batch.targets[0]
        exact = logits if logits.dtype == torch.float64 else logits.float()
        loss = torch.nn.functional.cross_entropy(
            exact, targets, ignore_index=IGNORE, reduction="sum"
        )
        return loss, int((targets != IGNORE).sum())


def job(folder: Any, model: TinyModel | None = None, **changes: Any) -> Job:
    """A job of 12 steps; `changes` are fields of Job or of TrainConfig."""
    model = model or TinyModel()
    names = set(Job.__dataclass_fields__)
    settings = {"max_steps": 12, "lr": 0.02, "weight_decay": 0.1, "warmup": 0.2, "eval_every": 4}
    settings |= {k: v for k, v in changes.items() if k not in names}
    fields: dict[str, Any] = {
        "loss": model.loss,
        "parameters": model.parameters,
        "steps": TinySteps(),
        "eval_batches": [flat([100, 101, 102]), flat([103, 104])],
        "run": folder,
    }
    fields |= {k: v for k, v in changes.items() if k in names}
    return Job(settings=TrainConfig(**settings), **fields)


@dataclass(frozen=True)
class Held:
    """A checkpoint in memory."""

    step: int
    state: dict[str, Any]
    files: dict[str, dict[str, Tensor]]
    warning: None = None

    def tensors(self, stem: str) -> dict[str, Tensor]:
        return {k: v.clone() for k, v in self.files[stem].items()}


class MemoryRun:
    """A run folder without a disk."""

    def __init__(self) -> None:
        self.lines: list[dict[str, Any]] = []
        self.kept: dict[int, Held] = {}

    def append_metrics(self, line: dict[str, Any]) -> None:
        self.lines.append(dict(line))

    def truncate_metrics(self, step: int) -> None:
        self.lines = [line for line in self.lines if line["step"] <= step]

    def metrics(self) -> list[dict[str, Any]]:
        return list(self.lines)

    def write_checkpoint(
        self, step: int, tensors: Any, state: dict[str, Any], *, best: int | None = None
    ) -> None:
        files = {s: {k: v.clone() for k, v in named.items()} for s, named in tensors.items()}
        self.kept[step] = Held(step, json.loads(json.dumps(state)), files)

    def rotate(self, newest: int) -> None:
        pass

    def require_space(self, checkpoint: int, count: int, result: int) -> None:
        self.expected = checkpoint, count, result

    def latest_checkpoint(self) -> Held | None:
        return self.kept[max(self.kept)] if self.kept else None

    def checkpoint(self, step: int) -> Held:
        return self.kept[step]

    def column(self, name: str) -> list[Any]:
        """One entry of every line that has it."""
        return [line[name] for line in self.lines if name in line]


def script(folder: str, *, resume: bool) -> int:
    """Trains 40 noisy steps with a pause in each, a checkpoint every 3."""
    torch.set_num_threads(1)

    def observe(event: Event) -> None:
        if isinstance(event, StepDone):
            print(f"step {event.step}", flush=True)

    changes = {"max_steps": 40, "eval_every": 5, "save_every": 3, "observe": observe}
    with RunFolder.open(folder) if resume else RunFolder.create(folder, "tiny\n") as run:
        try:
            steps = TinySteps(pause=0.01)
            train(job(run, TinyModel(noise=0.1), steps=steps, resume=resume, **changes))
        except DecalError as error:
            print(error, file=sys.stderr)
            return error.exit_code
    return 0


if __name__ == "__main__":
    raise SystemExit(script(sys.argv[1], resume="resume" in sys.argv[2:]))
