"""Signals in a process of its own are in tests/integration; here they are sent to this one."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment

from lightning_hybrid.callbacks import Checkpoints, Interrupted, StopOnSignal
from lightning_hybrid.callbacks.requeue import requeue, slurm_job
from lightning_hybrid.errors import RewardError
from lightning_hybrid.modules.phases import Phases

WATCHED = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
Happening = Callable[[], None]


class Phased(L.LightningModule):
    """Two phases; `happening` takes place in one of them, of one batch."""

    def __init__(self, happening: Happening, phase: str = "rollout", batch: int = 1) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(2, 1)
        self.phases = Phases()
        self.happening, self.place = happening, (phase, batch)
        self.ended: list[str] = []

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        for phase in ("rollout", "update"):
            with self.phases(phase):
                if self.place == (phase, batch_idx):
                    self.happening()
                self.ended.append(f"{phase} {batch_idx}")
        return self.layer(batch).square().mean()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        if self.place == ("validation", batch_idx):
            self.happening()
        self.ended.append(f"validation {batch_idx}")

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit(module: L.LightningModule, *callbacks: L.Callback, validate: bool = False, **arguments: Any) -> L.Trainer:
    rows = torch.utils.data.DataLoader(torch.ones(8, 2), batch_size=2)
    settings = {"max_steps": 4, "logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    settings |= {"accelerator": "cpu", "enable_checkpointing": any(isinstance(c, Checkpoints) for c in callbacks)}
    trainer = L.Trainer(callbacks=[*callbacks], **(settings | arguments))
    trainer.fit(module, rows, rows if validate else None)
    return trainer


def sent(number: signal.Signals) -> Happening:
    return lambda: os.kill(os.getpid(), number)


@pytest.fixture(autouse=True)
def handlers_stay() -> Any:
    """Whatever happens, the handlers from before are back."""
    before = [signal.getsignal(number) for number in WATCHED]
    yield
    assert [signal.getsignal(number) for number in WATCHED] == before


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 0), (signal.SIGUSR1, 0), (signal.SIGINT, 130)])
def test_the_phase_ends_and_then_the_run(
    number: signal.Signals, code: int, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    module = Phased(sent(number))
    with pytest.raises(Interrupted) as raised:
        fit(module, StopOnSignal(tmp_path))
    assert raised.value.code == code
    assert module.ended == ["rollout 0", "update 0", "rollout 1"]
    assert (tmp_path / "step=000001.ckpt").exists()
    assert f"{number.name}: finishing the phase 'rollout', then writing a checkpoint" in capfd.readouterr().err


def test_the_last_phase_ends_with_its_batch(tmp_path: Path) -> None:
    module = Phased(sent(signal.SIGTERM), "update")
    with pytest.raises(Interrupted):
        fit(module, StopOnSignal(tmp_path))
    assert module.ended[-1] == "update 1"
    assert (tmp_path / "step=000002.ckpt").exists()


def test_a_validation_is_finished(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    module = Phased(sent(signal.SIGTERM), "validation")
    with pytest.raises(Interrupted):
        fit(module, StopOnSignal(tmp_path), validate=True, val_check_interval=2, num_sanity_val_steps=0)
    assert module.ended[-4:] == [f"validation {i}" for i in range(4)]
    assert "SIGTERM: finishing the validation, then" in capfd.readouterr().err


def test_gradients_that_wait_for_their_step_get_it_first(tmp_path: Path) -> None:
    class Plain(Phased):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            if batch_idx == 0:
                self.happening()
            self.ended.append(f"batch {batch_idx}")
            return self.layer(batch).square().mean()

    module = Plain(sent(signal.SIGTERM))
    with pytest.raises(Interrupted):
        fit(module, StopOnSignal(tmp_path), accumulate_grad_batches=2)
    assert module.ended == ["batch 0", "batch 1"]
    assert (tmp_path / "step=000001.ckpt").exists()


def test_without_a_folder_the_run_stops_and_says_that_nothing_is_kept(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(Interrupted):
        fit(Phased(sent(signal.SIGTERM)), StopOnSignal(None))
    err = capfd.readouterr().err
    assert "then stopping without a checkpoint" in err
    assert "checkpoint: " not in err


def test_a_signal_at_the_end_of_training_lets_it_end_and_nothing_follow(tmp_path: Path) -> None:
    class AtTheEnd(L.Callback):
        def on_train_end(self, *_: Any) -> None:
            sent(signal.SIGTERM)()

    with pytest.raises(Interrupted):
        fit(Phased(lambda: None), AtTheEnd(), StopOnSignal(tmp_path), Checkpoints(tmp_path))
    assert (tmp_path / "step=000004.ckpt").exists()


def test_handlers_are_lightnings_neither_in_training_nor_after_several_fits(tmp_path: Path) -> None:
    seen = []
    for _ in range(2):
        fit(Phased(lambda: seen.append(signal.getsignal(signal.SIGTERM))), StopOnSignal(tmp_path))
    assert [handler.__module__ for handler in seen] == ["lightning_hybrid.callbacks.signals"] * 2


def test_listeners_are_gone_after_an_error(tmp_path: Path) -> None:
    def fail() -> None:
        raise ValueError("no rollout")

    module = Phased(fail)
    with pytest.raises(ValueError, match="no rollout"):
        fit(module, StopOnSignal(tmp_path))
    assert module.phases.listeners == []
    assert not list(tmp_path.iterdir())


def test_a_second_ctrl_c_stops_at_once_and_one_that_a_launcher_repeats_does_not(tmp_path: Path) -> None:
    reached = []

    def press() -> None:
        sent(signal.SIGINT)()
        sent(signal.SIGINT)()
        reached.append("repeated")
        time.sleep(1.1)
        sent(signal.SIGINT)()
        reached.append("pressed again")

    with pytest.raises(Interrupted) as raised:
        fit(Phased(press), StopOnSignal(tmp_path))
    assert raised.value.code == 130
    assert reached == ["repeated"]
    assert not list(tmp_path.iterdir())


def test_an_interactive_interpreter_is_interrupted_and_lives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "ps1", ">>> ", raising=False)
    with pytest.raises(KeyboardInterrupt):
        fit(Phased(sent(signal.SIGINT)), StopOnSignal(tmp_path))
    assert (tmp_path / "step=000001.ckpt").exists()


def test_outside_the_main_thread_it_is_said_that_signals_are_not_handled(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    thread = threading.Thread(target=lambda: fit(Phased(lambda: None), StopOnSignal(tmp_path)))
    thread.start()
    thread.join()
    assert capfd.readouterr().err.count("signals are not handled: fit runs outside the main thread") == 1


def test_an_error_of_all_ranks_leaves_a_checkpoint_and_goes_on(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    def fail() -> None:
        error = RewardError("the judge is away")
        error.on_every_rank = True
        raise error

    with pytest.raises(RewardError, match="the judge is away"):
        fit(Phased(fail), StopOnSignal(tmp_path))
    assert f"checkpoint: {tmp_path / 'step=000001.ckpt'}" in capfd.readouterr().err


def test_a_checkpoint_that_cannot_be_written_does_not_hide_the_error(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail() -> None:
        error = RewardError("the judge is away")
        error.on_every_rank = True
        monkeypatch.setattr(L.Trainer, "save_checkpoint", lambda *_: 1 / 0)
        raise error

    with pytest.raises(RewardError, match="the judge is away"):
        fit(Phased(fail), StopOnSignal(tmp_path))
    assert "no checkpoint could be written after RewardError: division by zero" in capfd.readouterr().err


class Slurm(L.Callback):
    """Let the strategy believe that SLURM started it."""

    def __init__(self, **arguments: Any) -> None:
        self.arguments = arguments

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        trainer.strategy.cluster_environment = SLURMEnvironment(**self.arguments)  # type: ignore[attr-defined]


@pytest.fixture
def told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What a stand-in for scontrol was told."""
    program = tmp_path / "scontrol"
    program.write_text(f'#!/bin/sh\necho "$@" > {tmp_path}/told\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setenv("SLURM_JOB_ID", "4711")
    return tmp_path / "told"


def test_the_requeue_signal_has_the_job_requeued(told: Path, capfd: pytest.CaptureFixture[str]) -> None:
    environment = Slurm(requeue_signal=signal.SIGUSR1)
    with pytest.raises(Interrupted) as raised:
        fit(Phased(sent(signal.SIGUSR1)), environment, StopOnSignal(told.parent / "kept"))
    assert raised.value.code == 0
    assert told.read_text() == "requeue 4711\n"
    assert "job 4711 is in SLURM's queue again" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("number", "arguments"),
    [(signal.SIGTERM, {}), (signal.SIGINT, {}), (signal.SIGUSR1, {"auto_requeue": False})],
    ids=["cancelled", "interrupted", "not to be requeued"],
)
def test_nothing_else_has_it_requeued(number: signal.Signals, arguments: dict[str, Any], told: Path) -> None:
    with pytest.raises(Interrupted):
        fit(Phased(sent(number)), Slurm(**arguments), StopOnSignal(told.parent / "kept"))
    assert not told.exists()


def test_a_job_of_an_array_is_requeued_alone() -> None:
    variables = {"SLURM_JOB_ID": "4713", "SLURM_ARRAY_JOB_ID": "4711", "SLURM_ARRAY_TASK_ID": "2"}
    assert slurm_job(variables) == "4711_2"
    assert slurm_job({"SLURM_JOB_ID": "4713"}) == "4713"


def test_a_job_that_cannot_be_requeued_is_left_to_the_user(told: Path) -> None:
    (told.parent / "scontrol").write_text("#!/bin/sh\necho 'Invalid job id' >&2\nexit 1\n")
    assert requeue() == "'scontrol requeue 4711' failed with exit code 1: Invalid job id; give it by hand"
    (told.parent / "scontrol").unlink()
    assert requeue().startswith("could not run 'scontrol requeue 4711'")
