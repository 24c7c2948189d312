"""The plan of a run whose model and rows are there, and what became of it.

As `decal plan`, with two things known instead of computed: what the process holds before the first
step, and which layers run fused. For a sweep, several adapters over the one base.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from decal.config import FullConfig, LoraConfig
from decal.kernels import native
from decal.model import hf
from decal.model.heap import give_back_freed
from decal.model.inject import trainable_parameters
from decal.model.slots import slots_for
from decal.model.state import attached_to
from decal.plan.memory import MASTER, Peak, peak, together
from decal.plan.setup import Load, Setup
from decal.plan.structure import Structure, Trained, stored
from decal.plan.units import memory_line
from decal.train.memory import anonymous
from decal.verbs.lengths import Lengths, load_of
from decal.verbs.session import Session
from decal.verbs.structure import as_meta, structure_of, with_kept

MAPS = Path("/proc/self/maps")
OVER = 1.2
"""Measured over planned from which a run says so: more than rounding, caches and the heap's holes
explain."""


def setup_of(session: Session) -> Setup:
    """The run in plain numbers; `process` is what is held now beside weights and masters."""
    config, model = session.config, session.model
    whole = isinstance(config.adapter, FullConfig)
    structure = structure_of(model, config.base.path)
    setup = Setup(
        structure=structure,
        trained=_trained(session, structure),
        load=load_of(Lengths.of(session.samples), config, "flat" if session.flat else "padded"),
        recipe=model.decal_base.recipe,
        dtype=config.base.dtype,
        checkpointing=config.train.gradient_checkpointing,
        dropout=getattr(config.adapter, "lora_dropout", 0.0) > 0,
        optimizer=config.train.optimizer,
        device=model.device.type,
        fused=session.flat and not whole and _fused(model),
        native=native.isa() is not None,
        mapped=_mapped(model),
    )
    if not setup.fused:
        skeleton = as_meta(_plain_config(model))
        way = "full" if whole else "lora"
        structure = with_kept(structure, skeleton, config.base.dtype, way)
        setup = replace(setup, structure=structure)
    return replace(setup, process=_process(setup, model))


def planned(session: Session) -> Peak:
    """The peak that the run is going to have; takes a quarter of a second."""
    return peak(setup_of(session))


def planned_together(
    setup: Setup, model: Any, adapters: Sequence[LoraConfig], loads: Sequence[Load]
) -> Peak:
    """The peak of several adapters that are trained at once over the base of `setup`.

    Args:
        setup: of a session with any adapter, or with none attached yet (see `setup_of`).
        model: the session's, for what the settings come to on it.
        adapters: settings of every candidate.
        loads: the rows of each that are in one pass together.

    Raises:
        TargetError: targets that the model does not have.
    """
    setups = []
    for lora, load in zip(adapters, loads, strict=True):
        slots = slots_for(model, lora, new=True)
        ranks = {name: lora.rank_of(name) for name in slots.names}
        trained = Trained(ranks=ranks, parameters=slots.table.parameters)
        dropout = lora.lora_dropout > 0
        setups.append(replace(setup, trained=trained, load=load, dropout=dropout))
    return together(setups)


def planned_info(found: Peak) -> dict[str, Any]:
    """For info.json: `peak_bytes` is what `result.peak_memory_bytes` is to be compared with."""
    parts = {**found.parts, "mapped": -found.mapped}
    return {
        "peak_bytes": found.reported,
        "parts": {name: size for name, size in parts.items() if size},
    }


def verdict(found: Peak, measured: int | None) -> tuple[str, str | None]:
    """`memory: planned X, measured Y (±Z %)`, and a warning where it is far over."""
    line = memory_line(found.reported, measured)
    if measured is None or measured <= OVER * found.reported:
        return line, None
    share = 100 * (measured / found.reported - 1)
    return line, f"the run took {share:.0f} % more memory than planned"


def _trained(session: Session, structure: Structure) -> Trained:
    count = session.sizes()[0]
    if isinstance(session.config.adapter, FullConfig):
        return Trained(parameters=count, whole=True)
    attached = attached_to(session.model)
    settings = None if attached is None else attached.configs.get(session.adapter)
    if settings is None:
        return Trained(parameters=count)
    slots = slots_for(session.model, settings, new=False)
    ranks = {name: settings.rank_of(name) for name in slots.names}
    return Trained(ranks=ranks, parameters=count)


def _fused(model: Any) -> bool:
    attached = attached_to(model)
    found = {} if attached is None else attached.fused
    return bool(found) and not any(found.values())


def _mapped(model: Any) -> bool:
    """Whether the largest weight that is not packed lies in memory that is mapped from a file.

    transformers maps files, and copies what it casts.
    """
    plain = [p for p in model.parameters() if p.dtype == model.decal_base.dtype]
    if not plain or not MAPS.exists():
        return False
    address = max(plain, key=lambda p: p.numel()).data_ptr()
    for line in MAPS.read_text().splitlines():
        first, last = (int(part, 16) for part in line.split(maxsplit=1)[0].split("-"))
        if first <= address < last:
            return line.endswith(".safetensors")
    return False


def _plain_config(model: Any) -> Any:
    config = hf.load_config(str(model.decal_base.folder))
    config.quantization_config = None
    del config.quantization_config
    return config


def _process(setup: Setup, model: Any) -> int:
    """What the process holds now, less what other parts of the plan count."""
    if setup.device != "cpu":
        return 0
    give_back_freed()
    weights = stored(setup.structure, setup.recipe, setup.dtype)
    held = weights.packed + (0 if setup.mapped else weights.plain)
    masters = 0 if setup.trained.whole else MASTER * trainable_parameters(model)[0]
    return max(0, anonymous() - held - masters)
