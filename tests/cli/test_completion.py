"""Completion scripts: the shells read them, and bash completes what is there."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from decal.cli import app, main


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_shell_can_read_its_script(
    shell: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Fails when a quote in a help text ends a string, or a command is left out."""
    assert main(["completion", shell]) == 0
    text = capsys.readouterr().out
    for command in app.registered_commands:
        assert command.callback is not None
        assert command.callback.__name__ in text
    if shutil.which(shell) is None:
        pytest.skip(f"{shell} is not installed")
    script = tmp_path / "script"
    script.write_text(text)
    done = subprocess.run([shell, "-n", str(script)], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(
    ("line", "wanted"),
    [
        (["decal", "ins"], ["inspect"]),
        (["decal", "--v"], ["--version"]),
        (["decal", "generate", "m", "--top"], ["--top-p", "--top-k"]),
        (["decal", "generate", "--pl"], ["--plain"]),
        (["decal", "merge", "--dtype", "f"], ["fp16", "fp32"]),
        (["decal", "merge", "a", "-o", "x", "--onto", ""], ["trained", "original"]),
        (["decal", "completion", "f"], ["fish"]),
        (["decal", "inspect", "runs"], []),
        (["decal", "--version", "comp"], ["compare", "completion"]),
    ],
)
def test_bash_completes(
    line: list[str], wanted: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """Fails when options of another command are offered, or files are not left to the shell."""
    main(["completion", "bash"])
    words = " ".join(f"'{word}'" for word in line)
    script = (
        f"{capsys.readouterr().out}\n"
        f"COMP_WORDS=({words}); COMP_CWORD={len(line) - 1}; _decal\n"
        'printf "%s\\n" "${COMPREPLY[@]}"'
    )
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=False)
    assert done.stderr == ""
    assert done.stdout.split() == wanted


def test_another_shell_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    """Fails when a script for no shell is printed."""
    assert main(["completion", "tcsh"]) == 2
    assert "`tcsh` is not one of `bash`, `zsh`, `fish`" in capsys.readouterr().err
