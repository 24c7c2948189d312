"""The public names, pinned: adding or removing one is a decision, made here."""

from __future__ import annotations

import subprocess
import sys

import pytest

import decal

NAMES = """
    Adapter DataConfig DecalError LoraConfig QuantConfig RunConfig TrainConfig
    __version__ attach check compare dequantize detach diff disabled dump_run generate
    inspect load load_base load_run merge merge_in_place mixed plan push quantize save_adapter
    train use verify
""".split()  # noqa: SIM905 (a block of names reads better)


def run(code: str) -> str:
    """stdout of a fresh interpreter."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return done.stdout.strip()


def test_public_names() -> None:
    """Fails when a name is added, removed or renamed."""
    assert sorted(decal.__all__) == NAMES
    assert len(NAMES) <= 31
    assert set(NAMES) <= set(dir(decal))


@pytest.mark.parametrize("name", NAMES)
def test_every_name_leads_somewhere(name: str) -> None:
    """Fails when a function moves to another module and the table still names the old one."""
    found = getattr(decal, name)
    assert isinstance(found, str) or found.__name__ == name


def test_unknown_names_are_attribute_errors() -> None:
    """Fails when the lazy lookup hides a typo."""
    with pytest.raises(AttributeError, match="has no attribute 'trian'"):
        decal.trian  # noqa: B018


def test_importing_decal_imports_nothing_heavy() -> None:
    """Fails when `decal/__init__.py` imports a layer at its top."""
    heavy = {"torch", "transformers", "pydantic", "rich", "datasets", "matplotlib", "numpy"}
    loaded = run("import sys, decal; print(' '.join(sys.modules))").split()
    assert not heavy & set(loaded)


def test_train_is_the_verb_after_its_package_was_imported() -> None:
    """Fails when Python's binding of the package `decal.train` replaces the public function."""
    code = (
        "import decal, decal.train.events, sys; from decal.train import events;"
        "print(callable(decal.train), decal.train.__module__, events.__name__)"
    )
    assert run(code) == "True decal.verbs.train decal.train.events"
