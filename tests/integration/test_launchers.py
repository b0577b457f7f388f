"""Two processes, however they were started, train as one."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest

from tests.integration.processes import Ended, free_port, run, run_together

SCRIPT = """
import hashlib

import lightning_hybrid
from tests.helpers import GAN, quiet_trainer, random_batches, weights_of

gan = GAN()
trainer = quiet_trainer("hybrid_deepspeed", devices=2, max_epochs=1, use_distributed_sampler=True)
trainer.fit(gan, random_batches())
checksum = hashlib.sha256(weights_of(gan).numpy().tobytes()).hexdigest()
rank = f"rank {trainer.global_rank} of {trainer.world_size}"
print(f"{rank}: {trainer.global_step} steps, weights {checksum}\\n", end="", flush=True)  # in one write: ranks share it
"""
SECONDS = 90


def by_lightning(script: Path) -> list[Ended]:
    """The script is started once, and Lightning starts the second process."""
    return [run([sys.executable, script], script.parent, SECONDS)]


def by_torchrun(script: Path) -> list[Ended]:
    launch = ["-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", str(free_port())]
    return [run([sys.executable, *launch, script], script.parent, SECONDS)]


def by_slurm(script: Path) -> list[Ended]:
    """As `srun --ntasks-per-node=2 python script.py` starts it on one node."""
    job = {
        "SLURM_JOB_ID": "4711",
        "SLURM_JOB_NAME": "train",
        "SLURM_NNODES": "1",
        "SLURM_NODEID": "0",
        "SLURM_NODELIST": "localhost",
        "SLURM_STEP_NODELIST": "localhost",
        "SLURM_NTASKS": "2",
        "SLURM_NTASKS_PER_NODE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
    }
    tasks = [job | {"SLURM_PROCID": str(task), "SLURM_LOCALID": str(task)} for task in range(2)]
    return run_together([sys.executable, script], tasks, script.parent, SECONDS)


LAUNCHERS = {"lightning": by_lightning, "torchrun": by_torchrun, "slurm": by_slurm}
Endings = dict[str, tuple[int, str]]
"""Of each rank, such as "0 of 2": the steps it has counted and the checksum of its weights."""


@pytest.fixture(scope="module")
def endings(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Endings]:
    """Train through a launcher, once for all tests."""

    @cache
    def train(launcher: str) -> Endings:
        script = tmp_path_factory.mktemp(launcher) / "script.py"
        script.write_text(SCRIPT)
        ended = LAUNCHERS[launcher](script)
        assert [process.code for process in ended] == [0] * len(ended), "\n".join(map(str, ended))
        lines = re.findall(r"rank (\d of \d): (\d+) steps, weights (\w+)", "".join(process.out for process in ended))
        return {rank: (int(steps), checksum) for rank, steps, checksum in lines}

    return train


@pytest.mark.parametrize(
    "launcher", [pytest.param(name, marks=[] if name == "lightning" else pytest.mark.slow) for name in LAUNCHERS]
)
def test_two_processes_hold_the_same_weights(launcher: str, endings: Callable[[str], Endings]) -> None:
    ranks = endings(launcher)
    assert sorted(ranks) == ["0 of 2", "1 of 2"]
    assert ranks["0 of 2"] == ranks["1 of 2"]
    assert ranks["0 of 2"][0] == 2 * 3  # optimizers × batches of each rank, as Lightning counts


@pytest.mark.slow
def test_every_launcher_trains_to_the_same_weights_in_the_same_number_of_steps(
    endings: Callable[[str], Endings],
) -> None:
    assert endings("lightning") == endings("torchrun") == endings("slurm")
