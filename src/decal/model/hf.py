"""Loading through transformers: models, tokenizers, skeletons, and the names in files.

Every use of transformers' loading internals is here, in `quantizer.py` and in `attention.py`;
nothing else imports them. Knows no adapters and no runs.

transformers does the loading itself: renamed keys, fused experts, tied weights. What decal adds is
that a load with missing, unexpected or mismatched tensors is an error instead of a report in the
log, because a randomly initialized layer trains happily and is wrong.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from os.path import expanduser
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as hf_logging

from decal.errors import BaseModelError, DecalError, QuantError
from decal.model import heads
from decal.model.attention import honour_soft_caps
from decal.model.hub import commit_of, may_be_on_hub, model_folder, near_path, split_revision
from decal.model.quantizer import DecalQuantizationConfig, quantizable_modules
from decal.model.survey import base_modules
from decal.model.unquantized import skipped
from decal.quant import FORMATS, describe
from decal.quant.base import Recipe
from decal.quant.bnb import describe_quantization
from decal.quant.identity import identity
from decal.quant.linear import QuantLinear
from decal.store.leftovers import is_leftover

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True, kw_only=True)
class BaseInfo:
    """Where a loaded base came from; kept on the model as `decal_base`."""

    path: str
    """Hub id, or the folder's absolute path: an adapter must find it from anywhere."""
    revision: str | None
    dtype: torch.dtype
    """What the base computes in; quantized weights were cast to it before they were packed."""
    commit: str | None
    """The hub's commit that was loaded; a branch may have moved on since. None for a folder."""
    folder: Path
    """Where its files lie, in the hub's cache or elsewhere: nobody has to ask again."""
    recipe: Recipe | None
    """How the linear layers are stored; None for 16 or 32 bits."""
    skip_modules: tuple[str, ...] = ()
    """Modules that were asked to stay 16-bit, by the ends of their names."""
    new: tuple[str, ...] = ()
    """Parameters of a classification head that the files lack: they must be trained."""
    chat_template: str | None = None
    """The template that rows were rendered with, where the base has none of its own."""
    files: tuple[str, ...] = ()
    """Marks of the weight files when they were loaded; see `store.fingerprint.file_marks`."""
    fingerprint: str | None = None
    """Of these files, once it was asked for."""
    identity: str | None = None
    """Of the packed weights, once it was asked for; they never change."""


def pick_device(device: str) -> torch.device:
    """`auto` is the first GPU if there is one, else the CPU; other names are torch's own.

    Raises:
        BaseModelError: no such name, or no such device in this machine.
    """
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        found = torch.device(device)
    except RuntimeError:
        raise BaseModelError(
            f"`{device}` is not a device", hint="use auto, cpu, cuda or cuda:N"
        ) from None
    count = torch.cuda.device_count() if found.type == "cuda" else 1
    if (found.index or 0) >= count:
        raise BaseModelError(
            f"device `{device}` is not there: torch sees {count} GPUs",
            hint="use auto or cpu; `decal env` shows what torch sees",
        )
    return found


