"""`decal push`: an adapter or a model onto the hub, with a model card.

One commit, of exactly the files that belong: weights, settings, tokenizer, card. Checkpoints, logs,
run.yaml and rows stay here whatever the folder holds, and so do names of places on this disk: where
the base is a local folder, its path is left out of the adapter that is uploaded. Afterwards the
hub's hashes of all files are compared with what was meant.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from os.path import expanduser
from pathlib import Path
from typing import Any

from huggingface_hub import (
    CommitOperationAdd,
    CommitOperationDelete,
    HfApi,
    constants,
    errors,
    get_token,
)
from huggingface_hub.utils import validate_repo_id

from decal.errors import DecalError, VerificationError
from decal.model.adapter import Adapter
from decal.model.hub import near_path, on_the_way, reason
from decal.report.card import MARK, CardFacts, card
from decal.store.base import INDEX_NAME, open_base, refuse_links
from decal.store.peft import CONFIG_NAME, WEIGHTS_NAME
from decal.verbs.facts import adapter_facts, model_facts, on_hub
from decal.verbs.target import BASE, Target, metadata_json, read, resolve
from decal.version import __version__

CARD = "README.md"
_TEXTS = (
    "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json",
    "added_tokens.json", "vocab.json", "vocab.txt", "merges.txt", "*.tiktoken", "spiece.model",
    "sentencepiece.bpe.model", "chat_template.jinja", "chat_template.json",
    "generation_config.json", "processor_config.json", "preprocessor_config.json",
    "LICENSE*", "NOTICE*", "USE_POLICY*",
)  # fmt: skip
"""Files beside the weights, by their usual names: a folder may hold anything else too."""

_WEIGHTS = {
    "model": ("model.safetensors", "model-*-of-*.safetensors", INDEX_NAME, "pytorch_model*.bin*"),
    "adapter": (WEIGHTS_NAME, "adapter_model.bin", CONFIG_NAME),
}
"""By what a loader knows that a repository holds a model, or an adapter."""

Files = dict[str, Path | bytes]


@dataclass(frozen=True, kw_only=True)
class Pushed:
    """What a push left on the hub."""

    repo: str
    url: str
    commit: str
    files: tuple[str, ...]
    card: str
    """`written`, or `kept` where there was one that decal had not written."""

    def summary(self) -> dict[str, Any]:
        """The push in a few facts, for printing."""
        return {
            "pushed": self.repo,
            "url": self.url,
            "commit": self.commit,
            "files": list(self.files),
            "card": self.card,
        }


def push(
    target: str | Path,
    repo: str,
    *,
    private: bool = False,
    revision: str | None = None,
    message: str | None = None,
    say: Callable[[str], None] | None = None,
) -> Pushed:
    """Uploads an adapter or model to the hub, and makes the repository if there is none.

    Args:
        target: run, adapter or model folder.
        repo: `owner/name`, or `name` for one of your own.
        private: make a new repository private; one that exists must be private already.
        revision: branch to commit to, made if there is none; default main.
        message: of the commit.
        say: called with lines about what is left out.

    Raises:
        DecalError: nothing to push there, a bad name, no login, no permission, no way to the hub.
        VerificationError: the hub holds other bytes than were meant.
    """
    _refuse_at_once(target, repo)
    say = say or (lambda line: None)
    found = resolve(target)
    files, facts = _contents(found, say)
    api = HfApi(library_name="decal", library_version=__version__)
    try:
        name = _made(api, repo, private, revision)
        stale = _stale(name, facts.kind, api.list_repo_files(name, revision=revision), files)
        if stale:
            say(f"{len(stale)} files of an earlier push are removed, first `{stale[0]}`")
        written = _add_card(api, replace(facts, repo=name), revision, Path(found.path), files)
        message = message or f"Upload {facts.kind} with decal"
        commit = _commit(api, name, revision, message, files, stale)
    except Exception as error:
        if not on_the_way(error):
            raise
        raise _push_error(repo, error) from error
    return Pushed(
        repo=name,
        url=f"{constants.ENDPOINT}/{name}" + (f"/tree/{revision}" if revision else ""),
        commit=commit,
        files=tuple(sorted(files)),
        card="written" if written else "kept",
    )


def _refuse_at_once(target: str | Path, repo: str) -> None:
    """What can be known before anything is read or asked."""
    if not Path(expanduser(target)).exists():
        near = near_path(str(target))
        raise DecalError(
            f"there is nothing at `{target}` on this disk",
            hint=f"did you mean `{near}`?" if near else "name a run, adapter or model folder",
        )
    try:
        validate_repo_id(repo)
    except errors.HFValidationError:
        raise DecalError(
            f"`{repo}` cannot be the name of a repository", hint="use owner/name"
        ) from None
    if constants.HF_HUB_OFFLINE:
        raise DecalError("HF_HUB_OFFLINE is set, so nothing can be pushed", hint="unset it")
    if get_token() is None:
        raise DecalError(
            "you are not logged in to the hub",
            hint="log in with `hf auth login`, or set HF_TOKEN to a token that may write",
        )


def _made(api: HfApi, repo: str, private: bool, revision: str | None) -> str:
    """The repository's full name, after making it and its branch where they are missing."""
    name = api.create_repo(repo, private=private or None, exist_ok=True).repo_id
    if private and not api.model_info(name).private:
        raise DecalError(
            f"`{name}` is public, and --private was asked for",
            hint="make it private in its settings, or choose another name",
        )
    if revision is not None and revision != constants.DEFAULT_REVISION:
        api.create_branch(name, branch=revision, exist_ok=True)
    return name


