"""The notebooks of examples/ run top to bottom, and their objects show themselves."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

nbformat = pytest.importorskip("nbformat")
nbclient = pytest.importorskip("nbclient")
pytest.importorskip("ipykernel")

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted((ROOT / "examples").glob("*.ipynb"))


def read(path: Path) -> Any:
    return nbformat.read(path, as_version=4)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_they_are_kept_without_outputs(path: Path) -> None:
    """Kept outputs grow stale unseen, and hide what a change did; the test below makes them anew.

    Mutation: commit an executed notebook.
    """
    for cell in read(path).cells:
        assert not cell.get("outputs")
        assert cell.get("execution_count") is None


@pytest.fixture(scope="module")
def executed(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """quickstart.ipynb after its run, in a folder of its own."""
    threads = os.environ.get("DECAL_TEST_THREADS", "1")
    before = {name: os.environ.get(name) for name in ("OMP_NUM_THREADS", "PYTHONPATH")}
    os.environ["OMP_NUM_THREADS"] = threads
    os.environ["PYTHONPATH"] = os.pathsep.join(
        filter(None, [str(ROOT / "src"), before["PYTHONPATH"]])
    )
    place = {"metadata": {"path": str(tmp_path_factory.mktemp("notebook"))}}
    book = read(ROOT / "examples" / "quickstart.ipynb")
    try:
        client = nbclient.NotebookClient(book, timeout=600, kernel_name="python3", resources=place)
        client.execute()
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
    return book


def outputs(book: Any, begins: str) -> list[Any]:
    (cell,) = [cell for cell in book.cells if cell.source.startswith(begins)]
    found: list[Any] = cell.outputs
    return found


def test_it_runs_and_shows(executed: Any) -> None:
    """Mutation: a representation that raises (the cell would show its plain one), or spam."""
    shown = outputs(executed, "model, tokenizer")
    assert "down_proj" in shown[-1].data["text/html"]
    training = outputs(executed, "config")
    live = [out for out in training if out.output_type == "display_data"]
    assert len(live) == 1
    assert "step 30 of 30" in live[0].data["text/html"]
    assert "<polyline" in live[0].data["text/html"]
    assert "report.html" in training[-1].data["text/html"]
    for begins in ("result.plot", "result.spectrum"):
        (picture,) = outputs(executed, begins)
        assert len(picture.data["image/png"]) > 5_000
    plan = outputs(executed, "decal.plan")[-1]
    assert "8,030,261,248 parameters" in plan.data["text/html"]
    assert "<td" in plan.data["text/html"]
    sweep = outputs(executed, "sweep = ")[-1].data["text/html"]
    assert "r16" in sweep
    assert "Take r" in sweep
    (picture,) = outputs(executed, "sweep.plot")
    assert len(picture.data["image/png"]) > 5_000
    assert "scaling" in outputs(executed, "decal.Adapter")[0].data["text/html"]


def test_it_learned_and_merged(executed: Any) -> None:
    """Mutation: compare the base with itself."""
    losses = eval(outputs(executed, "found =")[-1].data["text/plain"])
    assert losses["r8"] < 0.8 * losses["base"]
    assert "28 of 28" in outputs(executed, "merged =")[-1].data["text/plain"]
