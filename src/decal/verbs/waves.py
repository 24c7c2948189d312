"""How many candidates of a sweep train together: as many as memory has room for.

Each brings masters, gradients and moments of its own; the base is there once, and a joint pass
holds the activations of no more tokens than a pass of one run does. What that comes to is planned
(plan/memory.py) for one more candidate at a time.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from math import ceil

import torch

from decal.config import LoraConfig
from decal.data.pack import LayoutName
from decal.errors import TrainingError
from decal.model.inject import adapters_of
from decal.plan.memory import Peak
from decal.plan.setup import Load, Setup
from decal.plan.units import gigabytes
from decal.train.memory import anonymous
from decal.verbs import env
from decal.verbs.grid import Candidate
from decal.verbs.lengths import Lengths, load_of
from decal.verbs.planned import planned_together, setup_of
from decal.verbs.session import Say, Session


def room(session: Session) -> int | None:
    """Bytes that this process could take in all; None where the system does not say."""
    device = session.model.device
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_allocated(device)
    found = env.memory() if device.type == "cpu" else {}
    if "available" not in found:
        return None
    # A container's limit is of all that the process takes, and the system's figures ignore it.
    return min(found["available"] + anonymous(), found.get("limit", sys.maxsize))


def waves(
    session: Session, candidates: Sequence[Candidate], memory: int | None, say: Say
) -> list[list[Candidate]]:
    """The candidates, in order, in waves that fit.

    Args:
        session: of the first of them.
        candidates: that may share a pass.
        memory: bytes that may be taken; None goes by what is free, and warns where it is not
            enough even for one.

    Raises:
        TrainingError: a candidate needs more than `memory` even alone.
    """
    limit = memory or room(session)
    if limit is None or not candidates:
        return [list(candidates)] if candidates else []
    setup = setup_of(session)
    loads = _loads(session, candidates)
    found: list[list[Candidate]] = [[]]
    for each in candidates:
        needed = _peak(session, setup, loads, [*found[-1], each]).reported
        if needed > limit and found[-1]:
            found.append([])
            needed = _peak(session, setup, loads, [each]).reported
        if needed > limit:
            what = f"candidate {each.name} needs about {gigabytes(needed)} of memory"
            if memory is not None:
                raise TrainingError(
                    f"{what}, and {gigabytes(memory)} are given",
                    hint="`decal plan RUN.yaml --memory …` says what would make it fit",
                )
            say(f"{what}, more than the {gigabytes(limit)} that are free")
        found[-1].append(each)
    if len(found) > 1:
        sizes = ", ".join(str(len(wave)) for wave in found)
        say(
            f"{len(candidates)} candidates in waves of {sizes}: more do not fit into memory at once"
        )
    return found


def expected(session: Session, wave: Sequence[Candidate]) -> Peak:
    """The memory that a wave is planned to take; all its adapters are attached."""
    return _peak(session, setup_of(session), _loads(session, wave), wave)


def _loads(session: Session, candidates: Sequence[Candidate]) -> dict[str, Load]:
    """What the largest pass of each candidate alone holds, by name."""
    layout: LayoutName = "flat" if session.flat else "padded"
    lengths = Lengths.of(session.samples)
    return {each.name: load_of(lengths, each.config, layout) for each in candidates}


def _peak(
    session: Session, setup: Setup, known: Mapping[str, Load], wave: Sequence[Candidate]
) -> Peak:
    loads = [known[each.name] for each in wave]
    most = max(session.config.train.micro_batch_tokens, *(load.tokens for load in loads))
    share = min(1.0, most / sum(load.tokens for load in loads))
    adapters = [_settings(session, each) for each in wave]
    cut = [_cut(load, share) for load in loads]
    return planned_together(setup, session.model, adapters, cut)


def _settings(session: Session, each: Candidate) -> LoraConfig:
    """A candidate's adapter; one that goes on with an adapter counts as those that are attached."""
    attached, own = adapters_of(session.model), each.config.adapter
    if each.name in attached:
        return attached[each.name]
    return own if isinstance(own, LoraConfig) else next(iter(attached.values()))


def _cut(load: Load, share: float) -> Load:
    """The part of a pass that is left to it where not all of the rows fit into one."""
    if share == 1.0:
        return load
    return replace(
        load,
        tokens=ceil(load.tokens * share),
        trained=ceil(load.trained * share),
        several=True,
    )
