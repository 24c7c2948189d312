"""A hub in memory, on 127.0.0.1: what huggingface_hub and datasets ask of the real one.

Repositories are commits of whole file trees, and refs that point at them. Spoken here:

    GET  /api/{kind}s/{id}[/revision/{rev}]        what a repository is, its commit, its files
    GET  /api/{kind}s/{id}/tree/{rev}[/{path}]     the files with sizes and hashes
    POST /api/{kind}s/{id}/paths-info/{rev}        the same of some paths
    HEAD, GET [/datasets]/{id}/resolve/{rev}/{path}    a file; large ones are at /objects
    GET  /api/whoami-v2                            who a token belongs to
    POST /api/repos/create, .../preupload, .../branch, .../commit      writing
    POST /{id}.git/info/lfs/objects/batch, PUT /objects/{sha256}       writing of large files

As on the real hub a missing or private repository is 401 to a stranger and 404 to a user, and of a
gated one everybody sees the files' names but not the files. Xet is not spoken: clients need
HF_HUB_DISABLE_XET=1. Every request is kept in `requests`.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import parse_qs, unquote, urlsplit

LARGE = (".safetensors", ".parquet")
_KINDS = r"(?P<kind>model|dataset)s"
_ID = r"(?P<id>[\w.-]+(?:/[\w.-]+)?)"


class Refused(Exception):  # noqa: N818 (an answer, not a fault of the server)
    """An answer that is an error."""

    def __init__(self, status: int, code: str = "", message: str = "", **more: str):
        self.status, self.code, self.message, self.more = status, code, message, more


class Request(NamedTuple):
    """One request that was answered."""

    method: str
    path: str
    user: str | None


@dataclass
class Repository:
    """File trees by commit, and what branches and tags point at."""

    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)
    private: bool = False
    gated: bool = False
    messages: list[str] = field(default_factory=list)

    def commit(self, files: Mapping[str, bytes], revision: str, message: str = "") -> str:
        """Makes `revision` a tree with `files` and nothing else; returns the commit."""
        lines = [f"{path} {hashlib.sha1(data).hexdigest()}" for path, data in sorted(files.items())]
        parent = self.refs.get(revision, "")
        sha = hashlib.sha1("\n".join([parent, message, *lines]).encode()).hexdigest()
        self.commits[sha] = dict(files)
        self.refs[revision] = sha
        self.messages.append(message)
        return sha

    def find(self, revision: str) -> str:
        """The commit that a branch, tag or commit means."""
        sha = self.refs.get(revision, revision)
        if sha not in self.commits:
            raise Refused(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return sha


class Hub:
    """The repositories, the users, and what was asked for."""

    def __init__(self) -> None:
        self.repositories: dict[tuple[str, str], Repository] = {}
        self.users: dict[str, str] = {}
        """Token -> user name; a user writes below the own name only."""
        self.readers: set[str] = set()
        """Tokens that read gated repositories."""
        self.objects: dict[str, bytes] = {}
        self.requests: list[Request] = []
        self.down = False
        """Answers 503 to everything."""
        self.url = ""
        self.store = ""
        """Where large files lie: another host name, as on the real hub."""

    def add(
        self, name: str, files: Path | Mapping[str, bytes], *, kind: str = "model", **facts: Any
    ) -> str:
        """Puts files (or all files of a folder) onto the branch main; returns the commit."""
        if isinstance(files, Path):
            files = {f.relative_to(files).as_posix(): f.read_bytes() for f in _files(files)}
        repository = self.repositories.setdefault((kind, name), Repository(**facts))
        return repository.commit(files, "main")

    @contextmanager
    def asked(self) -> Iterator[list[Request]]:
        """The list that fills with the requests which come while the block runs."""
        before = len(self.requests)
        found: list[Request] = []
        yield found
        found += self.requests[before:]

    @contextmanager
    def serving(self) -> Iterator[Hub]:
        """Answers on a port of 127.0.0.1, `url`, while the block runs."""
        server = ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (_Handler,), {"hub": self}))
        self.url = f"http://127.0.0.1:{server.server_port}"
        self.store = f"http://localhost:{server.server_port}"
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        try:
            yield self
        finally:
            server.shutdown()
            server.server_close()

    def look_up(self, kind: str, name: str, token: str | None, *, read: bool) -> Repository:
        """The repository, if the holder of `token` may see it, and its files if `read`."""
        repository = self.repositories.get((kind, name))
        user = self.users.get(token or "")
        hidden = repository is None or (repository.private and user != name.partition("/")[0])
        if repository is None or hidden:
            raise Refused(404 if user else 401, "RepoNotFound", "Repository not found")
        if read and repository.gated and token not in self.readers:
            raise Refused(
                403 if user else 401, "GatedRepo", f"Access to model {name} is restricted"
            )
        return repository

    def writable(self, kind: str, name: str, token: str | None) -> Repository:
        """The repository, if the holder of `token` may write it."""
        repository = self.look_up(kind, name, token, read=False)
        self.refuse_writer(name, token)
        return repository

    def refuse_writer(self, name: str, token: str | None) -> None:
        """Raises unless `name` lies below the name of the token's user."""
        user = self.users.get(token or "")
        if user is None:
            raise Refused(401, "", "Invalid username or password.")
        if user != name.partition("/")[0]:
            raise Refused(403, "", "You don't have the rights to write here")


