"""The smallest change of settings under which a run fits.

Changes are tried in the order of what they cost: smaller micro-batches cost nothing but a little
speed and leave the result as it is; checkpointing costs a third more time; fewer bits cost a little
quality; a lower rank and shorter samples change what is learned. Of the first that fits no part can
be left out. Knows no formulas: `peak_of` says what a candidate needs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

Changes = Mapping[str, str]
"""Setting -> value, as `--set` takes them."""


@dataclass(frozen=True, kw_only=True)
class Now:
    """What may be changed, as it is."""

    micro_batch_tokens: int
    longest: int
    """Tokens of the longest sample: a smaller micro-batch than that holds one sample all the same.
    """
    checkpointing: bool
    formats: tuple[str, ...]
    """Formats with fewer bits than the run's own, the largest first."""
    r: int | None
    """Rank; None where every weight is trained."""


def cheapest(now: Now, peak_of: Callable[[Changes], int], room: int) -> Changes | None:
    """The first change that needs at most `room` bytes; None if none does."""
    return next((c for c in candidates(now) if peak_of(c) <= room), None)


def candidates(now: Now) -> Iterator[Changes]:
    """All of them, the cheapest first."""
    for bits in ({}, *({"quant": fmt} for fmt in now.formats)):
        for lighter in _same_result(now):
            if bits or lighter:
                yield {**bits, **lighter}
    fewest = {"quant": now.formats[-1]} if now.formats else {}
    least: Changes = {**fewest, **list(_same_result(now))[-1]}
    r = now.r
    while r is not None and r > 4:
        r = max(4, r // 2)
        yield {**least, "adapter.r": str(r)}
    length = now.longest
    while length > 128:
        length = max(128, length // 2)
        shorter = {"data.max_length": str(length), "train.micro_batch_tokens": str(length)}
        yield {**least, **shorter}


def _same_result(now: Now) -> list[Changes]:
    """Changes that cost memory or time, and not the result."""
    sizes = []
    size = now.micro_batch_tokens // 2
    while size >= now.longest:
        sizes.append({"train.micro_batch_tokens": str(size)})
        size //= 2
    if now.micro_batch_tokens > now.longest and (
        not sizes or int(sizes[-1]["train.micro_batch_tokens"]) > now.longest
    ):
        sizes.append({"train.micro_batch_tokens": str(now.longest)})
    found: list[Changes] = [{}, *sizes]
    if not now.checkpointing:
        again = {"train.gradient_checkpointing": "true"}
        found += [again, *({**again, **size} for size in sizes)]
    return found
