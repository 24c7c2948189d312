"""The shape of the source, kept by machine.

Imports point one way only, files and functions stay small, nothing is written twice. The limits are
there so that one stops and thinks, not to force contortions: an exception is a line in `EXCEPTIONS`
with its reason, and an exception that is no longer needed fails too.
"""

from __future__ import annotations

import ast
import io
import re
import tokenize
from collections import defaultdict
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

SRC = Path(__file__).resolve().parents[1] / "src" / "decal"

MAX_FILE = 500
MAX_FUNCTION = 60
MAX_PARAMETERS = 8
MAX_CLASS_DEPTH = 2
MIN_DUPLICATE = 10

LEVELS = (
    {"errors", "version"},
    {"problems", "untrusted"},
    {"config"},
    {"runfile", "kernels"},
    {"quant"},
    {"adapters", "store", "data", "demo"},
    {"model", "objectives", "plan"},
    {"train", "weights", "export", "serve", "report"},
    {"verbs"},
    {"__init__"},
    {"cli"},
)
"""A part may import parts of the sets above its own, and itself; never its siblings."""

FORBIDDEN = {
    "adapters": {"quant"},
    "store": {"quant", "kernels"},
    "data": {"quant", "kernels"},
    "train": {"quant", "adapters", "model", "kernels"},
    "weights": {"model"},
    "quant": {"adapters"},
}
"""Arrows that the levels would allow, and that the design does not."""

LOCAL_IMPORTS = ("cli/", "__init__.py", "kernels/")
"""Where functions may import decal's own modules: start-up time, registries, optional backends."""

FORBIDDEN_NAMES = {"utils", "common", "core", "helpers", "misc"}

EXCEPTIONS: dict[tuple[str, str], str] = {
    ("parameters", "cli/compare.py:compare"): "typer makes one option of each parameter",
    ("parameters", "cli/generate.py:generate"): "typer makes one option of each parameter",
    ("parameters", "cli/merge.py:merge"): "typer makes one option of each parameter",
    ("parameters", "cli/sweep.py:sweep"): "typer makes one option of each parameter",
    **{
        ("parameters", f"kernels/{file}.py:attention_flat_backward"): "what forward took and gave"
        for file in ("ops", "native_attention", "fused_attention", "reference_attention")
    },
    ("parameters", "verbs/compare.py:compare"): "public; each is an option of the command",
    ("parameters", "verbs/generate.py:generate"): "public; each is an option of the command",
    ("parameters", "verbs/merge.py:merge"): "public; each is an option of the command",
}
"""(rule, place) -> why this one may stay."""


class Source:
    """One file of the package."""

    def __init__(self, path: Path):
        self.path = path
        self.name = path.relative_to(SRC).as_posix()
        self.text = path.read_text(encoding="utf-8")
        self.tree = ast.parse(self.text, filename=str(path))
        parts = self.name.removesuffix(".py").split("/")
        self.part = parts[0]
        """The folder below decal/, or the file's own name."""
        self.module = ".".join(["decal", *parts]).removesuffix(".__init__")
        self.nodes = tuple(ast.walk(self.tree))


@cache
def sources() -> tuple[Source, ...]:
    return tuple(Source(path) for path in sorted(SRC.rglob("*.py")))


@cache
def modules() -> frozenset[str]:
    return frozenset(source.module for source in sources())


def functions(source: Source) -> Iterator[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef]]:
    for node in source.nodes:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield f"{source.name}:{node.name}", node


def imported(source: Source, node: ast.AST) -> list[str]:
    """The modules of decal that an import statement names."""
    if isinstance(node, ast.Import):
        return [a.name for a in node.names if a.name.split(".")[0] == "decal"]
    if not isinstance(node, ast.ImportFrom):
        return []
    base = node.module or ""
    if node.level:
        package = source.module.split(".")
        package = package if source.name.endswith("__init__.py") else package[:-1]
        package = package[: len(package) - node.level + 1]
        base = ".".join([*package, *([base] if base else [])])
    if base.split(".")[0] != "decal":
        return []
    named = [f"{base}.{a.name}" for a in node.names]
    return [name if name in modules() else base for name in named]


