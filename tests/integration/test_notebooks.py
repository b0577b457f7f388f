"""The shipped notebooks run from top to bottom in a real kernel, and show what their committed outputs show."""

from __future__ import annotations

import base64
import importlib.util
import os
from pathlib import Path
from types import ModuleType

import nbformat
import pytest

from tests.integration.processes import ROOT

FOLDER = ROOT / "recipes" / "notebooks"
NAMES = ("ppo_in_ten_cells", "your_own_reward", "reading_a_run")
PICTURE_BYTES = 60_000
SECONDS = 360.0  # of a processor, for all three


def outputs_of(notebook: nbformat.NotebookNode) -> list[list[nbformat.NotebookNode]]:
    return [cell.outputs for cell in notebook.cells if cell.cell_type == "code"]


def structure_of(notebook: nbformat.NotebookNode) -> list[list[list[str]]]:
    """For each cell and output, what it consists of: streams by name, others by their media types."""
    return [
        [[output.name] if output.output_type == "stream" else sorted(output.data) for output in outputs]
        for outputs in outputs_of(notebook)
    ]


def committed(name: str) -> nbformat.NotebookNode:
    return nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)


def pictures_of(notebook: nbformat.NotebookNode) -> list[bytes]:
    data = [output.data for outputs in outputs_of(notebook) for output in outputs if "data" in output]
    return [base64.b64decode(media["image/png"]) for media in data if "image/png" in media]


@pytest.fixture(scope="module")
def refresh() -> ModuleType:
    spec = importlib.util.spec_from_file_location("refresh", FOLDER / "refresh.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", NAMES)
def test_committed_outputs_are_whole_small_and_from_nowhere(name: str) -> None:
    notebook = committed(name)
    nbformat.validate(notebook)
    text = (FOLDER / f"{name}.ipynb").read_text()
    assert all(cell.execution_count for cell in notebook.cells if cell.cell_type == "code"), "run refresh.py"
    assert [c.execution_count for c in notebook.cells if c.cell_type == "code"] == list(
        range(1, len(outputs_of(notebook)) + 1)
    )
    assert not [o for outputs in outputs_of(notebook) for o in outputs if o.output_type == "error"]
    pictures = pictures_of(notebook)
    assert pictures, "each notebook has something to look at"
    assert max(map(len, pictures)) < PICTURE_BYTES
    for mark in ("/home/", "/tmp/", "/root/", "Warning", "Traceback"):
        assert mark not in text


def test_ppo_takes_ten_cells() -> None:
    assert len(outputs_of(committed("ppo_in_ten_cells"))) == 10


@pytest.mark.slow
def test_all_notebooks_run_in_time_and_show_what_is_committed(
    refresh: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])))
    cpu = os.times()
    for name in NAMES:
        (tmp_path / name).mkdir()
        notebook = refresh.execute(FOLDER / f"{name}.ipynb", tmp_path / name)
        assert structure_of(notebook) == structure_of(committed(name)), f"run refresh.py {name}"
        assert all(picture.startswith(b"\x89PNG") and len(picture) < PICTURE_BYTES for picture in pictures_of(notebook))
    now = os.times()
    busy = now.children_user + now.children_system - cpu.children_user - cpu.children_system
    # Of the processor, as other work on the machine makes the clock run on; each cell has refresh.py's limit beside.
    assert 0 < busy < SECONDS
