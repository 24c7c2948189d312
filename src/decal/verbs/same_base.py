"""Whether a base is the one that an adapter was trained on; asked here and nowhere else.

Two facts travel with an adapter: the fingerprint of the base's files, and the identity of the
packed weights where training computed with quantized ones. Another fingerprint is another base; so
is another identity under the same recipe. The same base, packed otherwise or not at all, is a
choice that people make, and it is said.

The facts of a loaded model are those of the files it was loaded from, and are kept with it in
`decal_base`: files that are written over afterwards do not change what the adapter was trained on.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from os.path import expanduser
from pathlib import Path
from typing import Any

from decal.errors import AdapterError, BaseModelError, DecalError, DecalWarning
from decal.model import hf
from decal.model.adapter import Adapter
from decal.store.base import open_base
from decal.store.fingerprint import file_marks, fingerprint
from decal.verbs.target import BASE, QUANTIZER, metadata_json

_RECIPE = ("format", "block_size", "double", "skip_modules", "dtype")
_ALLOW = "name the right base or revision; allow_other_base=True (--allow-other-base) goes on"


def base_fingerprint(path: str, revision: str | None) -> str:
    """Fingerprint of the base's files, from decal's cache where they have not changed."""
    return fingerprint(open_base(hf.local_folder(path, revision)))


def remember_files(model: Any) -> None:
    """Notes with a model that was just loaded which files it came from."""
    info: hf.BaseInfo = model.decal_base
    model.decal_base = replace(info, files=_marks(info))


def forget_base(model: Any) -> None:
    """The weights are no longer those of the files; adapters trained from here on name no base."""
    for name in ("decal_base", "decal_describe", "decal_check"):
        if name in model.__dict__:
            delattr(model, name)
    model.name_or_path = ""


def fingerprint_of(model: Any) -> str | None:
    """Fingerprint of the files that the model was loaded from; computed once.

    None, with a DecalWarning, where they are gone or were changed since.
    """
    info: hf.BaseInfo = model.decal_base
    if info.fingerprint is None:
        found = None if _marks(info) != info.files or not info.files else _own_fingerprint(info)
        if found is None:
            warnings.warn(
                f"the files of base `{info.path}` were changed or removed after it was loaded, so"
                " the adapter cannot record which base it belongs to",
                DecalWarning,
                stacklevel=2,
            )
            return None
        model.decal_base = replace(info, fingerprint=found)
    return model.decal_base.fingerprint  # type: ignore[no-any-return]


def quantizer_facts(model: Any) -> dict[str, Any] | None:
    """Recipe and identity of the model's packed weights, as an adapter records them."""
    info: hf.BaseInfo = model.decal_base
    recipe = info.recipe
    if recipe is None:
        return None
    if info.identity is None:
        info = model.decal_base = replace(info, identity=hf.quantizer_identity(model))
    return {
        "format": recipe.format,
        "block_size": recipe.block_size,
        "double": recipe.double,
        "skip_modules": list(info.skip_modules),
        "dtype": str(info.dtype).removeprefix("torch."),
        "identity": info.identity,
    }


def check_model(model: Any, adapter: Adapter, *, allow_other_base: bool = False) -> None:
    """The loaded model must be the base of the training.

    An adapter that records nothing, of another tool, is taken as it is.

    Raises:
        AdapterError: it is not, and `allow_other_base` does not turn that into a DecalWarning.
    """
    info: hf.BaseInfo = model.decal_base
    wanted = (metadata_json(adapter, BASE) or {}).get("fingerprint")
    if wanted is not None:
        found = fingerprint_of(model)
        if found is not None:
            compare_marks(adapter, info.path, wanted, found, "", allow_other_base)
    before, now = metadata_json(adapter, QUANTIZER), quantizer_facts(model)
    if before is None and now is None:
        return
    if before is not None and now is not None and _recipe(before) == _recipe(now):
        wanted, found = before.get("identity"), now["identity"]
        compare_marks(adapter, info.path, wanted, found, "quantized ", allow_other_base)
    elif before is not None or wanted is not None:
        warnings.warn(
            f"adapter `{adapter.source}` was trained on {_packing(before)}, here the base is"
            f" {_packing(now)}: the weights differ by the rounding",
            DecalWarning,
            stacklevel=2,
        )


def check_files(
    adapter: Adapter, path: str, revision: str | None, *, allow_other_base: bool = False
) -> None:
    """As `check_model`, for the files of a base that nobody loads."""
    wanted = (metadata_json(adapter, BASE) or {}).get("fingerprint")
    if wanted is not None:
        found = base_fingerprint(path, revision)
        compare_marks(adapter, path, wanted, found, "", allow_other_base)


@contextmanager
def hashing(path: str) -> Iterator[Callable[[Any], None]]:
    """Hashes a folder's files beside the loading in the block, which reads the same pages.

    Yields what takes over the fingerprint for the loaded model. Packing keeps one core busy and
    hashing another, so that the first load of a base takes no longer than without.
    """
    found: list[tuple[str, tuple[str, ...]]] = []
    stop = threading.Event()

    def observe(done: int, total: int) -> None:
        if stop.is_set():
            raise InterruptedError

    def work() -> None:
        if not Path(expanduser(path)).is_dir():
            return  # a hub id: the loading itself downloads it
        try:
            files = open_base(Path(expanduser(path)))
            marks = file_marks(files)
            found.append((fingerprint(files, observe), marks))
        except (DecalError, OSError):
            pass  # whoever needs the fingerprint asks again, and gets the error

    def keep(model: Any) -> None:
        worker.join()
        info: hf.BaseInfo = model.decal_base
        for mark, files in found:
            if files != info.files:
                raise BaseModelError(
                    f"the files of base `{path}` were changed while it was loaded",
                    hint="load it again when nothing writes to them",
                )
            model.decal_base = replace(info, fingerprint=mark)

    worker = threading.Thread(target=work, daemon=True)
    worker.start()
    try:
        yield keep
    finally:
        stop.set()
        worker.join()


def _own_fingerprint(info: hf.BaseInfo) -> str | None:
    try:
        return fingerprint(open_base(info.folder))
    except DecalError:
        return None


def _marks(info: hf.BaseInfo) -> tuple[str, ...]:
    try:
        return file_marks(open_base(info.folder))
    except (DecalError, OSError):
        return ()


def _recipe(facts: dict[str, Any]) -> list[Any]:
    return [facts.get(key) for key in _RECIPE]


def _packing(facts: dict[str, Any] | None) -> str:
    return "16 or 32-bit weights" if facts is None else f"weights quantized to {facts['format']}"


def compare_marks(
    adapter: Adapter, base: str, wanted: str | None, found: str | None, kind: str, allowed: bool
) -> None:
    """Two fingerprints or identities, the recorded one and the found one, must be the same.

    `kind` is put before the word weights. Raises AdapterError, or warns where it is `allowed`.
    """
    if wanted is None or wanted == found:
        return
    message = (
        f"base `{base}` is not the one that adapter `{adapter.source}` was trained on:"
        f" its {kind}weights differ"
    )
    detail = f"trained on {wanted[:16]}…, found {(found or 'none')[:16]}…"
    if not allowed:
        raise AdapterError(message, details=[detail], hint=_ALLOW)
    warnings.warn(f"{message} ({detail})", DecalWarning, stacklevel=3)
