"""A cell of the comparison inside PPO: one backend, one ZeRO stage, one number of ranks, in processes of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lightning_hybrid.serving.process import is_of_ranks

_RECIPES = Path(__file__).resolve().parents[1]
_PATIENCE = 1800.0  # seconds that a cell may take


@dataclass(frozen=True)
class Cell:
    """What is run, as it is told to a process.

    Attributes:
        backend: of the rollouts, ``native`` or ``vllm``.
        stage: of ZeRO.
        ranks: processes, which share the rows evenly.
        path: folder or hub name of the model, or None.
        shape: of random weights, where there is no path.
        prompt_tokens: shortest and longest prompt of random ids.
        rows: prompts of an iteration over all ranks, and responses: one to each.
        max_new_tokens: tokens that a response may have.
        iterations: that count; one before them and one after them are run, too.
        pushes: how often the weights are pushed in each order.
        threads: of each rank on a CPU.
    """

    backend: str
    stage: int
    ranks: int
    path: str | None
    shape: str
    prompt_tokens: tuple[int, int]
    rows: int
    max_new_tokens: int
    iterations: int
    pushes: int
    threads: int


def run_cell(cell: Cell) -> dict[str, Any]:
    """What the cell's rank 0 measured, see :func:`peers.inside_ppo.measure`; where it failed, ``failed`` says why."""
    with tempfile.TemporaryDirectory() as folder:
        figures, errors = Path(folder) / "figures.json", Path(folder) / "errors.txt"
        command = [sys.executable, "-m", "peers.inside_ppo", json.dumps(asdict(cell)), str(figures)]
        with errors.open("wb") as stderr:
            code = _ended(command, folder, stderr, _environment(cell))
        if code == 0 and figures.exists():
            measured: dict[str, Any] = json.loads(figures.read_text())
            return measured
        return {"failed": _last_error(errors.read_text(errors="replace"), code)}


def _ended(command: list[str], folder: str, stderr: Any, environment: dict[str, str]) -> int | None:
    """The exit code; None where it took too long and was ended, its ranks with it."""
    process = subprocess.Popen(
        command, cwd=folder, env=environment, stdout=subprocess.DEVNULL, stderr=stderr, start_new_session=True
    )
    try:
        return process.wait(_PATIENCE)
    except subprocess.TimeoutExpired:
        return None
    finally:
        if process.poll() is None:
            os.killpg(process.pid, 9)
            process.wait()


def _environment(cell: Cell) -> dict[str, str]:
    """This process's, with the recipes to import from and as many threads as were asked for."""
    path = os.pathsep.join(filter(None, [str(_RECIPES), str(_RECIPES.parent), os.environ.get("PYTHONPATH")]))
    kept = {name: value for name, value in os.environ.items() if not is_of_ranks(name)}
    return kept | {"PYTHONPATH": path, "OMP_NUM_THREADS": str(cell.threads)}


def _last_error(text: str, code: int | None) -> str:
    """The last line that names an error, for a line of a table."""
    if code is None:
        return f"not finished within {_PATIENCE:.0f} s"
    named = [line.strip() for line in text.splitlines() if "Error" in line]
    return named[-1] if named else f"exit code {code}"
