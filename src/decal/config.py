"""The settings of a run: one frozen model per section of run.yaml.

The docstring under each field is its documentation everywhere: in the YAML that `decal init`
writes, in `--help`, in error messages. This file knows no files, no torch and no models; a config
object never reaches into a class of another layer, callers hand on plain values.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

__all__ = [
    "AdapterConfig",
    "BaseConfig",
    "DataConfig",
    "FullConfig",
    "LoraConfig",
    "QuantConfig",
    "RunConfig",
    "TrainConfig",
]

Dtype = Literal["float32", "bfloat16", "float16"]


class Settings(BaseModel):
    """Frozen, keyword-only, and unknown names are errors."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, protected_namespaces=()
    )


class BaseConfig(Settings):
    """The base model: what is loaded, never trained (unless `adapter.method` is full)."""

    path: str
    """Hub id or folder of the base model."""
    revision: str | None = None
    """Branch, tag or commit on the hub."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model. Off by default: it can do anything."""
    dtype: Dtype = "bfloat16"
    """What the base computes in: bfloat16, float16 or float32."""
    device: str = "auto"
    """`auto` takes the GPU if there is one, else the CPU; or a torch device name."""


class QuantConfig(Settings):
    """How the frozen linear layers of the base are stored."""

    format: Literal["none", "nf4"] = "none"
    """`none` keeps 16 bits; `nf4` is the 4-bit normal float of QLoRA."""
    block_size: Literal[32, 64, 128, 256, 512, 1024, 2048, 4096] = 64
    """Weights that share one scale."""
    double: bool = True
    """Quantize the scales too: 4.127 instead of 4.5 bits a weight at block size 64."""


class LoraConfig(Settings):
    """LoRA (Hu et al. 2021): W' = W + scaling * B A, with PEFT's names and meaning."""

    method: Literal["lora"] = "lora"
    """The adapter method."""
    r: int = Field(default=16, ge=1)
    """Rank: rows of A and columns of B."""
    lora_alpha: float = Field(default=None, gt=0, validate_default=False)  # type: ignore[assignment]
    """Scaling numerator: the update is scaled by lora_alpha / r. Left out: 2 * r."""
    lora_dropout: float = Field(default=0.05, ge=0.0, lt=1.0)
    """Share of A's input that is dropped in training."""
    target_modules: str | tuple[str, ...] = "all-linear"
    """`all-linear`, `attention`, a regular expression for the whole name, or a list of name
    endings."""
    use_rslora: bool = False
    """Scale by lora_alpha / sqrt(r) instead (Kalajdzievski 2023)."""
    init_lora_weights: bool | Literal["gaussian"] = True
    """Start of A: true is Kaiming uniform, `gaussian` is normal with deviation 1/r. B starts at
    zero."""

    @model_validator(mode="before")
    @classmethod
    def _default_alpha(cls, values: Any) -> Any:
        if isinstance(values, dict) and values.get("lora_alpha") is None:
            r = values.get("r", 16)
            if isinstance(r, int) and not isinstance(r, bool):
                values = {**values, "lora_alpha": 2 * r}
        return values

    @property
    def scaling(self) -> float:
        """The factor of B A: lora_alpha / r, or lora_alpha / sqrt(r) with use_rslora."""
        return float(self.lora_alpha / (self.r**0.5 if self.use_rslora else self.r))


class FullConfig(Settings):
    """Full fine-tuning: every weight is trained, nothing is added."""

    method: Literal["full"] = "full"
    """The adapter method."""


AdapterConfig = Annotated[LoraConfig | FullConfig, Field(discriminator="method")]


class DataConfig(Settings):
    """The rows to train on."""

    path: str
    """A .jsonl file, or the id of a hub data set."""
    split: str = "train"
    """Split of a hub data set."""
    max_length: int = Field(default=2048, ge=8)
    """Longest sample in tokens; longer ones are truncated, and that is reported."""
    eval: float | str | None = 0.05
    """Share of the rows held out for evaluation, or a file of their own, or null for none."""
    limit: int | None = Field(default=None, ge=1)
    """Use only the first rows."""


class TrainConfig(Settings):
    """How the trainable parameters are trained."""

    epochs: float = Field(default=3, gt=0)
    """Passes over the data."""
    max_steps: int | None = Field(default=None, ge=1)
    """Stop after so many optimizer steps, whatever `epochs` says."""
    lr: float = Field(default=2e-4, gt=0)
    """Peak learning rate."""
    batch_size: int = Field(default=8, ge=1)
    """Samples per optimizer step, however they are cut into micro-batches."""
    micro_batch_tokens: int = Field(default=4096, ge=8)
    """Most tokens in one forward pass; lowers memory, never changes the result."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """Shape of the learning rate after warm-up."""
    warmup: float = Field(default=0.03, ge=0.0, lt=1.0)
    """Share of the steps in which the learning rate rises from zero."""
    weight_decay: float = Field(default=0.0, ge=0.0)
    """AdamW's decoupled weight decay."""
    max_grad_norm: float = Field(default=1.0, gt=0)
    """Gradients are scaled down to this norm."""
    gradient_checkpointing: bool = False
    """Recompute activations in backward: less memory, about a third more time."""
    eval_every: int | None = Field(default=None, ge=1)
    """Steps between evaluations; left out: ten times a run, and at the end."""
    save_every: int | None = Field(default=None, ge=1)
    """Steps between checkpoints; left out: with every evaluation."""
    keep: Literal["best", "last"] = "best"
    """Which weights the run leaves: the best by evaluation loss, or the last."""
    seed: int = Field(default=0, ge=0)
    """Starting values, order of the data, dropout."""


def _base_from_text(value: Any) -> Any:
    return {"path": value} if isinstance(value, str) else value


def _quant_from_text(value: Any) -> Any:
    if value is None:
        return {"format": "none"}
    return {"format": value} if isinstance(value, str) else value


def _data_from_text(value: Any) -> Any:
    return {"path": value} if isinstance(value, str) else value


def _adapter_default(value: Any) -> Any:
    if isinstance(value, str):
        return {"method": value}
    if isinstance(value, dict) and "method" not in value:
        return {"method": "lora", **value}
    return value


class RunConfig(Settings):
    """One run: run.yaml has exactly these seven keys."""

    base: Annotated[BaseConfig, BeforeValidator(_base_from_text)]
    """Hub id or folder of the base model, or {path, revision, trust_remote_code, dtype, device}."""
    quant: Annotated[QuantConfig, BeforeValidator(_quant_from_text)] = QuantConfig()
    """none | nf4, or {format, block_size, double}."""
    adapter: Annotated[AdapterConfig, BeforeValidator(_adapter_default)] = LoraConfig()
    """What is trained: {method: lora, r, lora_alpha, …} or {method: full}."""
    data: Annotated[DataConfig, BeforeValidator(_data_from_text)]
    """File or hub data set, or {path, split, max_length, eval, limit}."""
    objective: Literal["sft"] = "sft"
    """What is learned: sft trains on the assistant's or completion's tokens."""
    train: TrainConfig = TrainConfig()
    """How it is trained."""
    output: str
    """The run folder: settings, metrics, checkpoints, adapter."""