def load_model(
    path: str,
    *,
    revision: str | None = None,
    trust_remote_code: bool = False,
    dtype: torch.dtype = torch.bfloat16,
    device: str = "auto",
    recipe: Recipe | None = None,
    skip: Sequence[str] = (),
    labels: Sequence[str] | None = None,
) -> PreTrainedModel:
    """Loads a causal language model, quantized while it loads if `recipe` says so.

    Modules that `skip` names stay as they are. What bitsandbytes stored quantized is loaded as it
    is stored; a `recipe` must then be that of the files.

    With `labels` it is a classifier of these classes instead; a head that the files lack, or have
    for other labels, gets starting values and is named in `decal_base.new`.

    Returns:
        The model in evaluation mode, its weights in `dtype` or packed, with `decal_base` set.

    Raises:
        BaseModelError: the path is no model, or tensors are missing, left over or misshapen.
        QuantError: weights that the format cannot hold.
    """
    commit = None
    if not Path(expanduser(path)).is_dir():
        commit = commit_of(local_folder(path, revision, weights=False))
    config = load_config(path, revision=commit or revision, trust_remote_code=trust_remote_code)
    device_map = {"": pick_device(device)} if str(pick_device(device)) != "cpu" else None
    stored = _takes_stored(path, config)
    auto, same_labels = AutoModelForCausalLM, False
    if labels is not None:
        auto, same_labels = AutoModelForSequenceClassification, heads.relabel(config, labels)
    folder = local_folder(path, commit or revision)
    settings = {
        "config": config,
        "trust_remote_code": trust_remote_code,
        "dtype": dtype,
        "device_map": device_map,
        "quantization_config": None if stored else _packing(recipe, skip),
    }
    model, report = _from_pretrained(auto, path, folder, settings)
    new = heads.settle(model, report, same_labels) if labels is not None else ()
    _refuse_incomplete(path, model, report)
    honour_soft_caps(model)
    recipe = (_stored_recipe if stored else _packed_recipe)(path, model, recipe, skip)
    model.name_or_path = model.config.name_or_path = path if commit else str(folder)
    model.decal_base = BaseInfo(
        path=path if commit else str(folder.resolve()),
        revision=revision,
        dtype=dtype,
        commit=commit,
        folder=folder.resolve(),
        recipe=recipe,
        skip_modules=tuple(skip),
        new=new,
    )
    return model


def _from_pretrained(auto: Any, path: str, folder: Path, settings: dict[str, Any]) -> Any:
    """The model, and transformers' report on what it found."""
    with Quiet():
        try:
            return auto.from_pretrained(
                str(folder),
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # refused by the caller, with both shapes
                **settings,
            )
        except Exception as error:
            raise _load_error(path, error) from error


def load_config(path: str, *, revision: str | None = None, trust_remote_code: bool = False) -> Any:
    """The model's config.json as transformers reads it; raises BaseModelError."""
    folder = local_folder(path, revision, weights=False)
    try:
        config = AutoConfig.from_pretrained(str(folder), trust_remote_code=trust_remote_code)
    except Exception as error:
        raise _load_error(path, error) from error
    if not trust_remote_code:
        _refuse_kernels(path, config)
    return config


def _refuse_kernels(path: str, config: Any) -> None:
    """An attention named `owner/name` is code on the hub, which transformers fetches and runs."""
    parts = [config, *(getattr(config, name, None) for name in config.sub_configs)]
    for part in parts:
        named = getattr(part, "_attn_implementation", None)
        if named is not None and "/" in str(named):
            raise BaseModelError(
                f"base `{path}` asks for code from the hub: its attention is `{named}`",
                hint="take attn_implementation out of its config.json, or set"
                " base.trust_remote_code to true",
            )


def load_tokenizer(
    path: str, *, revision: str | None = None, trust_remote_code: bool = False
) -> PreTrainedTokenizerBase:
    """The model's tokenizer; raises BaseModelError."""
    folder = local_folder(path, revision, weights=False)
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(folder), trust_remote_code=trust_remote_code)
    except Exception as error:
        raise BaseModelError(
            f"base `{path}` has no tokenizer that can be loaded: {_first_line(error)}",
            hint="a base needs tokenizer.json and tokenizer_config.json beside its weights",
        ) from error
    tokenizer.name_or_path = path
    return tokenizer


def untie(model: Any, module: str) -> None:
    """Tells transformers that a layer, about to get a weight of its own, is tied no longer."""
    key = f"{module}.weight"
    tied = dict(getattr(model, "all_tied_weights_keys", None) or {})
    kept = {k: source for k, source in tied.items() if key not in (k, source)}
    if kept != tied:
        model.all_tied_weights_keys = kept
        for config in (model.config, model.config.get_text_config()):
            config.tie_word_embeddings = False


