"""Exit codes, the voice of errors, and what the command line may not cost."""

from __future__ import annotations

import errno
import importlib
import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from decal.cli import app, main
from decal.errors import DataError, DecalError, Interrupted, TrainingError
from decal.version import __version__

COMMANDS = [
    "quickstart",
    "init",
    "check",
    "train",
    "sweep",
    "generate",
    "compare",
    "inspect",
    "diff",
    "merge",
    "verify",
    "push",
    "quantize",
    "dequantize",
    "env",
    "completion",
]

Raising = Callable[[BaseException], tuple[int, str]]


@pytest.fixture
def raising(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Raising:
    """Runs `decal env` with a verb that raises; gives the exit code and stderr."""
    module = importlib.import_module("decal.verbs.env")

    def run(error: BaseException) -> tuple[int, str]:
        def verb() -> None:
            raise error

        monkeypatch.setattr(module, "env", verb)
        code = main(["env"])
        out, err = capsys.readouterr()
        assert out == ""
        return code, err

    return run


def python(*args: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *args],
        capture_output=True,
        text=True,
        env={**os.environ, **env},
        check=False,
    )


@pytest.mark.parametrize(
    ("error", "code", "shown"),
    [
        (
            DataError("2 rows are empty", details=["row 3", "row 9"], hint="remove them"),
            2,
            "error: 2 rows are empty\n  row 3\n  row 9\nhint: remove them\n",
        ),
        (TrainingError("NaN in step 7"), 1, "error: NaN in step 7\n"),
        (
            Interrupted("saved step 12", hint="--resume"),
            130,
            "stopped: saved step 12\nhint: --resum",
        ),
        (KeyboardInterrupt(), 130, "stopped: "),
        (MemoryError(), 1, "error: out of memory"),
        (RuntimeError("CUDA out of memory. Tried to allocate"), 1, "error: out of memory: CUDA"),
        (OSError(errno.ENOSPC, "No space left on device", "/x/y"), 1, "error: /x/y: No space left"),
        (ModuleNotFoundError("no", name="tiktoken"), 1, "error: the package `tiktoken` is not"),
        (KeyError("q_proj"), 1, "internal error: KeyError: 'q_proj' (test_main.py:"),
    ],
)
def test_exceptions_become_exit_codes(
    raising: Raising, error: BaseException, code: int, shown: str
) -> None:
    """Fails when an exception leaves main, loses its details, or exits with another code."""
    got, text = raising(error)
    assert got == code
    assert text.startswith(shown)
    assert "Traceback" not in text


