"""Whether a trained adapter fits a model: a bijection between its tensors and the model's slots.

Every misfit is collected; they are one error, counts first. Knows no files.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor, nn

from decal.config import LoraConfig
from decal.errors import AdapterError, DecalWarning, first_of, nearest
from decal.model.slots import Slots
from decal.model.survey import base_modules, base_name, is_packed


class Parts(Protocol):
    """The tensors of one module."""

    @property
    def A(self) -> Tensor: ...  # noqa: N802 (the factors' names)

    @property
    def B(self) -> Tensor: ...  # noqa: N802

    @property
    def bias(self) -> Tensor | None: ...


class AdapterLike(Protocol):
    """Settings and trained tensors in memory, as `decal.Adapter` holds them."""

    @property
    def config(self) -> LoraConfig: ...

    @property
    def tensors(self) -> Mapping[str, Parts]:
        """Module name -> A [r, in], B [out, r] and B's bias [out] or None."""
        ...

    @property
    def embeddings(self) -> frozenset[str]:
        """Which of these modules are embeddings."""
        ...

    @property
    def full(self) -> Mapping[str, Tensor]:
        """Parameter name in the base model -> its trained value."""
        ...

    @property
    def base_copies(self) -> Mapping[str, Tensor]:
        """Parameter name -> the base's weight as it was in training."""
        ...

    @property
    def metadata(self) -> Mapping[str, str]:
        """Facts about it, which stay with it when it is saved again."""
        ...

    @property
    def source(self) -> str:
        """What to call it in a message."""
        ...

    @property
    def base(self) -> str | None: ...


def check_fit(
    model: nn.Module, adapter: AdapterLike, slots: Slots, *, allow_other_base: bool = False
) -> None:
    """Tensors and slots must pair off, copies of base weights be the base's, and a head that the
    base's files lack be in the adapter.

    With `allow_other_base` copies with other values are a DecalWarning.

    Raises:
        AdapterError: they do not; the whole misfit.
    """
    has, wants = adapter.tensors, slots.names
    unknown = [f"{m}: {_unknown(m, list(wants))}" for m in has if m not in wants]
    missing = [f"{m}: target_modules names it, the adapter has no tensors for it"
               for m in wants if m not in has]  # fmt: skip
    misshapen = [
        text for m in wants if m in has for text in _misshapen(m, has[m], adapter, slots)[:1]
    ]
    shapes = slots.full_shapes()
    extra = [f"{n}: the settings train no such parameter" for n in adapter.full if n not in shapes]
    lacking = [f"{n}: the settings train it, the adapter has none" for n in shapes
               if n not in adapter.full]  # fmt: skip
    wrong = [
        f"{n}: adapter has {list(adapter.full[n].shape)}, base has {list(shape)}"
        for n, shape in shapes.items()
        if n in adapter.full and tuple(adapter.full[n].shape) != shape
    ]
    other, values = _other_base(model, adapter.base_copies)
    if values and allow_other_base:
        text = f"adapter `{adapter.source}` holds {len(values)} base weights that differ"
        warnings.warn(f"{text}: {first_of(values)}", DecalWarning, stacklevel=3)
    elif values:
        other += values
    new: tuple[str, ...] = getattr(getattr(model, "decal_base", None), "new", ())
    nowhere = [f"{n}: neither the base's files nor the adapter hold it"
               for n in new if n not in adapter.full and n not in shapes]  # fmt: skip
    kinds = (
        (misshapen, f"{len(misshapen)} of {len(has)} tensors have the wrong shape"),
        (unknown, f"{len(unknown)} of {len(has)} modules are not in the base"),
        (missing, f"{len(missing)} of {len(wants)} target modules have no tensors"),
        (wrong, f"{len(wrong)} of {len(shapes)} whole parameters have the wrong shape"),
        (extra, f"{len(extra)} of {len(adapter.full)} whole parameters are not asked for"),
        (lacking, f"{len(lacking)} of {len(shapes)} whole parameters are missing"),
        (nowhere, f"{len(nowhere)} of {len(new)} parameters of the classifier's head are missing"),
        (other, f"{len(other)} of {len(adapter.base_copies)} base weights stored with it differ"),
    )
    if any(lines for lines, _ in kinds):
        base = base_name(model)
        raise AdapterError(
            f"adapter `{adapter.source}` does not fit base `{base}`: "
            + ", ".join(text for lines, text in kinds if lines),
            details=[first_of(lines) for lines, _ in kinds if lines],
            hint=None
            if adapter.base in (None, base)
            else f"the adapter was trained on `{adapter.base}` (adapter_config.json)",
        )


def _misshapen(module: str, parts: Parts, adapter: AdapterLike, slots: Slots) -> list[str]:
    info, config = slots.infos[module], adapter.config
    out, columns = info.shape or (0, 0)
    r = config.rank_of(module)
    found = []
    if (module in adapter.embeddings) != (info.kind == "embedding"):
        kinds = ("an embedding", "a linear layer")
        theirs, ours = kinds if module in adapter.embeddings else kinds[::-1]
        found.append(f"{module}: adapter expects {theirs}, base has {ours}")
    for what, has, wants in (
        ("in", parts.A.shape[1], columns),
        ("out", parts.B.shape[0], out),
        ("r", parts.A.shape[0], r),
        ("r", parts.B.shape[1], r),
    ):
        if has != wants:
            owner = "its config says" if what == "r" else "base has"
            found.append(f"{module}: adapter expects {what}={has}, {owner} {what}={wants}")
    if (parts.bias is not None) != config.lora_bias:
        had = "a bias of B" if parts.bias is not None else "no bias of B"
        found.append(f"{module}: adapter has {had}, its config says lora_bias={config.lora_bias}")
    elif parts.bias is not None and tuple(parts.bias.shape) != (out,):
        found.append(f"{module}: B's bias is {list(parts.bias.shape)}, base has out={out}")
    return found


def _other_base(model: nn.Module, copies: Mapping[str, Tensor]) -> tuple[list[str], list[str]]:
    """Copies of base weights that cannot be the base's, and copies with other values, and why.

    Those of quantized layers are not compared.
    """
    modules = dict(base_modules(model)) if copies else {}
    problems, values = [], []
    for name, copy in copies.items():
        module, _, leaf = name.rpartition(".")
        owner = modules.get(module)
        own = None if owner is None else owner._parameters.get(leaf)
        if owner is not None and is_packed(owner):
            continue
        if own is None:
            problems.append(f"{name}: the base has no such parameter")
        elif own.shape != copy.shape:
            shapes = f"{list(copy.shape)} with the adapter, {list(own.shape)} in the base"
            problems.append(f"{name}: {shapes}; the vocabulary was resized")
        elif own.device.type != "meta" and not torch.equal(own.detach().cpu(), copy.to(own.dtype)):
            values.append(f"{name}: the embedding or head was trained too, or is another base's")
    return problems, values


def _unknown(module: str, slots: list[str]) -> str:
    close = nearest(module, slots)
    return "the base has no such target" + (f", the nearest is {close}" if close else "")
