"""A server that repeats what it hears, with a word of its own and its process."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from lightning_hybrid.errors import ConfigError
from lightning_hybrid.serving import Route, main_of


def make(settings: dict[str, Any]) -> Mapping[str, Route]:
    if "fail" in settings:
        raise ConfigError(settings["fail"])
    return {"echo": lambda request: {"text": f"{settings['word']}: {request['text']}", "pid": os.getpid()}}


if __name__ == "__main__":
    main_of(make)
