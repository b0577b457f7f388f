"""A process that has imported everything and forks: so a rank starts at once. Run as a script, told by JSON lines.

An order is ``{"target", "arguments", "env", "out"}``; the answer is the process id of the rank, which calls the target
in ``tests.faults.job``, writes to ``<out>.out`` and ``<out>.err``, and ends as any Python process does. Then
``<out>.exit`` says how and when. Nothing forked outlives the server, nor the server whoever started it.
"""

from __future__ import annotations

import ctypes
import faulthandler
import gc
import importlib
import json
import os
import select
import signal
import sys
import time
from pathlib import Path
from typing import Any

POLL_SECONDS = 0.02
PR_SET_PDEATHSIG = 1
# What a run imports only when it needs it.
LATE = (
    "deepspeed.runtime.zero.muon.muon_optimizer",  # which compiles
    "httpx2",
    "lightning_hybrid.engines.hybrid",
    "lightning_hybrid.rollout.hf",
    "lightning_hybrid.rollout.native",
    "omegaconf",
    "peft",
    "setuptools",
    "tests.faults.job",
    "transformers.models.llama.modeling_llama",
)


def main() -> None:
    for name in LATE:
        importlib.import_module(name)
    threads = os.listdir("/proc/self/task")
    assert len(threads) == 1, f"a process with {len(threads)} threads cannot be forked safely"
    gc.collect()
    gc.freeze()  # what is never touched is never copied
    _answer("ready")
    order = _serve()
    if order is not None:
        _run(order)


def _serve() -> dict[str, Any] | None:
    """Fork for each order; returns its order in each child, and None in the server when nothing is to come."""
    running: dict[int, str] = {}
    while True:
        _reap(running)
        if not select.select([sys.stdin], [], [], POLL_SECONDS)[0]:
            continue
        line = sys.stdin.readline()
        if not line:
            for pid in running:
                os.killpg(pid, signal.SIGKILL)
            return None
        order = json.loads(line)
        pid = os.fork()
        if pid == 0:
            return dict(order)
        running[pid] = order["out"]
        _answer(pid)


def _answer(content: Any) -> None:
    print(json.dumps(content), flush=True)


def _reap(running: dict[int, str]) -> None:
    while running:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid == 0:
            return
        path = Path(f"{running.pop(pid)}.exit")
        new = path.with_suffix(".new")
        new.write_text(json.dumps([os.waitstatus_to_exitcode(status), time.time()]))
        new.replace(path)


def _run(order: dict[str, Any]) -> None:
    os.setsid()
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    for descriptor, name in enumerate((os.devnull, f"{order['out']}.out", f"{order['out']}.err")):
        os.dup2(os.open(name, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o644), descriptor)
    faulthandler.register(signal.SIGUSR2)  # asked where a rank hangs
    os.environ.update(order["env"])
    getattr(importlib.import_module("tests.faults.job"), order["target"])(**order["arguments"])


if __name__ == "__main__":
    main()