def test_an_internal_error_says_how_to_see_more(
    raising: Raising, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fails when a bug can no longer be traced."""
    _, text = raising(ValueError("odd"))
    assert "hint: this is a bug in decal; DECAL_TRACEBACK=1 shows where" in text
    monkeypatch.setenv("DECAL_TRACEBACK", "1")
    _, text = raising(ValueError("odd"))
    assert "Traceback (most recent call last)" in text
    assert "raise error" in text


@pytest.mark.parametrize(
    ("args", "shown"),
    [
        (["trian"], "error: there is no command `trian`\nhint: did you mean `decal train`?\n"),
        (["zzz"], "error: there is no command `zzz`\nhint: `decal --help` lists all commands\n"),
        (["train"], "error: missing argument `RUN.yaml`\nhint: `decal train --help` shows"),
        (
            ["train", "x", "--forec"],
            "error: no such option: --forec\nhint: did you mean `--force`?",
        ),
        (["merge", "a", "-o", "x", "--dtype", "f8"], "error: invalid value for `--dtype`: `f8` is"),
        (["merge", "a", "b", "c", "-o", "x"], "error: merge takes [BASE] ADAPTER, got 3 paths"),
        (["generate", "m", "p", "--temperature", "-1"], "error: invalid value for `--temperature`"),
        (
            ["train", "missing.yaml"],
            "error: missing.yaml does not exist\nhint: `decal init` writes",
        ),
        (["env", "--json", "extra"], "error: got unexpected extra argument"),
        (["compare", "a=", "--prompt", "x"], "error: `a=` needs a name and a path"),
        (["compare", "x/r", "y/r", "--prompt", "x"], "error: two adapters are called `r`"),
    ],
)
def test_wrong_command_lines(
    args: list[str], shown: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Fails when typer's own frames and usage lines come back, or the exit code is not 2."""
    assert main(args) == 2
    out, err = capsys.readouterr()
    assert err.startswith(shown)
    assert out == ""


def test_no_arguments_show_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    """Fails when a first visit is answered with an error."""
    assert main([]) == 0
    assert "decal quickstart" in capsys.readouterr().out


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    """Fails when the version is printed to stderr or from another source."""
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"decal {__version__}\n"


@pytest.mark.parametrize("command", COMMANDS)
def test_help_begins_with_an_example(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Fails when the example is not the first thing below the usage line, or is not runnable."""
    assert main([command, "--help"]) == 0
    usage, _, example, *_ = capsys.readouterr().out.splitlines()
    assert usage.startswith(f"Usage: decal {command} [OPTIONS]")
    assert "{" not in usage
    assert example.strip().startswith(f"decal {command}")


def test_the_list_of_commands(capsys: pytest.CaptureFixture[str]) -> None:
    """Fails when a command is added without a summary, or the order of a first visit is lost."""
    main(["--help"])
    listed = capsys.readouterr().out.partition("Commands:\n")[2].splitlines()
    rows = [line.split(maxsplit=1) for line in listed if not line.startswith("   ")]
    assert [row[0] for row in rows] == COMMANDS
    assert all(len(row[1].split()) >= 3 for row in rows)
    assert len(app.registered_commands) == len(COMMANDS)


@pytest.mark.parametrize("args", [["--help"], ["train", "--help"], ["--version"], ["trian"]])
def test_help_imports_nothing_heavy(args: list[str]) -> None:
    """Fails when a command imports its verb or rich at its top: help is to come in 0.3 s."""
    code = (
        f"import sys; from decal.cli import main; main({args});"
        "heavy = {'torch', 'transformers', 'rich', 'numpy', 'ruamel', 'datasets', 'decal.config'};"
        "print('heavy:', sorted(heavy & set(sys.modules)))"
    )
    assert python("-c", code).stdout.rstrip().endswith("heavy: []")


def test_a_reader_that_goes_away_is_not_an_error() -> None:
    """Fails when `decal ... | head -1` ends in a BrokenPipeError."""
    code = (
        "import os, sys; read, write = os.pipe(); os.close(read); os.dup2(write, 1);"
        "from decal.cli import main; sys.exit(main(['--help']))"
    )
    done = python("-c", code)
    assert (done.returncode, done.stderr) == (141, "")


def test_output_survives_a_narrow_encoding(tmp_path: Path) -> None:
    """Fails when stdout cannot hold a character and a UnicodeEncodeError is raised."""
    done = python("-m", "decal.cli", "init", "-", "--output", "läufe", PYTHONIOENCODING="ascii")
    assert done.returncode == 0, done.stderr
    assert "l\\xe4ufe" in done.stdout


def test_colour_only_where_it_is_wanted(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Fails when errors are coloured in a pipe, or although NO_COLOR is set."""
    main(["zzz"])
    assert "\x1b[" not in capsys.readouterr().err
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    main(["zzz"])
    assert capsys.readouterr().err.startswith("\x1b[1;31merror:\x1b[0m there is no command")
    monkeypatch.setenv("NO_COLOR", "1")
    main(["zzz"])
    assert "\x1b[" not in capsys.readouterr().err


def test_errors_are_wrapped_between_words(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], raising: Raising
) -> None:
    """Fails when a terminal breaks a path in two, or lines in a pipe are broken at all."""
    path = "/long/" + "path/" * 6
    error = DataError(f"the file `{path}` of the run is gone", details=["row 3 " * 20])
    _, text = raising(error)
    assert len(text.splitlines()) == 2
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "50")
    _, text = raising(error)
    lines = text.splitlines()
    assert max(map(len, lines)) <= 50
    assert lines[:3] == ["error: the file", f"  `{path}` of the", "  run is gone"]
    assert lines[3].startswith("  row 3")
    assert text.count("row 3") == 20


def test_warnings_are_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Fails when Python shows the source line of a warning, or it is lost."""

    def verb() -> dict[str, Any]:
        warnings.simplefilter("always")
        warnings.warn("threads differ:\n  4 and 2", UserWarning, stacklevel=2)
        return {"kernels": {}}

    monkeypatch.setattr(importlib.import_module("decal.verbs.env"), "env", verb)
    assert main(["env"]) == 0
    assert capsys.readouterr().err == "warning: threads differ: 4 and 2\n"


def test_every_error_has_an_exit_code_of_the_list() -> None:
    """Fails when an error class invents a code that the documentation does not know."""
    todo, codes = [DecalError], set()
    while todo:
        kind = todo.pop()
        codes.add(kind.exit_code)
        todo += kind.__subclasses__()
    assert codes == {1, 2, 130}
