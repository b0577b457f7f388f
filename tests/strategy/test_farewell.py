"""A rank that has done all ends well, also where the store takes its time to hear the last word."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.integration.processes import free_port

HOLDER = """
import sys, time
from torch._C._distributed_c10d import TCPStore
store = TCPStore("127.0.0.1", int(sys.argv[1]), is_master=True, wait_for_workers=False)
print("holds", flush=True)
time.sleep(100)
"""
RANK = """
import sys
import torch.distributed
from torch._C._distributed_c10d import TCPStore
from lightning_hybrid.strategy.liveness import Liveness
store = TCPStore("127.0.0.1", int(sys.argv[1]), is_master=False)
torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
liveness = Liveness(0, 2, 60.0, lambda: 0)
liveness.start()
print("lives", flush=True)
input()
liveness.stop()
"""


def start(code: str, port: int, errors: Path) -> subprocess.Popen[str]:
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with errors.open("w") as err:
        return subprocess.Popen([sys.executable, "-c", code, str(port)], env=environment, stderr=err, **pipes)


def says(process: subprocess.Popen[str], word: str) -> bool:
    assert process.stdout is not None
    return process.stdout.readline() == f"{word}\n"


@pytest.mark.slow
def test_a_store_that_answers_late_does_not_abort_a_rank_that_has_ended(tmp_path: Path) -> None:
    """As where the host that holds it has much to do, or is about to end itself."""
    port = free_port()
    with start(HOLDER, port, tmp_path / "holder") as holder:
        assert says(holder, "holds")
        with start(RANK, port, tmp_path / "rank") as rank:
            assert says(rank, "lives")
            holder.send_signal(signal.SIGSTOP)
            assert rank.stdin is not None
            rank.stdin.write("\n")
            rank.stdin.flush()
            time.sleep(5.0)
            holder.send_signal(signal.SIGCONT)
            assert rank.wait(60) == 0, (tmp_path / "rank").read_text()
        holder.kill()