def _stale(repo: str, kind: str, there: list[str], files: Files) -> list[str]:
    """Weights of an earlier push that would be loaded with the new ones, or instead of them.

    Raises:
        DecalError: the repository holds an adapter where a model is pushed, or the reverse.
    """
    left = [path for path in there if path not in files]
    found = {
        kind: [path for path in left if any(fnmatch(path, pattern) for pattern in patterns)]
        for kind, patterns in _WEIGHTS.items()
    }
    other = "adapter" if kind == "model" else "model"
    if found[other]:
        raise DecalError(
            f"`{repo}` holds weights of the kind {other}, and what is pushed is of the kind"
            f" {kind}: one repository cannot be loaded as both",
            details=found[other][:1],
            hint="choose another repository",
        )
    return found[kind]


def _add_card(
    api: HfApi, facts: CardFacts, revision: str | None, folder: Path, files: Files
) -> bool:
    """Adds a card to the files unless somebody wrote one by hand; whether it is decal's own.

    One that lies in the folder is uploaded, one that is on the hub stays there.
    """
    if _by_hand(folder / CARD):
        files[CARD] = folder / CARD
        return False
    if api.file_exists(facts.repo, CARD, revision=revision):
        there = Path(api.hf_hub_download(facts.repo, CARD, revision=revision))
        if _by_hand(there):
            return False
    files[CARD] = card(facts).encode("utf-8")
    return True


def _by_hand(readme: Path) -> bool:
    return readme.is_file() and MARK not in readme.read_text(encoding="utf-8", errors="replace")


def _commit(
    api: HfApi, repo: str, revision: str | None, message: str, files: Files, stale: list[str]
) -> str:
    """Uploads and commits; the commit, after the hub's hashes were found to be those meant."""
    added = [
        CommitOperationAdd(path, data if isinstance(data, bytes) else str(data))
        for path, data in files.items()
    ]
    removed = [CommitOperationDelete(path) for path in stale]
    done = api.create_commit(repo, [*added, *removed], commit_message=message, revision=revision)
    _verify(api, repo, done.oid, files)
    return str(done.oid)


