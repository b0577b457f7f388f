"""Roles in processes of their own: starting them, answering in them, and asking them over HTTP."""

from __future__ import annotations

from lightning_hybrid.serving.client import ServerClient
from lightning_hybrid.serving.process import (
    RunningServer,
    ServerSpec,
    Starter,
    close_all,
    end_servers,
    start_local,
    start_servers,
    use_starter,
)
from lightning_hybrid.serving.server import Route, Server, main_of

__all__ = [
    "Route",
    "RunningServer",
    "Server",
    "ServerClient",
    "ServerSpec",
    "Starter",
    "close_all",
    "end_servers",
    "main_of",
    "start_local",
    "start_servers",
    "use_starter",
]
