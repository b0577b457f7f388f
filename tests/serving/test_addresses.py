"""A server's URL says from where it is reached."""

from __future__ import annotations

import pytest

from lightning_hybrid.serving.addresses import host_of, host_towards, is_local


@pytest.mark.parametrize("url", ["http://127.0.0.1:1", "http://127.0.0.2:1", "http://localhost:2", "http://[::1]:3"])
def test_a_server_on_loopback_is_reached_from_its_own_machine_only(url: str) -> None:
    assert is_local(url)


@pytest.mark.parametrize("url", ["http://10.0.0.1:1", "http://node-3:2", "http://[2001:db8::1]:3"])
def test_other_servers_are_reached_from_other_machines(url: str) -> None:
    assert not is_local(url)


def test_this_machine_is_reached_on_loopback_unless_a_server_is_elsewhere() -> None:
    assert host_towards(["http://127.0.0.1:1", "http://localhost:2", "http://[::1]:3"]) == "127.0.0.1"
    assert host_towards(["http://127.0.0.1:1", "http://127.0.0.2:1"]) == "127.0.0.1"


def test_the_address_of_a_url_has_no_brackets() -> None:
    assert host_of("http://[::1]:3") == "::1"
