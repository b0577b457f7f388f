"""`lightning-hybrid doctor` on one of several hosts: what would keep their ranks from meeting."""

from __future__ import annotations

import socket
from typing import Any

import pytest

from tests.cli.test_doctor import found

from checkup.network import main_host  # isort: skip  (test_doctor puts recipes/ on the path)

SLURM = {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "8", "SLURM_NTASKS_PER_NODE": "4", "SLURM_NNODES": "2"}
REACHED = {"name": "node1", "address": "10.0.0.1", "failure": ""}


def launched(**changes: str | None) -> dict[str, Any]:
    """A job of SLURM on two hosts, with variables that differ or, for None, are not there."""
    return {"variables": {name: value for name, value in (SLURM | changes).items() if value is not None}}


@pytest.mark.parametrize(
    ("changes", "problem", "remedy"),
    [
        (launched(SLURM_NTASKS_PER_NODE=None), "8 tasks, and Lightning needs their number", "--ntasks-per-node"),
        (launched(SLURM_NTASKS="6"), "6 tasks are not 4 on each of 2 hosts", "or set it to 8"),
        (launched(SLURM_JOB_NAME="bash"), "a job called 'bash' for one to work in", "another name (--job-name)"),
        ({"main": REACHED | {"address": ""}}, "MASTER_ADDR=node1 does not resolve", "the address of the first host"),
        ({"main": REACHED | {"failure": "timed out"}}, "node1 (10.0.0.1) cannot be reached: timed out", "firewalls"),
        (launched() | {"main": REACHED | {"address": "127.0.1.1"}}, "another host on each host", "all others reach"),
        (
            {"main": REACHED, "variables": {"NODE_RANK": "1"}},
            "NODE_RANK and no MASTER_PORT",
            "MASTER_PORT=29500, the same on all",
        ),
    ],
)
def test_what_keeps_hosts_from_meeting_is_found(changes: dict[str, Any], problem: str, remedy: str) -> None:
    ((said, advice),) = found("stop", **changes)
    assert problem in said
    assert remedy in advice


@pytest.mark.parametrize(
    "variables",
    [SLURM, {"TORCHELASTIC_RUN_ID": "job", "RANK": "0", "WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "4"}],
    ids=["slurm", "torchrun"],
)
def test_what_the_trainer_must_be_given_is_said(variables: dict[str, str]) -> None:
    assert found("stop", variables=variables, main=REACHED) == found("warn", variables=variables, main=REACHED) == []
    assert ("a run needs trainer.devices=4 trainer.num_nodes=2") in [
        remedy for _, remedy in found("note", variables=variables)
    ]


def test_one_host_may_meet_itself() -> None:
    alone = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
    assert found("stop", variables=alone, main=REACHED | {"name": "127.0.0.1", "address": "127.0.0.1"}) == []


def test_a_host_where_nobody_listens_yet_can_be_reached() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # and does not listen
        port = str(taken.getsockname()[1])
        assert main_host({"MASTER_ADDR": "localhost", "MASTER_PORT": port})["failure"] == ""
        taken.listen()
        assert main_host({"MASTER_ADDR": "localhost", "MASTER_PORT": port})["failure"] == ""


def test_a_host_without_a_way_to_it_or_without_a_name_cannot(monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*_: Any, **__: Any) -> None:
        raise OSError(113, "No route to host")

    monkeypatch.setattr(socket, "create_connection", unreachable)
    assert "No route to host" in main_host({"MASTER_ADDR": "127.0.0.1"})["failure"]
    assert main_host({"MASTER_ADDR": "no.such.host.invalid"}) == {
        "name": "no.such.host.invalid",
        "address": "",
        "failure": "",
    }
    assert main_host({}) == {}
