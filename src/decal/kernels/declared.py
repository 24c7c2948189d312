"""What the sources of the compiled library declare, so that an older library is noticed.

ctypes cannot see the parameters of a compiled function: called with the arguments of a newer source
it would read the wrong memory. So the library carries the description of the sources it was built
from, and native.py compares it with the sources that lie beside the package in a checkout. Knows no
torch and no library; native/build.py runs this file on its own.
"""

from __future__ import annotations

import hashlib
import re
from pathlib import Path
from typing import Any

_FUNCTION = re.compile(r"\bEXPORT\(([\w#]+)\)\s*\(([^)]*)\)")
_MACRO = re.compile(r"^[ \t]*#[ \t]*define\b(?:.*\\\n)*.*$", re.MULTILINE)
_STRUCT = re.compile(r"^struct\s+(?:alignas\(\w+\)\s+)?(\w+)\s*\{.*?^\};", re.MULTILINE | re.DOTALL)

ANY = "*"
"""Stands for the functions that a macro declares, whose names only the compiler knows."""


def describe(folder: Path) -> dict[str, Any]:
    """{"sources": a hash, "functions": {name: a hash of parameters and the structs they name}}."""
    paths = sorted([*folder.glob("*.cpp"), *folder.glob("*.h")])
    texts = [path.read_text(encoding="utf-8") for path in paths]
    structs: dict[str, str] = {}
    for found in (found for text in texts for found in _STRUCT.finditer(text)):
        structs[found[1]] = structs.get(found[1], "") + found[0]
    declared: dict[str, str] = {}
    for text in texts:
        macros = _FUNCTION.findall(" ".join(_MACRO.findall(text)))
        named = [(ANY, parameters) for _, parameters in macros]
        named += _FUNCTION.findall(_MACRO.sub("", text))
        for name, parameters in named:
            declared[name] = declared.get(name, "") + _with_structs(parameters, structs)
    return {
        "sources": _hash("".join(texts)),
        "functions": {name: _hash(text) for name, text in sorted(declared.items())},
    }


def changed(then: dict[str, Any], now: dict[str, Any]) -> frozenset[str]:
    """The functions, or `ANY`, that are not declared now as they were then."""
    old, new = then["functions"], now["functions"]
    return frozenset(name for name in old.keys() | new.keys() if old.get(name) != new.get(name))


def _with_structs(text: str, structs: dict[str, str]) -> str:
    """The text with the bodies of all structs that it names, directly or through others."""
    seen: set[str] = set()
    while new := (set(re.findall(r"\w+", text)) & structs.keys()) - seen:
        seen |= new
        text += "".join(structs[name] for name in sorted(new))
    return text


def _hash(text: str) -> str:
    return hashlib.sha256(" ".join(text.split()).encode()).hexdigest()[:16]
