"""How long a run's samples are, and what of that decides its memory: the largest micro-batch.

The rows themselves where they can be read; else as many samples of the greatest length as a step
takes. Micro-batches are cut as training cuts them (data/pack.py), without building them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from os.path import expanduser
from pathlib import Path

from decal.config import RunConfig
from decal.data.order import permutation
from decal.data.pack import LayoutName, groups
from decal.data.sample import Sample
from decal.errors import BaseModelError
from decal.model import hf
from decal.plan.setup import Load
from decal.train.loop import total_steps
from decal.verbs.rows import encode, read_run_rows

STEPS_LOOKED_AT = 2000
"""The largest micro-batch is looked for in so many steps."""


@dataclass(frozen=True, kw_only=True)
class Lengths:
    """Tokens of the samples of a run."""

    tokens: tuple[int, ...]
    trained: tuple[int, ...]
    known: bool
    """Whether these are the rows themselves, or as many samples of the greatest length."""

    @classmethod
    def of(cls, samples: Sequence[Sample]) -> Lengths:
        """Those of encoded rows."""
        trained = tuple(max(1, int(sample.trained.sum())) for sample in samples)
        return cls(tokens=tuple(map(len, samples)), trained=trained, known=True)

    @property
    def longest(self) -> int:
        """Tokens of the longest sample."""
        return max(self.tokens)

    def cut(self, most: int) -> Lengths:
        """The same samples with at most so many tokens each."""
        if self.longest <= most:
            return self
        tokens = tuple(min(n, most) for n in self.tokens)
        return replace(self, tokens=tokens, trained=tuple(map(min, self.trained, tokens)))


def load_of(lengths: Lengths, config: RunConfig, layout: LayoutName = "flat") -> Load:
    """The largest micro-batch of the run, by tokens, and most trained tokens of any."""
    train, count = config.train, len(lengths.tokens)
    per_epoch = -(-count // train.batch_size)
    steps = min(total_steps(per_epoch, train), STEPS_LOOKED_AT)
    most = trained = 0
    several = False
    order, epoch = permutation(count, train.seed, 0), 0
    for index in range(steps):
        now, place = divmod(index, per_epoch)
        if now != epoch:
            order, epoch = permutation(count, train.seed, now), now
        chosen = order[place * train.batch_size : (place + 1) * train.batch_size].tolist()
        sizes = [lengths.tokens[i] for i in chosen]
        micro = groups(layout, sizes, train.micro_batch_tokens)
        several = several or len(micro) > 1
        for group in micro:
            padded = len(group) * max(sizes[i] for i in group)
            most = max(most, sum(sizes[i] for i in group) if layout == "flat" else padded)
            trained = max(trained, sum(lengths.trained[chosen[i]] for i in group))
        if not lengths.known:
            break  # all steps are alike
    return Load(tokens=most, trained=trained, several=several)


def lengths_of(config: RunConfig, *, rows: bool) -> Lengths:
    """Of the rows where they are there, else as many of the greatest length as a step takes."""
    if rows and Path(expanduser(config.data.path)).exists():
        try:
            found = read_run_rows(config)
            tokenizer = hf.load_tokenizer(config.base.path, revision=config.base.revision)
            samples = encode(found, tokenizer, config).train
            return Lengths.of(samples)
        except BaseModelError:
            pass  # no tokenizer at hand
    count = config.train.batch_size
    longest = config.data.max_length
    return Lengths(tokens=(longest,) * count, trained=(longest,) * count, known=False)
