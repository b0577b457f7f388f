"""A process of a role for the tests, run with `python -m tests.serving.roles`: its settings say how it behaves."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from typing import Any

from lightning_hybrid.errors import RewardError
from lightning_hybrid.serving import main_of


def routes(settings: dict[str, Any]) -> dict[str, Any]:
    print("noise of a library, on stdout")
    if settings.get("refuses"):
        raise FileNotFoundError("no model at /nowhere")
    if settings.get("dies"):
        print("out of luck", file=sys.stderr)
        os._exit(3)
    time.sleep(settings.get("loads", 0.0))
    helper = subprocess.Popen(["sleep", "600"])

    def sleep(request: dict[str, Any]) -> dict[str, Any]:
        time.sleep(request["seconds"])
        return {"slept": request["seconds"]}

    def fail(request: dict[str, Any]) -> dict[str, Any]:
        raise {"ours": RewardError, "other": KeyError}[request["kind"]]("sample 3 is too long")

    def about(request: dict[str, Any]) -> dict[str, Any]:
        variables = {name: os.environ.get(name) for name in request["variables"]}
        return {"pid": os.getpid(), "helper": helper.pid, "variables": variables}

    def end(request: dict[str, Any]) -> dict[str, Any]:
        print("no space left on device", file=sys.stderr, flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
        return {}

    return {"echo": lambda request: request, "sleep": sleep, "fail": fail, "about": about, "end": end}


if __name__ == "__main__":
    main_of(routes)
