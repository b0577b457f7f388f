"""A real Jupyter kernel: training starts in it, and starts again, without a restart."""

from __future__ import annotations

import os
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

from tests.integration.processes import ROOT

IMPORTS = """
import lightning as L
import torch

import lightning_hybrid
"""
MODULE = """
class TwoNetworks(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.automatic_optimization = False
        self.left, self.right = torch.nn.Linear(3, 1), torch.nn.Linear(3, 1)

    def training_step(self, batch, batch_idx):
        for optimizer, network in zip(self.optimizers(), (self.left, self.right)):
            optimizer.zero_grad()
            self.manual_backward((network(batch) - 1).square().mean())
            optimizer.step()

    def configure_optimizers(self):
        return [torch.optim.SGD(network.parameters(), lr=0.1) for network in (self.left, self.right)]


def biases():
    return [float(network.bias) for network in (module.left, module.right)]


data = torch.utils.data.DataLoader(torch.ones(8, 3), batch_size=4)
module = TwoNetworks()
"""
FIT = """
before = biases()
trainer = L.Trainer(strategy="hybrid_deepspeed", accelerator="cpu", devices=1, max_epochs=1)
trainer.fit(module, data)
moved = [after != old for after, old in zip(biases(), before)]
print("steps:", trainer.global_step, "moved:", moved)
"""


def printed(cell: nbformat.NotebookNode) -> str:
    return "".join(output["text"] for output in cell.outputs if output.get("name") == "stdout")


def test_two_fits_in_one_kernel_both_train(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])))
    cells = [nbformat.v4.new_code_cell(source) for source in (IMPORTS, MODULE, FIT, FIT)]
    notebook = nbformat.v4.new_notebook(cells=cells)
    NotebookClient(notebook, timeout=120, kernel_name="python3", resources={"metadata": {"path": tmp_path}}).execute()
    for cell in notebook.cells[2:]:
        assert "steps: 4 moved: [True, True]" in printed(cell)