def forget_quantizer(model: Any) -> None:
    """Tells transformers that `model` is no longer quantized, once no packed layer is left."""
    quantizer = getattr(model, "hf_quantizer", None)
    if quantizer is not None and not any(isinstance(m, QuantLinear) for m in model.modules()):
        quantizer.remove_quantization_config(model)


def quantizer_identity(model: nn.Module) -> str | None:
    """Hash of all packed weights of `model` with recipe and the base's names; None if none."""
    packed = [(n, m.packed) for n, m in base_modules(model) if isinstance(m, QuantLinear)]
    return identity(iter(packed)) if packed else None


def _packing(recipe: Recipe | None, skip: Sequence[str]) -> DecalQuantizationConfig | None:
    if recipe is None:
        return None
    return DecalQuantizationConfig(recipe.format, recipe.block_size, recipe.double, skip)


def _takes_stored(path: str, config: Any) -> bool:
    """Whether bitsandbytes stored the model quantized; the config then names decal as its reader.

    Raises:
        BaseModelError: quantized by another tool.
    """
    given = getattr(config, "quantization_config", None)
    if given is None:
        return False
    settings = given if isinstance(given, dict) else given.to_dict()
    found = describe_quantization({"quantization_config": settings})
    if found is None or found["format"] not in FORMATS:
        method = settings.get("quant_method", "unknown")
        raise BaseModelError(
            f"`{path}` is stored quantized ({found['format'] if found else method}), which decal "
            "does not read",
            hint="name the original 16-bit model, or one that bitsandbytes quantized",
        )
    config.quantization_config = DecalQuantizationConfig(format=found["format"]).to_dict()
    return True


def _stored_recipe(path: str, model: Any, asked: Recipe | None, skip: Sequence[str]) -> Recipe:
    """The one recipe of a model that was read as it was stored.

    Raises:
        BaseModelError: no weight is quantized, or they differ in recipe.
        QuantError: another recipe is asked for, or a layer that should have been skipped.
    """
    recipes = model.hf_quantizer.stored
    if len(recipes) != 1:
        found = ", ".join(sorted(describe(r) for r in recipes)) or "none"
        raise BaseModelError(
            f"`{path}` says that it is stored quantized, its weights are of {len(recipes)} kinds",
            details=[found],
        )
    (recipe,) = recipes
    if asked is not None and describe(asked) != describe(recipe):
        raise QuantError(
            f"`{path}` is stored as {describe(recipe)}, it cannot be loaded as {describe(asked)}",
            hint="use `quant: none` to take it as it is stored, or name the original 16-bit model",
        )
    packed = [n for n, m in model.named_modules() if isinstance(m, QuantLinear)]
    wrong = [name for name in packed if skipped(name, skip)]
    if wrong:
        raise QuantError(
            f"{len(wrong)} layers that quant.skip_modules names are stored quantized in `{path}`",
            details=[f"first: {wrong[0]}"],
            hint="leave skip_modules out, or name the original 16-bit model",
        )
    return recipe


class Quiet:
    """Keeps transformers' progress bars and load reports off the terminal; errors still raise."""

    def __enter__(self) -> None:
        self._level = hf_logging.get_verbosity()
        self._bar = hf_logging.is_progress_bar_enabled()
        hf_logging.set_verbosity_error()
        hf_logging.disable_progress_bar()

    def __exit__(self, *_: object) -> None:
        hf_logging.set_verbosity(self._level)
        if self._bar:
            hf_logging.enable_progress_bar()


def _refuse_wrong_path(path: str) -> None:
    folder = Path(expanduser(path))
    if folder.is_file():
        raise BaseModelError(f"`{path}` is a file, not a model", hint="name the folder it lies in")
    if folder.is_dir():
        _refuse_other_folder(path, folder)
    elif split_revision(path)[1] is not None:
        name, revision = split_revision(path)
        raise BaseModelError(
            f"`{path}` is no hub id",
            hint=f"name `{name}`, and `{revision}` as its revision (base.revision)",
        )
    elif not may_be_on_hub(path):
        near = near_path(path)
        raise BaseModelError(
            f"there is no model at `{path}`",
            hint=f"did you mean `{near}`?" if near else "name a folder or a hub id",
        )