def _verify(api: HfApi, repo: str, commit: str, files: Files) -> None:
    stored = {entry.path: entry for entry in api.get_paths_info(repo, list(files), revision=commit)}
    differing = [path for path in files if not _same(stored.get(path), files[path])]
    if differing:
        raise VerificationError(
            f"{len(differing)} of {len(files)} files on the hub are not what was uploaded",
            details=differing[:1],
            hint="push again",
        )


def _same(stored: Any, data: Path | bytes) -> bool:
    """By sha256 for large files, by git's hash of a blob for the others."""
    lfs = getattr(stored, "lfs", None)
    size = len(data) if isinstance(data, bytes) else data.stat().st_size
    if stored is None or stored.size != size:
        return False
    hashed = hashlib.sha256() if lfs else hashlib.sha1(b"blob %d\0" % size)
    if isinstance(data, bytes):
        hashed.update(data)
    else:
        with data.open("rb") as file:
            while piece := file.read(1 << 22):
                hashed.update(piece)
    return hashed.hexdigest() == (lfs.sha256 if lfs else stored.blob_id)


def _push_error(repo: str, error: Exception) -> DecalError:
    status = getattr(getattr(error, "response", None), "status_code", 0)
    if status in (401, 403):
        owner = repo.rpartition("/")[0] or "your name"
        return DecalError(
            f"your token may not write to `{repo}` (the hub answered {status})",
            hint=f"log in with a token that has write access to `{owner}`: `hf auth login`",
        )
    if isinstance(error, errors.HfHubHTTPError) and status < 500:
        answer = error.server_message or str(error).strip().splitlines()[0]
        return DecalError(f"the hub refuses the push to `{repo}`: {answer[:200]}")
    return DecalError(
        f"the push to `{repo}` did not get through: {reason(error)}",
        hint="check the network connection and push again; nothing is left half committed",
    )


# --- what is uploaded -------------------------------------------------------------------------


def _contents(target: Target, say: Callable[[str], None]) -> tuple[Files, CardFacts]:
    folder = Path(target.path)
    files: Files = {
        path.name: path
        for path in sorted(folder.iterdir())
        if path.is_file() and any(fnmatch(path.name, pattern) for pattern in _TEXTS)
    }
    refuse_links(folder, [*files, CARD])
    if target.kind == "model":
        return files | _model_files(folder), model_facts(target)
    _, adapter = read(folder)
    names = (CONFIG_NAME, WEIGHTS_NAME)
    refuse_links(folder, names)
    files |= {name: folder / name for name in names}
    if adapter.base is not None and not on_hub(adapter.base):
        say(f"the base is a folder on this disk: `{adapter.base}` is left out of what is uploaded")
        files |= _without_path(adapter)
    return files, adapter_facts(target, adapter)


def _without_path(adapter: Adapter) -> Files:
    """The adapter's files without the base's path; that base is known by its fingerprint still."""
    base = {k: v for k, v in (metadata_json(adapter, BASE) or {}).items() if k != "path"}
    metadata = {**adapter.metadata, BASE: json.dumps(base)}
    with tempfile.TemporaryDirectory() as place:
        out = Path(place) / "adapter"
        replace(adapter, base=None, metadata=metadata).save_pretrained(out)
        return {file.name: file.read_bytes() for file in out.iterdir()}


def _model_files(folder: Path) -> Files:
    opened = open_base(folder)
    files: Files = {shard.path.name: shard.path for shard in opened.shards}
    if opened.sharded:
        files[INDEX_NAME] = folder / INDEX_NAME
    files |= {path.name: path for path in folder.glob("*.py")}
    files["config.json"] = folder / "config.json"
    refuse_links(folder, files)
    if "_name_or_path" in opened.config:
        kept = {k: v for k, v in opened.config.items() if k != "_name_or_path"}
        files["config.json"] = (json.dumps(kept, indent=2) + "\n").encode("utf-8")
    return files
