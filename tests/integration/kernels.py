"""A real Jupyter kernel, whose cells can be interrupted while they run."""

from __future__ import annotations

import os
import queue
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jupyter_client.manager import KernelManager, start_new_kernel

from tests.integration.processes import ROOT


@dataclass
class Shown:
    """What a cell showed: its text, the name and the text of its error, and how many pictures."""

    text: str = ""
    error: str | None = None
    message: str = ""
    pictures: list[str] = field(default_factory=list)


class Kernel:
    def __init__(self, manager: KernelManager, client: Any) -> None:
        self._manager, self._client = manager, client

    def run(self, code: str, interrupt_at: str | None = None, timeout: float = 240) -> Shown:
        """Run a cell; interrupt it, as the stop button does, once it has printed a text."""
        shown, request = Shown(), self._client.execute(code)
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            try:
                message = self._client.get_iopub_msg(timeout=1)
            except queue.Empty:
                continue
            if message["parent_header"].get("msg_id") != request:
                continue
            if message["msg_type"] == "status" and message["content"]["execution_state"] == "idle":
                return shown
            _note(shown, message["msg_type"], message["content"])
            if interrupt_at is not None and interrupt_at in shown.text:
                interrupt_at = None
                self._manager.interrupt_kernel()
        raise AssertionError(f"the cell did not end within {timeout} s:\n{code}\n{shown}")


def _note(shown: Shown, kind: str, content: dict[str, Any]) -> None:
    if kind == "stream":
        shown.text += content["text"]
    elif kind == "error":
        shown.error = content["ename"]
        shown.message = "\n".join([content["evalue"], *content["traceback"]])
    elif "image/png" in content.get("data", {}):
        shown.pictures.append(kind)


@contextmanager
def kernel(folder: Path) -> Iterator[Kernel]:
    """A kernel in a folder, with the checkout's package; ended with all that it started."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "PYTHONPATH": path}
    manager, client = start_new_kernel(kernel_name="python3", cwd=str(folder), env=environment, startup_timeout=120)
    try:
        yield Kernel(manager, client)
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)
