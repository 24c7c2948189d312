"""The command line: one file per command, each parses, calls a verb and prints.

`main` is the one place where exceptions become exit codes:

    0  done            1  rightly asked work failed, or the answer is no
    2  asked wrongly   130  Ctrl-C          143  SIGTERM

Commands import their verb when they run: `--help` imports neither torch nor rich nor a layer of
decal, so it is there at once. (typer itself takes pydantic to describe a command's options.)
"""

from __future__ import annotations

import os
import re
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

from decal import __version__
from decal.cli import (
    check,
    compare,
    completion,
    console,
    dequantize,
    diff,
    env,
    generate,
    init,
    inspect,
    merge,
    plan,
    push,
    quantize,
    quickstart,
    report,
    sweep,
    train,
    verify,
)
from decal.errors import DecalError, Interrupted, nearest

__all__ = ["main"]


class _Command(TyperCommand):
    """Arguments in the usage line as their metavars say, without braces around them."""

    def collect_usage_pieces(self, ctx: Any) -> list[str]:
        pieces = super().collect_usage_pieces(ctx)
        return [re.sub(r"^\{(.*)\}(\.\.\.)?$", r"\1", piece) for piece in pieces]


class _Commands(TyperGroup):
    """Commands in the order of a first visit, and a suggestion for a name that is none."""

    def list_commands(self, ctx: Any) -> list[str]:
        return list(self.commands)

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        name = args[0]
        if not name.startswith("-") and name not in self.commands:
            near = nearest(name, list(self.commands))
            hint = f"did you mean `decal {near}`?" if near else "`decal --help` lists all commands"
            raise DecalError(f"there is no command `{name}`", hint=hint)
        return super().resolve_command(ctx, args)


app = typer.Typer(
    cls=_Commands,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
for module in (
    quickstart,
    init,
    plan,
    check,
    train,
    sweep,
    generate,
    compare,
    inspect,
    report,
    diff,
    merge,
    verify,
    push,
    quantize,
    dequantize,
    env,
    completion,
):
    # A module's docstring begins `decal NAME: what it is for`; that is its line in the list.
    summary = (module.__doc__ or "").partition(": ")[2].partition("\n")[0].rstrip(".")
    function = getattr(module, module.__name__.rsplit(".", 1)[1])
    app.command(cls=_Command, short_help=summary)(function)


def _show_version(wanted: bool) -> None:
    if wanted:
        console.write(f"decal {__version__}")
        raise typer.Exit


@app.callback()
def decal(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="The version.")
    ] = False,
) -> None:
    """\b
    decal quickstart                    see it work in a minute, no downloads
    decal init run.yaml                 settings, every one explained
    decal check run.yaml                what is wrong with them, in a minute
    decal train run.yaml                train the adapter they describe

    LoRA and QLoRA fine-tuning that fits the machine you have, and proves what it did.
    """


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command line and returns its exit code; no exception leaves it."""
    args = list(sys.argv[1:] if argv is None else argv)
    reconfigure = getattr(sys.stdout, "reconfigure", None)
    if reconfigure is not None:
        reconfigure(errors="backslashreplace")
    # The hub's retries without a network are not the user's news; what comes of them is.
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")
    # oneDNN keeps 1,024 compiled kernels; every step has lengths of its own and reuses few of them.
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "128")
    try:
        with warnings.catch_warnings():
            warnings.showwarning = console.show_warning
            code = _run(args)
        sys.stdout.flush()
        return code
    except BrokenPipeError:
        # The reader went away (`decal inspect x | head`). What is still buffered must not be
        # flushed at exit, that would raise again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except KeyboardInterrupt:
        console.show_error(Interrupted("nothing more was written"))
        return 130
    except Exception as error:
        return _failed(error)


def _run(args: list[str]) -> int:
    try:
        root = typer.main.get_command(app)
        with root.make_context("decal", args or ["--help"]) as context:
            root.invoke(context)
    except typer.Exit as done:
        return done.exit_code
    except typer.TyperException as error:
        return _usage(error)
    except DecalError as error:
        console.show_error(error)
        _show_traceback(error)
        return error.exit_code
    return 0


def _usage(error: typer.TyperException) -> int:
    """A mistake that the parser found, in the voice of all other errors."""
    possibilities: Sequence[str] = getattr(error, "possibilities", None) or ()
    message = (error.message if possibilities else error.format_message()).rstrip(".")
    context = getattr(error, "ctx", None)
    hint = f"`{context.command_path} --help` shows what it takes" if context else None
    if possibilities:
        hint = f"did you mean `{min(possibilities, key=len)}`?"
    message = message.replace("Value error, ", "").replace("Input should be", "it must be")
    console.show_usage("error", (message[:1].lower() + message[1:]).replace("'", "`"), hint)
    return 2


def _failed(error: Exception) -> int:
    """What no layer below made a DecalError of: memory, files, packages, and decal's own bugs."""
    text = " ".join(str(error).split())
    _show_traceback(error)
    if isinstance(error, MemoryError) or "out of memory" in text or "can't allocate mem" in text:
        hint = "--set train.micro_batch_tokens=1024 or train.gradient_checkpointing=true needs less"
        console.show_usage("error", f"out of memory: {text[:200] or 'no details'}", hint)
    elif isinstance(error, OSError) and error.strerror:
        place = f"{error.filename}: " if error.filename else ""
        console.show_usage("error", f"{place}{error.strerror}")
    elif isinstance(error, ModuleNotFoundError) and not str(error.name).startswith("decal"):
        console.show_usage("error", f"the package `{error.name}` is not installed")
    else:
        console.show_usage(
            "internal error",
            f"{type(error).__name__}: {text[:300]}{_place(error)}",
            "this is a bug in decal; DECAL_TRACEBACK=1 shows where",
        )
    return 1


def _place(error: Exception) -> str:
    """` (inject.py:120)`: where the error was raised."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return f" ({Path(trace.tb_frame.f_code.co_filename).name}:{trace.tb_lineno})" if trace else ""


def _show_traceback(error: Exception) -> None:
    if os.environ.get("DECAL_TRACEBACK"):
        import traceback

        traceback.print_exception(error)
