"""Can this run learn at all? It overfits one batch of eight rows, and then undoes it.

A model that cannot learn eight rows by heart, without dropout and weight decay and at a rate that
is not timid, will learn nothing from eight thousand. The loss must fall below a fifth of where it
began. Where it does not, what was measured on the way says what to suspect, in this order:

    mask                nothing is trained, single scattered tokens are, or no answer's end is
    template            all of the rows' text is harder for the model than guessing its tokens
    learning rate       the loss rose, or the weights hardly moved
    frozen parameters   tensors that had no gradient, or nothing that the loss depends on

The rate is the run's, at least 1e-3, because a hundred steps must do; where every weight is trained
the least is 1e-4, as 1e-3 tears a trained model apart. So a rate that is far too small for the run
does not show in the loss. It shows in the way that weights can go: a step of Adam moves a weight by
about its rate, so the run's rates, added up, are the way that it has, and the way to half the loss
of eight rows was measured.

Weights are copied before and put back to the bit, and so are torch's generators. Of the first rows
the shortest different ones are taken: they cost little, and the same text twice with two answers
cannot be learned by heart.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from decal.config import FullConfig
from decal.data.batch import Batch
from decal.data.pack import make_batches
from decal.data.sample import Sample
from decal.data.stats import DataSummary, summarize
from decal.objectives import OBJECTIVES
from decal.report.tables import size
from decal.train.optim import Optimizer, lr_at
from decal.train.room import is_out_of_memory
from decal.verbs.env import memory
from decal.verbs.session import Session

__all__ = ["Cause", "Learning", "overfit"]

ROWS = 8
AMONG = 64
STEPS = 100
SECONDS = 60.0
LEARNED, FALLING, RISE = 0.2, 0.8, 1.1
"""Shares of the first loss: below the first it has learned, below the second it falls, and above
the third it has risen."""
KNOWN = 0.05
"""A first loss of so little has nothing to fall from."""
LEAST_LR, LEAST_LR_FULL = 1e-3, 1e-4
FAR = 0.1
"""Share of the way to half the loss that a whole run must at least be able to go."""
ROOM = 0.8
"""Share of the free memory that may be asked for."""

Verdict = Literal["learned", "unclear", "failed", "skipped"]
Name = Literal["mask", "template", "learning rate", "frozen parameters"]


@dataclass(frozen=True)
class Cause:
    """Why the rows may not have been learned."""

    name: Name
    text: str


@dataclass(frozen=True, kw_only=True)
class Learning:
    """What came of it."""

    verdict: Verdict
    reason: str
    """The verdict in a sentence."""
    losses: tuple[float, ...] = ()
    """Per trained token (or row with a label), before each step and after the last."""
    rows: tuple[int, ...] = ()
    lr: float = 0.0
    seconds: float = 0.0
    causes: tuple[Cause, ...] = ()
    """What was seen to be wrong; where it failed and nothing was, all that it can be."""
    reach: float | None = None
    """How far the run's learning rates reach, over what half the loss took; None if unknown."""

    def as_dict(self) -> dict[str, Any]:
        """The same as plain values."""
        return {
            "verdict": self.verdict,
            "reason": self.reason,
            "losses": list(self.losses),
            "rows": list(self.rows),
            "lr": self.lr,
            "seconds": self.seconds,
            "causes": [{"name": cause.name, "text": cause.text} for cause in self.causes],
            "reach": self.reach,
        }


