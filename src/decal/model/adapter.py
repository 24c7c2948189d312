"""Adapter: settings and trained tensors in memory, without a model.

Reads and writes the PEFT folder through `store`. Whether the adapter fits a model is decided where
it meets one, in `attach`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from os.path import expanduser
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from decal.adapters import BaseLayer
from decal.adapters.views import Conv1DView
from decal.config import LoraConfig
from decal.errors import AdapterError
from decal.markup import facts
from decal.model.hub import adapter_folder, may_be_on_hub
from decal.model.state import adapted_layers, adapter_state, adapters_of, full_state
from decal.store.peft import LoraTensors, PeftAdapter, read_adapter, write_adapter
from decal.store.tensorfile import tensor_bytes


@dataclass(frozen=True, kw_only=True, repr=False)
class Adapter:
    """One adapter: `attach(model, adapter)` puts it on a model."""

    config: LoraConfig
    """Its settings, PEFT's names."""
    tensors: Mapping[str, LoraTensors]
    """Module name -> A [r, in], B [out, r] and B's bias [out] or None, float32."""
    embeddings: frozenset[str] = frozenset()
    """Which of these modules are embeddings: in = vocabulary, out = dimensions."""
    full: Mapping[str, Tensor] = field(default_factory=dict)
    """Parameter name in the base model -> what was trained in its place, float32: parameters of
    modules_to_save, and biases."""
    base_copies: Mapping[str, Tensor] = field(default_factory=dict)
    """Parameter name -> a base weight that peft stored beside the adapter. Compared with the base
    in `attach`, never written."""
    metadata: Mapping[str, str] = field(default_factory=dict)
    """decal's own facts (`decal.*`): the base's fingerprint, how it was quantized, versions."""
    base: str | None = None
    """Hub id or folder of the base model it was trained on, if known."""
    revision: str | None = None
    task_type: str | None = "CAUSAL_LM"
    fan_in_fan_out: bool = False
    """Whether the base stores its weights as [in, out], as GPT-2 does. PEFT wants to know."""
    other_settings: Mapping[str, Any] = field(default_factory=dict)
    """Keys of adapter_config.json that decal has no field for; written again as they are."""
    source: str = "in memory"
    """Where it was read from, for messages."""

    @classmethod
    def from_pretrained(cls, path: str | Path, *, revision: str | None = None) -> Adapter:
        """Reads a PEFT adapter folder, or downloads it where `path` is a hub id.

        Raises:
            AdapterError: it is not plain LoRA, or not there; `revision` is for hub ids only.
        """
        read = read_adapter(_folder(path, revision))
        return cls(
            config=read.config,
            tensors=read.tensors,
            embeddings=read.embeddings,
            full=read.full,
            base_copies=read.base_copies,
            metadata=read.metadata,
            base=read.base_model_name_or_path,
            revision=read.revision,
            task_type=read.task_type,
            fan_in_fan_out=read.fan_in_fan_out,
            other_settings=read.other_settings,
            source=str(path),
        )

    @classmethod
    def from_model(cls, model: nn.Module, name: str = "default", **facts: Any) -> Adapter:
        """A copy of an attached adapter on the CPU; `facts` are further fields (metadata, …).

        Raises AdapterError if the model has no adapter of that name.
        """
        state = adapter_state(model, name)
        tensors = {m: LoraTensors(_copy(p.A), _copy(p.B), p.bias if p.bias is None else
                   _copy(p.bias)) for m, p in state.items()}  # fmt: skip
        layers = adapted_layers(model)
        named: dict[str, Any] = {
            "base": getattr(model, "name_or_path", None) or None,
            "fan_in_fan_out": any(_transposed(layers[module].base) for module in state),
            "source": name,
        }
        return cls(
            config=adapters_of(model)[name],
            tensors=tensors,
            embeddings=frozenset(m for m in state if layers[m].base.kind == "embedding"),
            full={n: _copy(p) for n, p in full_state(model, name).items()},
            **{**named, **facts},
        )

    def save_pretrained(self, path: str | Path, *, force: bool = False) -> None:
        """Writes a PEFT adapter folder, read again and compared before it is in place.

        Raises:
            OutputError: `path` is there and not empty, and `force` is not set.
            StorageError: the disk refused.
            VerificationError: what was read again is not what was written.
        """
        write_adapter(path, self._as_peft(), exist="replace" if force else "refuse")

    def save_into(self, path: str | Path) -> None:
        """Writes the files of a PEFT adapter into a folder that may hold others.

        Raises as `save_pretrained`, OutputError apart.
        """
        write_adapter(path, self._as_peft(), exist="into")

    def _as_peft(self) -> PeftAdapter:
        return PeftAdapter(
            config=self.config,
            tensors={m: LoraTensors(*parts) for m, parts in self.tensors.items()},
            embeddings=self.embeddings,
            full=dict(self.full),
            metadata=dict(self.metadata),
            base_model_name_or_path=self.base,
            revision=self.revision,
            task_type=self.task_type,
            fan_in_fan_out=self.fan_in_fan_out,
            other_settings=dict(self.other_settings),
        )

    @property
    def parameters(self) -> int:
        """Numbers in all tensors."""
        factors = (t for parts in self.tensors.values() for t in parts if t is not None)
        return sum(t.numel() for t in (*factors, *self.full.values()))

    def digest(self) -> str:
        """sha256 over what the adapter does: names, float32 values and scalings of its tensors."""
        tensors = {(name, "", 1.0): tensor for name, tensor in self.full.items()}
        for module, parts in self.tensors.items():
            scale = self.config.scaling_of(module)
            named = zip(("A", "B", "bias"), parts, strict=True)
            tensors |= {(module, part, scale): t for part, t in named if t is not None}
        hashed = hashlib.sha256()
        for key in sorted(tensors):
            hashed.update(f"{key} {list(tensors[key].shape)}\n".encode())
            hashed.update(tensor_bytes(tensors[key].float()))
        return hashed.hexdigest()

    def _facts(self) -> list[tuple[str, str]]:
        c = self.config
        kinds = dict.fromkeys(module.rpartition(".")[2] for module in self.tensors)
        ranks = sorted({c.rank_of(module) for module in self.tensors}) or [c.r]
        scalings = sorted({c.scaling_of(module) for module in self.tensors}) or [c.scaling]
        whole = [("trained whole", ", ".join(sorted(self.full)))] if self.full else []
        return [
            ("base", self.base or "unknown"),
            ("r", _range(ranks)),
            ("lora_alpha", f"{c.lora_alpha:g}"),
            ("scaling", _range(scalings) + (" (rslora)" if c.use_rslora else "")),
            ("lora_dropout", f"{c.lora_dropout:g}"),
            ("modules", f"{len(self.tensors)} ({', '.join(kinds)})"),
            *whole,
            ("parameters", f"{self.parameters:,}"),
        ]

    def __repr__(self) -> str:
        return f"Adapter({', '.join(f'{name}={value}' for name, value in self._facts())})"

    def _repr_html_(self) -> str:
        return facts(self._facts())


def _folder(path: str | Path, revision: str | None) -> Path:
    folder = Path(expanduser(path))
    if folder.exists() or not may_be_on_hub(str(path)):
        return folder
    found = adapter_folder(str(path), revision)
    if found is None:
        raise AdapterError(f"`{path}` on the hub is a model, not an adapter")
    return found


def _transposed(layer: BaseLayer) -> bool:
    """Whether the base's files hold [in, out]; a quantized layer remembers it."""
    return isinstance(layer, Conv1DView) or bool(getattr(layer, "transposed_source", False))


def _copy(parameter: Tensor) -> Tensor:
    return parameter.detach().to("cpu", copy=True)


def _range(values: list[Any]) -> str:
    """`16`, or `4 to 16` where modules differ."""
    ends = dict.fromkeys((values[0], values[-1]))
    return " to ".join(f"{value:g}" for value in ends)
