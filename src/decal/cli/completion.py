"""decal completion: a script that completes commands and options in bash, zsh or fish.

The script is written out whole from the commands as they are: completing costs no start of Python.
Rejected: typer's own, which runs `decal` for every press of the key, a third of a second each.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any, Literal, get_args, get_origin

import typer

from decal.cli import console


def completion(
    context: typer.Context,
    shell: Annotated[Literal["bash", "zsh", "fish"], typer.Argument(help="Your shell.")],
) -> None:
    """\b
    decal completion bash > ~/.local/share/bash-completion/completions/decal

    Prints a script for the shell. zsh wants it as a file `_decal` in a folder of $fpath, fish as
    ~/.config/fish/completions/decal.fish.
    """
    assert context.parent is not None
    group: Any = context.parent.command
    commands = [_Words.of(name, command) for name, command in group.commands.items()]
    write = {"bash": _bash, "zsh": _zsh, "fish": _fish}[shell]
    console.write("\n".join(write(_Words.of("decal", group), commands)))


@dataclass(frozen=True)
class _Option:
    names: tuple[str, ...]
    help: str
    takes_value: bool
    choices: tuple[str, ...]


@dataclass(frozen=True)
class _Words:
    """One command: what may stand behind it."""

    name: str
    help: str
    options: tuple[_Option, ...]
    choices: tuple[str, ...]
    """Values of its first argument, where these are known; else files are completed."""

    @classmethod
    def of(cls, name: str, command: Any) -> _Words:
        found = []
        for parameter in [*command.params, _HELP]:
            if getattr(parameter, "hidden", False) or parameter.param_type_name != "option":
                continue
            choices = _choices(parameter)
            text, valued = parameter.help or "", not parameter.is_flag
            found.append(_Option(tuple(parameter.opts), text, valued, choices))
            if parameter.secondary_opts:
                found.append(_Option(tuple(parameter.secondary_opts), text, False, choices))
        arguments = [p for p in command.params if p.param_type_name == "argument"]
        values = _choices(arguments[0]) if arguments else ()
        return cls(name, command.short_help or "", tuple(found), values)

    @property
    def names(self) -> list[str]:
        return [name for option in self.options for name in option.names]


def _choices(parameter: Any) -> tuple[str, ...]:
    """The values that typer takes for a parameter, where its annotation lists them."""
    annotation = getattr(getattr(parameter, "type_descriptor", None), "annotation", None)
    parts = [annotation, *get_args(annotation)]
    return tuple(str(v) for part in parts if get_origin(part) is Literal for v in get_args(part))


class _HelpOption:
    """`--help`, which the parser adds by itself."""

    param_type_name, opts, secondary_opts = "option", ["-h", "--help"], ()
    help, is_flag, hidden = "Show this message and exit.", True, False


_HELP = _HelpOption()


def _quoted(text: str) -> str:
    return "'" + text.replace("'", "'\\''") + "'"


# --- bash -------------------------------------------------------------------------------------


def _bash(root: _Words, commands: list[_Words]) -> Iterator[str]:
    yield "# decal: completion for bash, made by `decal completion bash`"
    yield "_decal() {"
    yield '    local word="${COMP_WORDS[COMP_CWORD]}" before="${COMP_WORDS[COMP_CWORD-1]}"'
    yield '    local command="" options="" values="" i'
    yield "    for ((i = 1; i < COMP_CWORD; i++)); do"
    yield '        case "${COMP_WORDS[i]}" in'
    yield "            -*) ;;"
    yield '            *) command="${COMP_WORDS[i]}"; break ;;'
    yield "        esac"
    yield "    done"
    yield '    case "$command" in'
    yield f'        "") options="{" ".join([c.name for c in commands] + root.names)}" ;;'
    for command in commands:
        yield f'        {command.name}) options="{" ".join([*command.choices, *command.names])}" ;;'
    yield "    esac"
    yield '    case "$command $before" in'
    for command in commands:
        for option in command.options:
            for name in option.names if option.choices else ():
                yield f'        "{command.name} {name}") values="{" ".join(option.choices)}" ;;'
    yield "        *) ;;"
    yield "    esac"
    yield "    COMPREPLY=()"
    yield '    if [[ -n "$values" ]]; then'
    yield '        COMPREPLY=($(compgen -W "$values" -- "$word"))'
    chosen = " || ".join(f'"$command" == {c.name}' for c in commands if c.choices)
    known = f" || ( {chosen} )" if chosen else ""
    yield f'    elif [[ -z "$command" || "$word" == -*{known} ]]; then'
    yield '        COMPREPLY=($(compgen -W "$options" -- "$word"))'
    yield "    fi"
    yield "}"
    yield "complete -o default -F _decal decal"


# --- zsh --------------------------------------------------------------------------------------


def _zsh(root: _Words, commands: list[_Words]) -> Iterator[str]:
    yield "#compdef decal"
    yield "# decal: completion for zsh, made by `decal completion zsh`"
    yield "_decal() {"
    yield "    local context state state_descr line"
    yield "    typeset -A opt_args"
    yield "    local -a commands"
    yield "    commands=("
    for command in commands:
        yield f"        {_quoted(command.name + ':' + command.help.replace(':', chr(92) + ':'))}"
    yield "    )"
    yield "    _arguments -C \\"
    yield from _zsh_options(root, "        ")
    yield "        '1:command:->command' '*::argument:->argument'"
    yield '    case "$state" in'
    yield "        command) _describe 'command' commands ;;"
    yield "        argument)"
    yield '            case "$words[1]" in'
    for command in commands:
        yield f"                {command.name})"
        yield "                    _arguments \\"
        yield from _zsh_options(command, " " * 24)
        values = f"({' '.join(command.choices)})" if command.choices else "_files"
        yield f"                        '*:argument:{values}' ;;"
    yield "            esac ;;"
    yield "    esac"
    yield "}"
    yield "compdef _decal decal"
    yield 'if [ "$funcstack[1]" = "_decal" ]; then _decal "$@"; fi'


def _zsh_options(command: _Words, indent: str) -> Iterator[str]:
    for option in command.options:
        says = "".join("\\" + c if c in "[]:\\" else c for c in option.help)
        values = f"({' '.join(option.choices)})" if option.choices else "_files"
        value = f":value:{values}" if option.takes_value else ""
        for name in option.names:
            yield f"{indent}{_quoted(f'*{name}[{says}]{value}')} \\"


# --- fish -------------------------------------------------------------------------------------


def _fish(root: _Words, commands: list[_Words]) -> Iterator[str]:
    yield "# decal: completion for fish, made by `decal completion fish`"
    yield "complete -c decal -n __fish_use_subcommand -f"
    for command in commands:
        line = f"complete -c decal -n __fish_use_subcommand -a {command.name}"
        yield f"{line} -d {_fish_quoted(command.help)}"
    yield from _fish_options(root, "__fish_use_subcommand")
    for command in commands:
        where = f"'__fish_seen_subcommand_from {command.name}'"
        if command.choices:
            yield f"complete -c decal -n {where} -f -a {_fish_quoted(' '.join(command.choices))}"
        yield from _fish_options(command, where)


def _fish_options(command: _Words, where: str) -> Iterator[str]:
    for option in command.options:
        names = " ".join(
            f"-l {name[2:]}" if name.startswith("--") else f"-s {name[1:]}" for name in option.names
        )
        choices = f" -x -a {_fish_quoted(' '.join(option.choices))}" if option.choices else ""
        value = choices or (" -r" if option.takes_value else "")
        yield f"complete -c decal -n {where} {names}{value} -d {_fish_quoted(option.help)}"


def _fish_quoted(text: str) -> str:
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"
