"""Fits in a real kernel, one after another: interrupted, with other ZeRO stages, and with several ranks."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.integration.kernels import Kernel, kernel

pytestmark = pytest.mark.slow

SETUP = """
import logging, warnings
warnings.filterwarnings("ignore")
import lightning as L, psutil, torch
import lightning_hybrid as lh
from lightning_hybrid.callbacks.live import LiveCurves
from lightning_hybrid.data import write_task
from lightning_hybrid.data.task import task_reward
from lightning_hybrid.models import load_tokenizer
from tests.helpers import tiny_policy

logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
files = write_task("task")
tokenizer = load_tokenizer(str(files.tokenizer))

class SayPhases(L.Callback):
    def on_train_start(self, trainer, module):
        module.phases.listeners.append(self.say)
        self.module = module

    def say(self, phase):
        print(phase, self.module.global_step, flush=True)

    def on_exception(self, trainer, module, exception):
        if self.say in module.phases.listeners:  # not in the notebook's own copy of two ranks' run
            module.phases.listeners.remove(self.say)

module = lh.PPOModule(
    tiny_policy(),
    reward=lambda prompts, responses: task_reward(prompts, responses),
    tokenizer=tokenizer,
    config=lh.PPOConfig(minibatch_size=32, micro_batch_size=32),
    rollout=lh.RolloutConfig(max_new_tokens=28),
)

def fit(steps, stage=1, devices=1, *callbacks):
    data = lh.PromptDataModule(str(files.prompts), tokenizer=tokenizer, batch_size=128)
    trainer = L.Trainer(
        strategy=f"hybrid_deepspeed_stage_{stage}", accelerator="cpu", devices=devices, max_steps=steps, max_epochs=-1,
        callbacks=list(callbacks), logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, limit_val_batches=0,
    )
    trainer.fit(module, datamodule=data)
    return trainer

def weights():
    return torch.cat([p.detach().double().flatten() for p in module.actor.parameters()])

def check_usable():
    shapes = [tuple(p.shape) for p in module.parameters()]
    assert shapes == [tuple(p.shape) for p in whole.parameters()], shapes
    assert module.training and module.actor.training and all(p.requires_grad for p in module.actor.parameters())
    assert not [name for p in module.parameters() for name in vars(p)], "something of DeepSpeed is left on parameters"
    assert not psutil.Process().children(recursive=True), psutil.Process().children()
    ids = torch.tensor([tokenizer("mia visits the farm .")["input_ids"]])
    assert module.actor.model(ids).logits.isfinite().all()
    print("usable")

import copy
whole = copy.deepcopy(module)
torch.set_num_threads(2)
torch.randn(900, 900) @ torch.randn(900, 900)  # PyTorch's threads are there: a fork would hang
torch.set_num_threads(1)
"""


@pytest.fixture(scope="module")
def notebook(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Kernel]:
    with kernel(tmp_path_factory.mktemp("notebook")) as started:
        setup = started.run(SETUP)
        assert setup.error is None, setup.message
        yield started


def shows(notebook: Kernel, code: str) -> str:
    cell = notebook.run(code)
    assert cell.error is None, cell.message
    return cell.text


TRAINS = """
before = weights()
trainer = fit({arguments})
assert trainer.global_step == 2 and "reward/score" in trainer.callback_metrics
assert not torch.equal(before, weights())
check_usable()
"""


@pytest.mark.parametrize("phase", ["rollout 1", "update 1"])
@pytest.mark.parametrize("stage", [1, 3])
def test_after_an_interrupt_the_same_kernel_trains_on(notebook: Kernel, stage: int, phase: str) -> None:
    assert "usable" in shows(notebook, TRAINS.format(arguments="2, 1"))
    cell = notebook.run(f"fit(1000, {stage}, 1, SayPhases())", interrupt_at=phase)
    assert cell.error == "KeyboardInterrupt", cell.message
    assert "usable" in shows(notebook, "check_usable()")
    assert "usable" in shows(notebook, TRAINS.format(arguments=f"2, {stage}"))
    assert "usable" in shows(notebook, TRAINS.format(arguments="2, 2"))


@pytest.mark.parametrize("stage", [1, 3])
def test_two_ranks_give_the_kernels_own_module_their_weights(notebook: Kernel, stage: int) -> None:
    code = """
class Remember(L.Callback):
    def on_train_end(self, trainer, module):
        from lightning_hybrid.engines.gather import gathered
        with gathered(module.actor):
            total = sum(p.detach().double().sum() for p in module.actor.parameters())
        if trainer.is_global_zero:
            print("ranks", trainer.world_size)
            open("total", "w").write(repr(float(total)))
"""
    code += TRAINS.format(arguments=f"2, {stage}, 2, Remember()")
    code += "assert abs(float(open('total').read()) - float(weights().sum())) < 1e-6\n"
    text = shows(notebook, code)
    assert "ranks 2" in text
    assert "usable" in text
    assert "usable" in shows(notebook, TRAINS.format(arguments="2, 1"))


def test_an_interrupt_ends_both_ranks_and_leaves_the_module_as_it_was(notebook: Kernel) -> None:
    shows(notebook, "before = weights()")
    cell = notebook.run("fit(1000, 1, 2, SayPhases())", interrupt_at="rollout 1")
    assert cell.error == "KeyboardInterrupt", cell.message
    assert "the ranks are stopping" in cell.text
    assert "usable" in shows(notebook, "assert torch.equal(before, weights()); check_usable()")
    assert "usable" in shows(notebook, TRAINS.format(arguments="2, 1"))


def test_an_error_of_one_rank_is_raised_in_the_cell(notebook: Kernel) -> None:
    code = """
class Fails(L.Callback):
    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        if trainer.global_rank == 1 and trainer.global_step == 1:
            raise KeyError("the second rank's second batch")

try:
    fit(3, 1, 2, Fails())
except KeyError as error:
    print(error, "|", error.__cause__)
check_usable()
"""
    text = shows(notebook, code)
    assert "the second rank's second batch" in text
    assert "in rank 1:" in text
    assert "on_train_batch_start" in text


def test_a_picture_of_two_ranks_run_appears_in_the_notebook_and_is_redrawn(notebook: Kernel) -> None:
    cell = notebook.run("trainer = fit(3, 1, 2, LiveCurves(['reward/score', 'policy/kl'], seconds=0))")
    assert cell.error is None, cell.message
    assert cell.pictures[0] == "display_data"
    assert set(cell.pictures[1:]) == {"update_display_data"}
    assert len(cell.pictures) == 4


def test_what_cannot_be_copied_to_ranks_is_named(notebook: Kernel) -> None:
    cell = notebook.run("import threading; module.lock = threading.Lock(); fit(2, 1, 2)")
    assert cell.error == "StrategyError"
    assert "cannot pickle '_thread.lock' object" in cell.message
    assert "usable" in shows(notebook, "del module.lock; check_usable()")


def test_five_fits_leave_no_engines_behind(notebook: Kernel) -> None:
    code = """
import gc
from deepspeed.runtime.engine import DeepSpeedEngine

def resident():
    fit(1)
    gc.collect()
    engines = sum(isinstance(thing, DeepSpeedEngine) for thing in gc.get_objects())
    return engines, psutil.Process().memory_info().rss // 2**20

sizes = [resident() for _ in range(6)]
print(sizes)
assert {engines for engines, _ in sizes} == {2}, "the last run's actor and critic only"
assert sizes[-1][1] - sizes[0][1] < 25
"""
    shows(notebook, code)