def overfit(
    session: Session,
    *,
    lr: float | None = None,
    observe: Callable[[str, int, int], None] | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> Learning:
    """Learns eight rows by heart, at most STEPS steps or SECONDS; leaves no trace.

    Args:
        lr: a rate instead of the run's or the least one.
        observe: told what is done, steps done and steps in all.
    """
    least = LEAST_LR_FULL if isinstance(session.config.adapter, FullConfig) else LEAST_LR
    rate = lr or max(session.config.train.lr, least)
    chosen = _chosen([session.samples[i] for i in session.batches.order(0)[:AMONG].tolist()])
    trial = _Trial(session, chosen, rate)
    shortage = _shortage(session.parameters)
    if shortage is not None:
        return trial.skipped(shortage)
    if not session.parameters or trial.trained == 0:
        return trial.judged(0.0)
    kept = {name: p.detach().clone() for name, p in session.parameters.items()}
    began = clock()
    devices = range(torch.cuda.device_count())
    try:
        with torch.random.fork_rng(devices=devices), session.training():
            trial.read()
            while trial.goes_on() and clock() - began < SECONDS:
                trial.step()
                if observe is not None:
                    observe("learning eight rows by heart", trial.updates, STEPS)
            trial.look_back(kept)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        return trial.skipped("the eight rows found no memory")
    finally:
        trial.close()
        with torch.no_grad():
            for name, parameter in session.parameters.items():
                parameter.copy_(kept[name])
    return trial.judged(clock() - began)


class _Trial:
    """The steps, and what is seen on the way."""

    def __init__(self, session: Session, chosen: Sequence[Sample], lr: float):
        self.session = session
        self.lr = lr
        self.rows = tuple(sample.row for sample in chosen)
        self.summary = summarize(chosen)
        self.losses: list[float] = []
        self.updates = 0
        self.halved: int | None = None
        """Updates after which the loss was half of the first."""
        self.reading: float | None = None
        """Loss per token of all of the rows' text, before the first step."""
        self.silent: tuple[str, ...] = ()
        self.farthest = 0.0
        """The largest change of any weight."""
        self.connected = True
        self._samples = chosen
        self._batches = self._batched(chosen)
        self.trained = sum(batch.trained for batch in self._batches)
        self._optimizer: Optimizer | None = None

    def _batched(self, samples: Sequence[Sample]) -> list[Batch]:
        tokens = self.session.config.train.micro_batch_tokens
        return make_batches(samples, tokens, layout="flat" if self.session.flat else "padded")

    @torch.no_grad()
    def read(self) -> None:
        """Looks how well the model reads the rows, prompts and all."""
        if self._pools():
            return
        whole = [replace(s, trained=np.arange(len(s)) > 0) for s in self._samples]
        found = [self.session.loss(batch, None) for batch in self._batched(whole)]
        self.reading = sum(float(loss) for loss, _ in found) / sum(count for _, count in found)

    def goes_on(self) -> bool:
        """Whether there is more to see: not learned, not lost, and connected at all."""
        if not self.connected or self.updates >= STEPS:
            return False
        return not self.losses or (
            math.isfinite(self.losses[-1]) and self.losses[-1] >= LEARNED * self.losses[0]
        )

    def step(self) -> None:
        """One update; the loss is that before it."""
        config, optimizer = self.session.config, self._optimizer
        if optimizer is None:
            settings = config.train.model_copy(
                update={"lr": self.lr, "weight_decay": 0.0, "optimizer": "adamw"}
            )
            optimizer = self._optimizer = Optimizer(
                self.session.parameters,
                settings,
                rates=self.session.rates,
                scale_loss=config.base.dtype == "float16",
            )
        total = 0.0
        for batch in self._batches:
            loss, _ = self.session.loss(batch, None)
            total += float(loss.detach())
            if not loss.requires_grad:
                self.connected = False
                return
            optimizer.backward(loss / self.trained)
        self.losses.append(total / self.trained)
        if self.halved is None and self.losses[-1] <= self.losses[0] / 2:
            self.halved = self.updates
        norm = optimizer.gradient_norm()
        if math.isfinite(float(norm)):
            optimizer.update(self.lr, norm)
        elif not optimizer.skip():
            optimizer.forget()
            self.losses.append(math.nan)
        self.updates += 1

    def look_back(self, kept: dict[str, Tensor]) -> None:
        """How far the weights went, and which tensors heard nothing."""
        moved = [(p.detach() - kept[n]).abs().max() for n, p in self.session.parameters.items()]
        self.farthest = float(torch.stack([m.float().cpu() for m in moved]).max())
        if self._optimizer is not None and self.updates > 1:  # LoRA's A hears nothing at first
            self.silent = tuple(sorted(self._optimizer.heard.silent))

    def close(self) -> None:
        if self._optimizer is not None:
            self._optimizer.close()

    def skipped(self, why: str) -> Learning:
        return Learning(
            verdict="skipped", reason=f"learning was not tried: {why}", rows=self.rows, lr=self.lr
        )

    def judged(self, seconds: float) -> Learning:
        verdict, reason = self._verdict()
        found = self._causes()
        if verdict == "failed" and not found:
            found = list(_SUSPECTS)
        return Learning(
            verdict=verdict,
            reason=reason,
            losses=tuple(self.losses),
            rows=self.rows,
            lr=self.lr,
            seconds=seconds,
            causes=tuple(found),
            reach=self._reach(),
        )

    def _verdict(self) -> tuple[Verdict, str]:
        if not self.losses:
            return "failed", f"the {len(self.rows)} rows cannot be learned: there is no loss"
        first, last = self.losses[0], self.losses[-1]
        fell = (
            f"the loss of {len(self.rows)} rows went from {first:.3f} to {last:.3f} in"
            f" {self.updates} steps"
        )
        if first < KNOWN:
            return "unclear", f"the loss of {len(self.rows)} rows is {first:.3f} to begin with"
        if last < LEARNED * first:
            return "learned", fell
        if last < FALLING * first:
            return "unclear", f"{fell}: it falls, but not far enough to tell"
        return "failed", f"{fell}: the model hardly learns"

    def _causes(self) -> list[Cause]:
        """What was seen, in the order of suspicion."""
        found = _mask(self.summary) if not self._pools() else []
        if not self._pools():
            found += _template(self.reading, self._vocabulary())
        if self.losses:
            found += _rate(self.losses, self.lr, self.farthest)
        parameters = self.session.parameters
        if not parameters:
            found.append(Cause("frozen parameters", "no parameter requires a gradient"))
        elif not self.connected:
            text = "the loss depends on no trainable parameter: is the adapter switched on?"
            found.append(Cause("frozen parameters", text))
        elif self.silent:
            text = f"{len(self.silent)} of {len(parameters)} trainable tensors had no gradient,"
            found.append(Cause("frozen parameters", f"{text} first {self.silent[0]}"))
        return found

    def _pools(self) -> bool:
        return OBJECTIVES[self.session.config.objective].POOLS

    def _vocabulary(self) -> int:
        return int(self.session.model.get_input_embeddings().weight.shape[0])

    def _reach(self) -> float | None:
        """What all steps of the run add up to, over the way to half the loss."""
        if not self.halved:
            return None
        settings, total = self.session.config.train, self.session.total_steps
        return sum(lr_at(i, total, settings) for i in range(total)) / (self.lr * self.halved)


_SUSPECTS = (
    Cause("mask", "the trained tokens may not be the answers: look at the samples"),
    Cause("template", "the base may not know this chat template"),
    Cause("learning rate", "the learning rate may be too low, or so high that nothing settles"),
    Cause("frozen parameters", "the adapter may reach too few layers, or its rank be too small"),
)


def _mask(found: DataSummary) -> list[Cause]:
    if not found.trained:
        return [Cause("mask", f"none of {found.tokens:,} tokens of {found.rows} rows is trained")]
    if found.scattered:
        text = f"{found.trained:,} trained tokens lie in {found.pieces:,} pieces, not in answers"
        return [Cause("mask", text)]
    if not found.ended_rows:
        return [Cause("mask", f"the end of the answer is trained in none of {found.rows} rows")]
    return []


def _template(reading: float | None, vocabulary: int) -> list[Cause]:
    guessing = math.log(vocabulary)
    if reading is None or not reading > guessing:
        return []
    text = f"the rows' own text costs the base {reading:.2f} per token, more than guessing among"
    return [
        Cause("template", f"{text} {vocabulary:,} tokens ({guessing:.2f}): it cannot read them")
    ]


def _rate(losses: Sequence[float], lr: float, farthest: float) -> list[Cause]:
    first, last = losses[0], losses[-1]
    peak = max(losses) if all(map(math.isfinite, losses)) else math.nan
    if not last < LEARNED * first and not peak <= RISE * first:
        text = f"the loss rose from {first:.3f} to {peak:.3f} at a rate of {lr:g}: it is too high"
        return [Cause("learning rate", text)]
    if last >= FALLING * first and 0 < farthest < LEAST_LR_FULL:
        text = f"no weight moved by more than {farthest:.1g} in {len(losses)} steps: too low"
        return [Cause("learning rate", text)]
    return []


def _chosen(samples: Sequence[Sample]) -> list[Sample]:
    """The shortest different rows; of classes the shortest of each, then the next of each."""
    seen: set[bytes] = set()
    before: Counter[int | None] = Counter()
    ranked: list[tuple[int, int, Sample]] = []
    for sample in sorted(samples, key=len):
        text = sample.input_ids.tobytes()
        if text not in seen:
            seen.add(text)
            ranked.append((before[sample.label], len(ranked), sample))
            before[sample.label] += 1
    return [sample for _, _, sample in sorted(ranked, key=lambda item: item[:2])[:ROWS]]


def _shortage(parameters: dict[str, nn.Parameter]) -> str | None:
    """Why a copy, gradients and optimizer state do not fit into memory; None if they do."""
    needed = free = 0
    for parameter in parameters.values():
        master = 4 if parameter.element_size() < 4 else 0
        moments = 3 * max(4, parameter.element_size())
        needed += parameter.nbytes + (master + moments) * parameter.numel()
    device = next((p.device for p in parameters.values()), torch.device("cpu"))
    if device.type == "cuda":
        free = torch.cuda.mem_get_info(device)[0]
    elif device.type == "cpu":
        free = memory().get("available", 0)
    if not free or needed <= ROOM * free:
        return None
    return f"it needs {size(needed)} beside the model, and {size(free)} are free"