def imports_at_load(source: Source) -> list[str]:
    """What the file imports when it is imported: not in functions, not for type checkers."""
    found: list[str] = []
    todo: list[ast.AST] = list(source.tree.body)
    while todo:
        node = todo.pop()
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            todo += node.orelse
            continue
        found += imported(source, node)
        todo += ast.iter_child_nodes(node)
    return found


def check(rule: str, found: dict[str, str]) -> None:
    """Compares what breaks a rule with the table of exceptions, both ways."""
    allowed = {place for r, place in EXCEPTIONS if r == rule}
    broken = [f"{place}: {text}" for place, text in sorted(found.items()) if place not in allowed]
    stale = [f"{place}: no longer an exception" for place in sorted(allowed - set(found))]
    assert not broken + stale, f"{rule}\n  " + "\n  ".join(broken + stale)


def test_every_part_has_a_level() -> None:
    """Fails when a folder appears that the arrows do not know."""
    known = {part for level in LEVELS for part in level}
    check("level", {s.name: "its folder has no level" for s in sources() if s.part not in known})


def test_imports_point_downward() -> None:
    """Fails when data/ imports store/, train/ imports quant/, or errors.py imports anything."""
    level = {part: i for i, parts in enumerate(LEVELS) for part in parts}
    found = {}
    for source in sources():
        for node in source.nodes:
            for target in imported(source, node):
                part = target.split(".")[1] if "." in target else "__init__"
                if part == source.part or source.part == "__init__":
                    continue
                up = level.get(part, 99) >= level.get(source.part, 99)
                if up or part in FORBIDDEN.get(source.part, set()):
                    found[f"{source.name} -> {part}"] = f"line {getattr(node, 'lineno', 0)}"
    check("downward", found)


def test_no_import_cycles() -> None:
    """Fails when two files import each other while they load."""
    graph = {s.module: [m for m in imports_at_load(s) if m != s.module] for s in sources()}
    done: set[str] = set()
    found: dict[str, str] = {}

    def visit(module: str, way: tuple[str, ...]) -> None:
        if module in way:
            circle = [*way[way.index(module) :], module]
            found[min(circle)] = " -> ".join(circle)
        elif module not in done:
            for target in graph.get(module, []):
                visit(target, (*way, module))
            done.add(module)

    for module in graph:
        visit(module, ())
    check("cycle", found)


def test_own_imports_stand_at_the_top() -> None:
    """Fails when a function outside cli/, __init__.py and kernels/ imports decal."""
    found = {}
    for source in sources():
        if source.name.startswith(LOCAL_IMPORTS) or source.name.endswith("__init__.py"):
            continue
        for place, function in functions(source):
            if any(imported(source, node) for node in ast.walk(function)):
                found[place] = f"imports decal inside a function, line {function.lineno}"
    check("local import", found)


def test_files_are_short() -> None:
    """Fails when a file grows beyond 500 lines."""
    sizes = {s.name: len(s.text.splitlines()) for s in sources()}
    check("file", {n: f"{k} lines, at most {MAX_FILE}" for n, k in sizes.items() if k > MAX_FILE})


def test_functions_are_short() -> None:
    """Fails when a function grows beyond 60 lines; its docstring counts."""
    found = {}
    for source in sources():
        for place, function in functions(source):
            lines = (function.end_lineno or 0) - function.lineno + 1
            if lines > MAX_FUNCTION:
                found[place] = f"{lines} lines, at most {MAX_FUNCTION}"
    check("function", found)


def test_functions_take_few_parameters() -> None:
    """Fails when a ninth parameter is added; self and cls are not counted."""
    found = {}
    for source in sources():
        for place, function in functions(source):
            a = function.args
            names = [p.arg for p in (*a.posonlyargs, *a.args, *a.kwonlyargs)]
            names = [n for i, n in enumerate(names) if not (i == 0 and n in ("self", "cls"))]
            count = len(names) + bool(a.vararg) + bool(a.kwarg)
            if count > MAX_PARAMETERS:
                found[place] = f"{count} parameters, at most {MAX_PARAMETERS}"
    check("parameters", found)


