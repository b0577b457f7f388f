"""Where servers are reached from."""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Sequence
from urllib.parse import urlsplit

LOOPBACK = "127.0.0.1"


def host_of(url: str) -> str:
    """The address in a server's URL."""
    return urlsplit(url).hostname or LOOPBACK


def host_towards(urls: Sequence[str]) -> str:
    """This machine's address as these servers see it: loopback, unless one is on another machine."""
    others = [host_of(url) for url in urls if not is_local(url)]
    if not others:
        return LOOPBACK
    family, *_, address = socket.getaddrinfo(others[0], 9, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        probe.connect(address)  # sends nothing
        return str(probe.getsockname()[0])


def is_local(url: str) -> bool:
    """Whether a server is reached from its own machine only."""
    host = host_of(url)
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