def _refuse_other_folder(path: str, folder: Path) -> None:
    if (folder / "adapter_config.json").exists() and not (folder / "config.json").exists():
        raise BaseModelError(
            f"`{path}` is an adapter, not a base model",
            hint="name the base model here; `decal inspect` shows which one it was trained on",
        )
    if not (folder / "config.json").exists():
        raise BaseModelError(
            f"`{path}` has no config.json",
            hint="a model folder holds config.json, the tokenizer and *.safetensors",
        )


def _load_error(path: str, error: Exception) -> DecalError:
    if isinstance(error, DecalError):
        return error
    text = str(error)
    if "does not recognize this architecture" in text or "model type" in text:
        hint = "this transformers does not know the architecture; upgrade it"
    elif "trust_remote_code" in text:
        hint = "the model brings its own code: set base.trust_remote_code to true to run it"
    else:
        hint = "the folder may be incomplete; copy or download it again"
    return BaseModelError(f"base `{path}` cannot be loaded: {_first_line(error)}", hint=hint)


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else type(error).__name__


def _refuse_incomplete(path: str, model: PreTrainedModel, report: dict[str, Any]) -> None:
    problems = []
    mismatched = sorted(report["mismatched_keys"])
    if model.__dict__.get("hf_quantizer") is not None:
        _refuse_unpackable(path, getattr(model.hf_quantizer, "refused", []))
        mismatched += getattr(model.hf_quantizer, "mismatched", [])
    missing = sorted(set(report["missing_keys"]) - {key for key, *_ in mismatched})
    if missing:
        problems.append(f"{len(missing)} tensors are missing, first `{missing[0]}`")
    if mismatched:
        key, found, wanted = mismatched[0]
        problems.append(
            f"{len(mismatched)} tensors have the wrong shape, first `{key}`:"
            f" {list(found)} in the file, {list(wanted)} in the model"
        )
    unexpected = sorted(key for key in report["unexpected_keys"] if not is_leftover(key))
    if unexpected:
        problems.append(f"{len(unexpected)} tensors are left over, first `{unexpected[0]}`")
    if problems:
        raise BaseModelError(
            f"base `{path}` does not fill {type(model).__name__}",
            details=problems,
            hint="the weights and config.json do not belong together",
        )


def _refuse_unpackable(path: str, refused: list[tuple[str, QuantError]]) -> None:
    if refused:
        key, error = refused[0]
        raise QuantError(
            f"{len(refused)} weights of base `{path}` cannot be quantized",
            details=[f"{key}: {error.message}", *error.details],
            hint=error.hint,
        )


def _packed_recipe(
    path: str, model: nn.Module, asked: Recipe | None, skip: Sequence[str]
) -> Recipe | None:
    """What was asked for, once every layer that should be quantized is."""
    if asked is None:
        return None
    names = quantizable_modules(model, skip)
    left = [name for name in names if not isinstance(model.get_submodule(name), QuantLinear)]
    if left or not any(isinstance(m, QuantLinear) for m in model.modules()):
        first = f", first `{left[0]}`" if left else ""
        raise BaseModelError(
            f"{len(left)} linear layers of `{path}` were not quantized{first}",
            hint="use `quant: none` for this architecture",
        )
    return asked


def local_folder(path: str, revision: str | None = None, *, weights: bool = True) -> Path:
    """The folder that holds the model's files; a hub id is downloaded to the hub's cache.

    Without `weights` only what is read for a config, a tokenizer or a skeleton.

    Raises:
        BaseModelError: neither a folder nor a model on the hub.
    """
    _refuse_wrong_path(path)
    folder = Path(expanduser(path))
    if not folder.is_dir():
        folder = model_folder(path, revision, weights=weights)
        _refuse_other_folder(path, folder)
    return folder