def test_classes_are_shallow() -> None:
    """Fails when a class of ours inherits from one of ours that inherits from a third."""
    bases: dict[str, list[str]] = {}
    for source in sources():
        for node in source.nodes:
            if isinstance(node, ast.ClassDef):
                bases[node.name] = [ast.unparse(b).split("[")[0].split(".")[-1] for b in node.bases]

    def depth(name: str) -> int:
        return 1 + max((depth(b) for b in bases[name] if b in bases and b != name), default=0)

    deep = {n: f"depth {depth(n)}" for n in bases if depth(n) > MAX_CLASS_DEPTH}
    check("class depth", deep)


def test_names_say_something() -> None:
    """Fails when a utils.py or a folder called common appears."""
    found = {
        s.name: "says nothing about what it holds"
        for s in sources()
        if FORBIDDEN_NAMES & set(Path(s.name).with_suffix("").parts)
    }
    check("name", found)


def test_every_file_says_what_it_is() -> None:
    """Fails when a file with code has no docstring."""
    found = {
        s.name: "no docstring" for s in sources() if s.tree.body and not ast.get_docstring(s.tree)
    }
    check("docstring", found)


def test_nothing_is_left_for_later() -> None:
    """Fails when a comment promises work instead of describing the code."""
    words = re.compile(r"\b(TODO|FIXME|XXX|HACK)\b")
    found = {}
    for source in sources():
        for token in tokenize.generate_tokens(io.StringIO(source.text).readline):
            if token.type == tokenize.COMMENT and words.search(token.string):
                found[f"{source.name}:{token.start[0]}"] = token.string
    check("later", found)


def significant_lines(source: Source) -> list[tuple[int, str]]:
    """(line number, normalized text) of the code: imports, signatures, docstrings, comments and
    blank lines apart, and lines of brackets alone."""
    skipped: set[int] = set()
    for node in source.nodes:
        docstring = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        if docstring or isinstance(node, ast.Import | ast.ImportFrom):
            skipped |= set(range(node.lineno, (node.end_lineno or 0) + 1))
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            start = min([node.lineno, *(d.lineno for d in node.decorator_list)])
            skipped |= set(range(start, node.body[0].lineno))
    lines = []
    for number, line in enumerate(source.text.splitlines(), start=1):
        text = re.sub(r"\s+", " ", line.split("  #")[0]).strip()
        if number not in skipped and re.search(r"\w", text) and not text.startswith("#"):
            lines.append((number, text))
    return lines


def test_nothing_is_written_twice() -> None:
    """Fails when ten lines of code in a row stand in two places."""
    blocks: dict[tuple[str, ...], list[tuple[str, int]]] = defaultdict(list)
    for source in sources():
        lines = significant_lines(source)
        for i in range(len(lines) - MIN_DUPLICATE + 1):
            window = lines[i : i + MIN_DUPLICATE]
            blocks[tuple(text for _, text in window)].append((source.name, window[0][0]))
    found = {}
    for places in blocks.values():
        if len(places) > 1:
            (first, a), (second, b) = places[:2]
            found.setdefault(f"{first} = {second}", f"from lines {a} and {b}")
    check("duplicate", found)


def test_every_exception_has_a_reason() -> None:
    """Fails when a line is added to the table without saying why."""
    assert all(len(reason.split()) >= 4 for reason in EXCEPTIONS.values())


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("import decal.store.peft", ["decal.store.peft"]),
        ("from decal.store import peft", ["decal.store.peft"]),
        ("from decal.errors import DecalError", ["decal.errors"]),
        ("from . import ops", ["decal.kernels.ops"]),
        ("from ..errors import DecalError", ["decal.errors"]),
        ("import torch", []),
    ],
)
def test_imports_are_recognized(line: str, expected: list[str]) -> None:
    """Fails when a way to write an import escapes the rules above."""
    source = next(s for s in sources() if s.name == "kernels/ops.py")
    assert imported(source, ast.parse(line).body[0]) == expected