def _files(folder: Path) -> list[Path]:
    return [f for f in sorted(folder.rglob("*")) if f.is_file()]


def _entry(path: str, data: bytes) -> dict[str, Any]:
    blob = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
    found: dict[str, Any] = {"type": "file", "path": path, "size": len(data), "oid": blob}
    if path.endswith(LARGE):
        digest = hashlib.sha256(data).hexdigest()
        found["lfs"] = {"oid": digest, "size": len(data), "pointerSize": 134}
    return found


def _below(files: Mapping[str, bytes], folder: str, recursive: bool) -> list[dict[str, Any]]:
    inside = {p: d for p, d in files.items() if not folder or p.startswith(f"{folder}/")}
    if folder and not inside:
        raise Refused(404, "EntryNotFound", f"{folder} does not exist")
    start = len(folder) + 1 if folder else 0
    folders = {p[:i] for p in inside for i, c in enumerate(p) if c == "/" and i >= start}
    if not recursive:
        folders = {p for p in folders if "/" not in p[start:]}
        inside = {p: d for p, d in inside.items() if "/" not in p[start:]}
    trees = [{"type": "directory", "path": p, "size": 0, "oid": "0" * 40} for p in sorted(folders)]
    return trees + [_entry(path, data) for path, data in sorted(inside.items())]


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    ROUTES = (
        ("GET", r"/api/whoami-v2", "whoami"),
        ("GET", rf"/api/{_KINDS}/{_ID}/tree/(?P<rev>[^/]+)(?:/(?P<path>.+))?", "tree"),
        ("GET", rf"/api/{_KINDS}/{_ID}/revision/(?P<rev>[^/]+)", "info"),
        ("POST", rf"/api/{_KINDS}/{_ID}/paths-info/(?P<rev>[^/]+)", "paths"),
        ("POST", rf"/api/{_KINDS}/{_ID}/preupload/(?P<rev>[^/]+)", "preupload"),
        ("POST", rf"/api/{_KINDS}/{_ID}/branch/(?P<rev>[^/]+)", "branch"),
        ("POST", rf"/api/{_KINDS}/{_ID}/commit/(?P<rev>[^/]+)", "commit"),
        ("POST", r"/api/repos/create", "create"),
        ("POST", r"/api/validate-yaml", "validate"),
        ("GET", rf"/api/{_KINDS}/{_ID}", "info"),
        ("GET", rf"/(?:datasets/)?{_ID}/resolve/(?P<rev>[^/]+)/(?P<path>.+)", "resolve"),
        ("POST", rf"/(?:datasets/)?{_ID}\.git/info/lfs/objects/batch", "batch"),
        ("GET", r"/objects/(?P<path>\w+)", "fetch"),
        ("PUT", r"/objects/(?P<path>\w+)", "store"),
    )

    def log_message(self, *_: Any) -> None:
        pass

    def do_GET(self) -> None:
        self._answer("GET")

    def do_HEAD(self) -> None:
        self._answer("GET")

    def do_POST(self) -> None:
        self._answer("POST")

    def do_PUT(self) -> None:
        self._answer("PUT")

    def _answer(self, method: str) -> None:
        parts = urlsplit(self.path)
        self.query = parse_qs(parts.query)
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.token = self.headers.get("Authorization", "").removeprefix("Bearer ") or None
        user = self.hub.users.get(self.token or "")
        self.hub.requests.append(Request(self.command, parts.path, user))
        try:
            if self.hub.down:
                raise Refused(503, "", "Service unavailable")
            if self.token and user is None:
                raise Refused(401, "", "Invalid credentials in Authorization header")
            for verb, pattern, name in self.ROUTES:
                found = re.fullmatch(pattern, parts.path)
                if verb == method and found:
                    named = {k: unquote(v) for k, v in found.groupdict().items() if v is not None}
                    named.setdefault("kind", "dataset" if "/datasets/" in parts.path else "model")
                    getattr(self, f"_{name}")(**named)
                    return
            raise Refused(404, "", f"no such page: {parts.path}")
        except Refused as refused:
            headers = {"X-Error-Code": refused.code, "X-Error-Message": refused.message}
            headers["X-Repo-Commit"] = refused.more.get("commit", "")
            self._send(refused.status, {"error": refused.message, **refused.more}, headers)

    def _send(self, status: int, body: Any, headers: Mapping[str, str] | None = None) -> None:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        kind = "application/octet-stream" if isinstance(body, bytes) else "application/json"
        for name, value in {"Content-Type": kind, **(headers or {})}.items():
            if value:
                self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    # --- reading ------------------------------------------------------------------------------

    def _whoami(self, kind: str) -> None:
        user = self.hub.users.get(self.token or "")
        if user is None:
            raise Refused(401, "", "Invalid username or password.")
        self._send(200, {"type": "user", "name": user, "orgs": [], "auth": {"type": "token"}})

    def _info(self, kind: str, id: str, rev: str = "main") -> None:
        repository = self.hub.look_up(kind, id, self.token, read=False)
        sha = repository.find(rev)
        facts = {"_id": id, "id": id, "modelId": id, "sha": sha, "private": repository.private}
        siblings = [{"rfilename": path} for path in sorted(repository.commits[sha])]
        gated = "auto" if repository.gated else False
        self._send(200, {**facts, "gated": gated, "tags": [], "siblings": siblings})

    def _tree(self, kind: str, id: str, rev: str, path: str = "") -> None:
        repository = self.hub.look_up(kind, id, self.token, read=False)
        files = repository.commits[repository.find(rev)]
        recursive = self.query.get("recursive", ["False"])[0].lower() in ("true", "1")
        self._send(200, _below(files, path, recursive))

    def _paths(self, kind: str, id: str, rev: str) -> None:
        repository = self.hub.look_up(kind, id, self.token, read=False)
        files = repository.commits[repository.find(rev)]
        if self.headers.get("Content-Type", "").startswith("application/json"):
            wanted = json.loads(self.body)["paths"]
        else:
            wanted = parse_qs(self.body.decode())["paths"]
        entries = _below(files, "", recursive=True)
        self._send(200, [entry for entry in entries if entry["path"] in wanted])

    def _resolve(self, kind: str, id: str, rev: str, path: str) -> None:
        repository = self.hub.look_up(kind, id, self.token, read=True)
        sha = repository.find(rev)
        data = repository.commits[sha].get(path)
        if data is None:
            raise Refused(404, "EntryNotFound", "Entry not found", commit=sha)
        entry = _entry(path, data)
        if "lfs" not in entry:
            self._send(200, data, {"X-Repo-Commit": sha, "ETag": f'"{entry["oid"]}"'})
            return
        digest = entry["lfs"]["oid"]
        self.hub.objects[digest] = data
        headers = {"X-Repo-Commit": sha, "Location": f"{self.hub.store}/objects/{digest}"}
        headers |= {"X-Linked-Etag": f'"{digest}"', "X-Linked-Size": str(len(data))}
        self._send(302, b"", headers)

    def _fetch(self, kind: str, path: str) -> None:
        data = self.hub.objects[path]
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if asked is None:
            self._send(200, data, {"ETag": f'"{path}"', "Accept-Ranges": "bytes"})
            return
        start, end = int(asked[1]), min(int(asked[2] or len(data)), len(data) - 1)
        place = {"Content-Range": f"bytes {start}-{end}/{len(data)}"}
        self._send(206, data[start : end + 1], place)

    # --- writing ------------------------------------------------------------------------------

    def _create(self, kind: str) -> None:
        asked = json.loads(self.body)
        user = self.hub.users.get(self.token or "")
        name = f"{asked.get('organization') or user}/{asked['name']}"
        self.hub.refuse_writer(name, self.token)
        key = (asked.get("type") or "model", name)
        url = {"url": f"{self.hub.url}/{name}"}
        if key in self.hub.repositories:
            raise Refused(409, "", "You already created this model repo", **url)
        private = asked.get("visibility") == "private" or bool(asked.get("private"))
        self.hub.repositories[key] = Repository(private=private)
        self.hub.repositories[key].commit({".gitattributes": b""}, "main", "initial commit")
        self._send(200, url)

    def _validate(self, kind: str) -> None:
        self._send(200, {"errors": [], "warnings": []})

    def _branch(self, kind: str, id: str, rev: str) -> None:
        repository = self.hub.writable(kind, id, self.token)
        if rev in repository.refs:
            raise Refused(409, "", "Reference already exists")
        repository.refs[rev] = repository.refs["main"]
        self._send(200, {})

    def _preupload(self, kind: str, id: str, rev: str) -> None:
        repository = self.hub.writable(kind, id, self.token)
        there = repository.commits[repository.find(rev)]
        files = []
        for file in json.loads(self.body)["files"]:
            path = file["path"]
            mode = "lfs" if path.endswith(LARGE) else "regular"
            found = {"path": path, "uploadMode": mode, "shouldIgnore": False}
            if path in there:
                entry = _entry(path, there[path])
                found["oid"] = entry["lfs"]["oid"] if "lfs" in entry else entry["oid"]
            files.append(found)
        self._send(200, {"files": files})

    def _batch(self, kind: str, id: str) -> None:
        self.hub.writable(kind, id, self.token)
        objects = []
        for wanted in json.loads(self.body)["objects"]:
            href = {"href": f"{self.hub.store}/objects/{wanted['oid']}"}
            have = wanted["oid"] in self.hub.objects
            objects.append({**wanted, **({} if have else {"actions": {"upload": href}})})
        self._send(200, {"transfer": "basic", "objects": objects})

    def _store(self, kind: str, path: str) -> None:
        if hashlib.sha256(self.body).hexdigest() != path:
            raise Refused(400, "", "the content is not what its name says")
        self.hub.objects[path] = self.body
        self._send(200, {})

    def _commit(self, kind: str, id: str, rev: str) -> None:
        repository = self.hub.writable(kind, id, self.token)
        files = dict(repository.commits[repository.find(rev)])
        message = ""
        for line in self.body.splitlines():
            item = json.loads(line)
            value = item["value"]
            if item["key"] == "header":
                message = value["summary"]
            elif item["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif item["key"] == "lfsFile":
                files[value["path"]] = self.hub.objects[value["oid"]]
            elif item["key"] == "deletedFile":
                del files[value["path"]]
            else:
                raise Refused(400, "", f"unknown operation {item['key']}")
        sha = repository.commit(files, rev, message)
        url = f"{self.hub.url}/{id}/commit/{sha}"
        self._send(200, {"success": True, "commitOid": sha, "commitUrl": url})
