"""Run the notebooks from top to bottom, each in a kernel and a folder of its own, and keep what they showed.

``python recipes/notebooks/refresh.py`` refreshes all, ``... refresh.py reading_a_run`` one. What libraries write to
stderr is not kept: it tells of the machine, and not of the lesson. Needs ``pip install "lightning-hybrid[notebook]"``.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from nbformat import NotebookNode

FOLDER = Path(__file__).resolve().parent
TIMEOUT = 600  # seconds of a cell


def execute(path: Path, folder: str | Path) -> NotebookNode:
    """Run a notebook in a new kernel.

    Args:
        path: of the notebook, which is left as it is.
        folder: in which its cells read and write.

    Returns:
        The notebook with its new outputs.

    Raises:
        nbclient.exceptions.CellExecutionError: if a cell raises; names it.
    """
    import nbformat
    from nbclient import NotebookClient

    notebook: NotebookNode = nbformat.read(path, as_version=4)  # type: ignore[no-untyped-call]
    client = NotebookClient(
        notebook,
        timeout=TIMEOUT,
        kernel_name="python3",
        resources={"metadata": {"path": str(folder)}},
        record_timing=False,
    )
    client.execute()
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
    # Which Python it was differs from machine to machine.
    notebook.metadata = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    return notebook


def refresh(path: Path) -> None:
    """Run a notebook in a temporary folder, and write it with its new outputs."""
    import nbformat

    begin = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        notebook = execute(path, folder)
    nbformat.write(notebook, path)  # type: ignore[no-untyped-call]
    print(f"{path.name}: {time.perf_counter() - begin:.0f} s, {path.stat().st_size / 1000:.0f} kB")


def main() -> None:
    """Refresh the notebooks that are named, or all."""
    # Kernels find the package as this process does.
    root = str(FOLDER.parent.parent)
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
    for name in sys.argv[1:] or sorted(path.stem for path in FOLDER.glob("*.ipynb")):
        refresh(FOLDER / f"{name.removesuffix('.ipynb')}.ipynb")


if __name__ == "__main__":
    main()
