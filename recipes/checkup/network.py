"""Whether this host can be found by others, and finds the one where they meet."""

from __future__ import annotations

import socket
from collections.abc import Mapping
from typing import Any

_CONNECT_SECONDS = 5.0


def network() -> dict[str, Any]:
    """Whether the host's name resolves, as gloo wants it, and the interfaces there are."""
    name = socket.gethostname()
    try:
        address = socket.getaddrinfo(name, None)[0][4][0]
    except OSError:
        address = ""
    return {"hostname": name, "address": address, "interfaces": [name for _, name in socket.if_nameindex()]}


def main_host(environment: Mapping[str, str]) -> dict[str, str]:
    """Where the ranks of several hosts are to meet, if that is said: its address, and why it cannot be reached."""
    name, port = environment.get("MASTER_ADDR"), environment.get("MASTER_PORT", "")
    if not name:
        return {}
    try:
        address = str(socket.getaddrinfo(name, None)[0][4][0])
    except OSError:
        return {"name": name, "address": "", "failure": ""}
    return {"name": name, "address": address, "failure": _why_unreachable(address, int(port) if port.isdigit() else 1)}


def _why_unreachable(address: str, port: int) -> str:
    """Why nothing gets there, or ""; a host that says that nobody listens can be reached."""
    try:
        socket.create_connection((address, port), timeout=_CONNECT_SECONDS).close()
    except ConnectionRefusedError:
        return ""
    except OSError as error:
        return str(error)
    return ""
