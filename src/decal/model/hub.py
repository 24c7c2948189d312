"""The hub: an id and a revision become a folder in the hub's cache, once.

Everything behind this file sees folders. So one commit is read throughout, whatever a branch does
meanwhile, and a commit that lies in the cache is never asked for again. Without a network the cache
is used as it is; with HF_HUB_OFFLINE nothing is asked at all.

Tokens are huggingface_hub's own matter (HF_TOKEN, `hf auth login`); nothing here sees one.

Knows which files a model or an adapter has, and not what is in them.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from os.path import expanduser
from pathlib import Path

from huggingface_hub import HfApi, constants, errors, snapshot_download
from huggingface_hub.utils import tqdm

from decal.errors import AdapterError, BaseModelError, DecalError, nearest
from decal.untrusted import may_be_path

CONFIG_FILES = (
    "*.json", "*.model", "*.txt", "*.jinja", "*.tiktoken", "*.py",
    "LICENSE*", "NOTICE*", "USE_POLICY*",
)  # fmt: skip
"""What belongs to a model apart from its weights. Code is fetched, and run only if asked for."""
WEIGHT_FILES = ("*.safetensors",)
_OTHER_COPIES = ("*/*.safetensors", "consolidated*.safetensors", "adapter_model.safetensors")
"""The same weights once more, for other programs (Mistral's own loader, ONNX folders, …)."""
_KIND_FILES = ("config.json", "adapter_config.json")
_ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")
_PICKLES = ("adapter_model.bin",)
_COMMIT = re.compile(r"[0-9a-f]{40}")
_SLOW = 2.0
"""Seconds until a progress bar is shown."""
_ANSWER = 10.0
"""Seconds that the hub has to answer before the cache is used as it is."""


class _LateBar(tqdm):
    """A progress bar for downloads only: what is in the cache is there before it shows."""

    def __init__(self, *args: object, **kwargs: object):
        super().__init__(*args, **{"delay": _SLOW, **kwargs})


def may_be_on_hub(path: str) -> bool:
    """Whether `path` reads like a hub id (`gpt2`, `owner/name`) and not like a folder's path."""
    return re.fullmatch(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?", path) is not None


def near_path(path: str) -> str | None:
    """The existing file or folder that `path` was probably meant to name."""
    folder = Path(expanduser(path))
    siblings = [p.name for p in folder.parent.iterdir()] if folder.parent.is_dir() else []
    near = nearest(folder.name, siblings)
    return str(folder.parent / near) if near else None


def split_revision(path: str) -> tuple[str, str | None]:
    """`owner/name@revision` as its two parts; anything else, existing folders first, as it is."""
    name, at, revision = path.partition("@")
    if not at or not revision or not may_be_on_hub(name) or Path(path).exists():
        return path, None
    return name, revision


def model_folder(path: str, revision: str | None = None, *, weights: bool = True) -> Path:
    """The files of a model on the hub, downloaded where the cache lacks them.

    Raises:
        BaseModelError: no such model or revision, no access to it, or no way to the hub.
    """
    patterns = (*CONFIG_FILES, *WEIGHT_FILES) if weights else CONFIG_FILES
    try:
        folder = _snapshot(path, revision, patterns)
    except Exception as error:
        raise hub_error(path, revision, error, BaseModelError) from error
    if weights and (folder / "config.json").exists() and not any(folder.glob("*.safetensors")):
        raise BaseModelError(
            f"`{path}` has no safetensors weights on the hub",
            hint="load it with transformers, save it with save_pretrained, and name that folder",
        )
    return folder


def folder_at_hand(path: str, revision: str | None = None) -> Path | None:
    """The folder of a model whose files lie on this disk, a hub id's in the cache; else None.

    Asks no network and downloads nothing.
    """
    folder = Path(expanduser(path)) if may_be_path(path) else None
    if folder is not None and folder.is_dir():
        return folder
    if not may_be_on_hub(path):
        return None
    try:
        return Path(snapshot_download(path, revision=revision, local_files_only=True))
    except (OSError, ValueError):
        return None


def adapter_folder(path: str, revision: str | None = None) -> Path | None:
    """The files of an adapter on the hub; None if the repository holds no adapter.

    Raises:
        AdapterError: no such repository or revision, no access to it, or no way to the hub.
    """
    try:
        folder = _snapshot(path, revision, _KIND_FILES)
        if not (folder / "adapter_config.json").exists():
            return None
        commit = commit_of(folder) or revision
        folder = _snapshot(path, commit, _ADAPTER_FILES)
        if not (folder / "adapter_model.safetensors").exists():
            folder = _snapshot(path, commit, (*_ADAPTER_FILES, *_PICKLES))
        return folder
    except Exception as error:
        raise hub_error(path, revision, error, AdapterError) from error


def commit_of(folder: Path) -> str | None:
    """The commit whose files lie in a folder of the hub's cache; None for any other folder."""
    inside = folder.parent.name == "snapshots" and _COMMIT.fullmatch(folder.name)
    return folder.name if inside else None


def _snapshot(path: str, revision: str | None, patterns: Sequence[str]) -> Path:
    silence = _silence(path, revision)
    ignored = [p for p in _OTHER_COPIES if p not in patterns]
    try:
        found = snapshot_download(
            path,
            revision=revision,
            allow_patterns=list(patterns),
            ignore_patterns=ignored,
            tqdm_class=_LateBar,
            local_files_only=silence is not None,
        )
    except errors.LocalEntryNotFoundError as error:
        raise error from silence or error.__cause__
    return Path(found)


def _silence(path: str, revision: str | None) -> Exception | None:
    """Why the hub does not answer; None if it does, or need not be asked.

    snapshot_download would wait for minutes where a network swallows what is sent. Of a commit it
    asks for the list of files, once; what other tools put into the cache lacks that list.
    """
    if constants.HF_HUB_OFFLINE or _listed(path, revision):
        return None
    try:
        HfApi().model_info(path, revision=revision, timeout=_ANSWER)
    except errors.HfHubHTTPError:
        return None  # an answer, which snapshot_download gets too
    except Exception as error:
        if not on_the_way(error):
            raise
        return error
    return None


def _listed(path: str, revision: str | None) -> bool:
    """Whether `revision` is a commit whose list of files lies in the cache."""
    if not _COMMIT.fullmatch(revision or ""):
        return False
    folder = Path(constants.HF_HUB_CACHE, "models--" + path.replace("/", "--"))
    return (folder / "trees" / f"{revision}.json").exists()


def hub_error(
    path: str, revision: str | None, error: BaseException, kind: type[DecalError]
) -> DecalError:
    """The user's error for what the hub, or the way to it, answered."""
    if isinstance(error, DecalError):
        return error
    causes = _causes(error)
    near = near_path(path)
    page = f"{constants.ENDPOINT}/{path}"

    def met(*types: type[BaseException]) -> bool:
        return any(isinstance(cause, types) for cause in causes)

    status = next((s for s in map(_status, causes) if s), 0)
    message = f"`{path}` is neither a folder nor on the hub"
    if met(errors.GatedRepoError):
        message = f"`{path}` is gated, and its files are refused"
        hint = f"accept its terms at {page}, and log in with `hf auth login`"
    elif met(errors.RevisionNotFoundError):
        message = f"`{path}` has no revision `{revision}` on the hub"
        hint = f"name a branch, a tag or a commit; {page} lists them"
    elif met(errors.RepositoryNotFoundError, errors.HFValidationError):
        hint = "check the id; a private one needs `hf auth login`"
    elif status == 401:
        message = f"the hub refuses the token that `{path}` was asked for with"
        hint = "log in again with `hf auth login`, or correct HF_TOKEN"
    elif met(errors.OfflineModeIsEnabled) or constants.HF_HUB_OFFLINE:
        message = f"`{path}` is neither a folder nor complete in the hub's cache"
        hint = "HF_HUB_OFFLINE is set: unset it for one download, or name a local folder"
    else:
        message = f"`{path}` is not in the hub's cache, and the hub cannot be reached"
        message += f" ({reason(error)})"
        hint = "check the network connection, or name a local folder"
    return kind(message, hint=f"did you mean `{near}`?" if near else hint)


def reason(error: BaseException) -> str:
    """Why the way to the hub failed, in a few words."""
    causes = _causes(error)
    status = next((s for s in map(_status, causes) if s), 0)
    if status:
        return f"it answered {status}"
    last = str(causes[-1]).strip().splitlines()
    return last[0][:120] if last else type(causes[-1]).__name__


def on_the_way(error: BaseException) -> bool:
    """Whether an error came from the network, the disk or the hub, and not from a mistake here."""
    return any(isinstance(cause, (errors.HTTPError, OSError)) for cause in _causes(error))


def _causes(error: BaseException) -> list[BaseException]:
    """The error and what it came from: libraries between us and the hub wrap what it said."""
    found: list[BaseException] = []
    now: BaseException | None = error
    while now is not None and now not in found:
        found.append(now)
        now = now.__cause__ or now.__context__
    return found


def _status(error: BaseException) -> int:
    response = getattr(error, "response", None)
    return int(getattr(response, "status_code", 0) or 0)
