from __future__ import annotations

import importlib.util
import sys
from types import SimpleNamespace

import pytest

from lightning_hybrid.callbacks import RichPhaseBar
from lightning_hybrid.errors import ConfigError
from tests.callbacks.test_progress import Phased, Plain, fit

pytest.importorskip("rich", reason="rich is an extra")


class Watched(RichPhaseBar):
    """Keeps what the bar shows in each phase and after each batch."""

    def __init__(self, stage):
        super().__init__(stage)
        self.seen, self.shown = [], []

    def _show_phase(self, phase):
        super()._show_phase(phase)
        self.seen.append(self._drawn.tasks[0].description)

    def on_train_batch_end(self, *arguments, **keywords):
        super().on_train_batch_end(*arguments, **keywords)
        task = self._drawn.tasks[0]
        self.shown.append((task.completed, task.total))
        self.metrics = task.fields["metrics"]

    def on_validation_batch_end(self, *arguments):
        super().on_validation_batch_end(*arguments)
        if self._drawn is not None:  # as it is in Lightning's sanity check
            self.seen.append(self._drawn.tasks[1].description)


def test_the_bar_names_phases_and_counts_the_steps_of_the_run(tmp_path):
    bar = Watched("3/3 ppo")
    fit(Phased(), bar, tmp_path, max_steps=3, max_epochs=-1)
    assert bar.seen[:3] == ["3/3 ppo · rollout", "3/3 ppo · update", "3/3 ppo · rollout"]
    assert bar.seen[-1] == "3/3 ppo · validation"
    assert "loss=" in bar.metrics
    assert "v_num" not in bar.metrics


def test_a_resumed_run_goes_on_where_it_was(tmp_path):
    first = fit(Plain(), Watched("sft"), tmp_path, max_steps=2, max_epochs=-1)
    first.save_checkpoint(tmp_path / "two.ckpt")
    bar = Watched("sft")
    fit(Plain(), bar, tmp_path, ckpt_path=tmp_path / "two.ckpt", max_steps=4, max_epochs=-1)
    assert bar.shown == [(3, 4), (4, 4)]


def test_nothing_is_left_of_the_bar_after_an_exception(tmp_path):
    module, bar = Phased(fails=True), Watched("ppo")
    with pytest.raises(ValueError, match="no update"):
        fit(module, bar, tmp_path, max_steps=1, max_epochs=-1)
    assert module.phases.listeners == []
    assert bar._drawn is None


def test_the_last_line_holds_steps_and_time(tmp_path, capsys):
    fit(Phased(), Watched("ppo"), tmp_path, max_steps=3, max_epochs=-1)
    out = capsys.readouterr().out
    assert "ppo" in out
    assert "3/3" in out
    assert "left" in out


def test_a_missing_package_is_named_with_its_extra(monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "rich" else found(name))
    with pytest.raises(ConfigError, match=r'pip install "lightning-hybrid\[rich\]"'):
        RichPhaseBar("ppo")


def test_a_process_that_has_imported_a_kernel_is_no_notebook(monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "ipywidgets" else found(name))
    import ipykernel.kernelapp  # noqa: F401

    assert RichPhaseBar("ppo").stage == "ppo"


def test_a_notebook_without_widgets_is_refused(monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "ipywidgets" else found(name))
    running = SimpleNamespace(IPKernelApp=SimpleNamespace(initialized=lambda: True))
    monkeypatch.setitem(sys.modules, "ipykernel.kernelapp", running)
    with pytest.raises(ConfigError, match="pip install ipywidgets, or use callbacks.progress=tqdm"):
        RichPhaseBar("ppo")
