"""A process of its own that knows the hub of the tests from its start, and no other host.

huggingface_hub, transformers and datasets read their environment when they are imported, once and
for all. So what is to see the test hub runs in a child that was started for it; a function and its
arguments go there, its result or its exception comes back.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from contextlib import redirect_stderr, redirect_stdout
from importlib import import_module
from io import StringIO
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

Result = TypeVar("Result")


class Worker:
    """The child; `home` is its HF_HOME."""

    def __init__(self, url: str, home: Path, *, offline: bool = False):
        settings = {
            "HF_ENDPOINT": url,
            "HF_HOME": str(home),
            "HF_HUB_OFFLINE": "1" if offline else "0",
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "XDG_CACHE_HOME": str(home / "xdg"),
            "OMP_NUM_THREADS": "1",
        }
        self._pool = ProcessPoolExecutor(1, get_context("spawn"), _begin, (settings,))
        self._pool.submit(import_module, "decal.verbs.train")

    def __call__(
        self, function: Callable[..., Result], *args: Any, token: str | None = None
    ) -> Result:
        """`function(*args)` there, as the holder of `token`."""
        return self._pool.submit(_run, function, args, token).result()

    def close(self) -> None:
        """Ends the child at once; taking all of torch down in order takes it seconds."""
        self._pool.submit(os._exit, 0)
        self._pool.shutdown()


class Printed(NamedTuple):
    """What one `decal` command did."""

    code: int
    out: str
    err: str


def decal(*args: str) -> Printed:
    """One command line."""
    from decal.cli import main

    out, err = StringIO(), StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        code = main(args)
    return Printed(code, out.getvalue(), err.getvalue())


def _begin(settings: dict[str, str]) -> None:
    for name in [n for n in os.environ if n.startswith(("HF_", "HUGGING"))]:
        del os.environ[name]
    os.environ.update(settings)
    resolve = socket.getaddrinfo

    def here_only(host: Any, *args: Any, **named: Any) -> Any:
        if host not in ("127.0.0.1", "localhost"):
            raise OSError(f"a test asked for {host}")
        return resolve(host, *args, **named)

    socket.getaddrinfo = here_only


def _run(function: Callable[..., Result], args: tuple[Any, ...], token: str | None) -> Result:
    os.environ.pop("HF_TOKEN", None)
    if token is not None:
        os.environ["HF_TOKEN"] = token
    return function(*args)
