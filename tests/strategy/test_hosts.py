"""Processes that were not started as the Trainer expects are refused; hosts find the network between them."""

from __future__ import annotations

import socket
from typing import Any

import pytest
from lightning.fabric.plugins.environments import LightningEnvironment, SLURMEnvironment, TorchElasticEnvironment

from lightning_hybrid.errors import StrategyError
from lightning_hybrid.strategy import hosts
from lightning_hybrid.strategy.hosts import interface_to_others, refuse_other_launch
from tests.helpers import quiet_trainer

SLURM = {"SLURM_JOB_NAME": "train", "SLURM_NTASKS": "8", "SLURM_NTASKS_PER_NODE": "4", "SLURM_NNODES": "2"}
TORCHRUN = {"TORCHELASTIC_RUN_ID": "job", "WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "4", "LOCAL_RANK": "0", "RANK": "0"}
MEETING = {"NODE_RANK": "1", "MASTER_ADDR": "node1", "MASTER_PORT": "29500"}


@pytest.fixture
def set_variables(monkeypatch: pytest.MonkeyPatch) -> Any:
    def set_all(variables: dict[str, str]) -> None:
        for name, value in variables.items():
            monkeypatch.setenv(name, value)

    return set_all


@pytest.mark.parametrize(
    ("environment", "variables", "remedy"),
    [
        (TorchElasticEnvironment, TORCHRUN, "start torchrun with --nnodes {} --nproc-per-node {}"),
        (SLURMEnvironment, SLURM, "have --nodes={} --ntasks-per-node={} in the job script"),
    ],
)
@pytest.mark.parametrize(("devices", "nodes"), [(4, 1), (2, 2), (1, 1), (8, 1), (4, 3)])
def test_another_number_of_processes_is_refused_with_both_numbers_and_both_remedies(
    environment: Any, variables: dict[str, str], remedy: str, devices: int, nodes: int, set_variables: Any
) -> None:
    set_variables(variables)
    with pytest.raises(StrategyError) as refused:
        refuse_other_launch(environment(), devices, nodes)
    said = str(refused.value)
    assert "starts 8 processes, 4 on each host" in said
    assert f"expects {devices * nodes}: trainer.devices={devices} × trainer.num_nodes={nodes}" in said
    assert "set trainer.devices=4 trainer.num_nodes=2, or " + remedy.format(nodes, devices) in said


@pytest.mark.parametrize(("environment", "variables"), [(TorchElasticEnvironment, TORCHRUN), (SLURMEnvironment, SLURM)])
def test_the_right_number_is_accepted(environment: Any, variables: dict[str, str], set_variables: Any) -> None:
    set_variables(variables)
    refuse_other_launch(environment(), 4, 2)


def test_the_trainer_refuses_before_anything_is_trained(set_variables: Any) -> None:
    set_variables(TORCHRUN)
    with pytest.raises(StrategyError, match="torchrun starts 8 processes, 4 on each host, but the Trainer expects 1"):
        quiet_trainer("hybrid_deepspeed")


@pytest.mark.parametrize("left_out", MEETING)
def test_lightning_is_told_on_each_host_how_to_meet(left_out: str, set_variables: Any) -> None:
    set_variables({name: value for name, value in MEETING.items() if name != left_out})
    with pytest.raises(StrategyError, match=f"trainer.num_nodes=2, but {left_out} not set: .* NODE_RANK=0 to 1, and"):
        refuse_other_launch(LightningEnvironment(), 2, 2)
    set_variables(MEETING)
    refuse_other_launch(LightningEnvironment(), 2, 2)


def test_a_host_beyond_the_last_is_refused(set_variables: Any) -> None:
    set_variables(MEETING)
    with pytest.raises(StrategyError, match=r"NODE_RANK=1, but trainer.num_nodes=1.* or unset NODE_RANK"):
        refuse_other_launch(LightningEnvironment(), 2, 1)


# ---- the network -----------------------------------------------------------------------------------------------------


@pytest.fixture
def network(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A host of whose name, interfaces and routes something is said."""

    def make(own: str | None, interfaces: dict[str, list[str]], source: str = "") -> None:
        def resolve(name: str, *_: Any, **__: Any) -> Any:
            if own is None:
                raise socket.gaierror("no such name")
            return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (own, 0))]

        monkeypatch.setattr(socket, "getaddrinfo", resolve)
        monkeypatch.setattr(socket, "gethostname", lambda: "node1")
        monkeypatch.setattr(hosts, "_interfaces", lambda: interfaces)
        monkeypatch.setattr(hosts, "_source_towards", lambda address: source)

    return make


TWO = {"eth0": ["10.0.0.5"], "ib0": ["10.9.0.5", "fe80::1%ib0"]}


def test_gloo_chooses_where_the_hosts_name_leads_to_others(network: Any) -> None:
    network("10.0.0.5", TWO, "10.9.0.5")
    assert interface_to_others("node2") is None


@pytest.mark.parametrize("own", ["127.0.1.1", "127.0.0.1", "::1", None])
def test_a_name_that_leads_nowhere_gives_way_to_the_route(own: str | None, network: Any) -> None:
    network(own, TWO, "10.9.0.5")
    assert interface_to_others("node2") == "ib0"


def test_the_first_host_takes_its_only_interface(network: Any) -> None:
    network("127.0.1.1", {"eth0": ["10.0.0.5"]}, "127.0.0.1")
    assert interface_to_others("node1") == "eth0"


@pytest.mark.parametrize(("interfaces", "named"), [(TWO, "eth0, ib0"), ({}, "none")])
def test_what_cannot_be_known_is_asked_for(interfaces: dict[str, list[str]], named: str, network: Any) -> None:
    network("127.0.1.1", interfaces, "127.0.0.1")
    with pytest.raises(StrategyError, match=f"'node1', by a loopback .* GLOO_SOCKET_IFNAME=.*; there are: {named}"):
        interface_to_others("node1")


def test_the_way_to_this_very_host_is_by_loopback() -> None:
    assert hosts._source_towards("127.0.0.1") == "127.0.0.1"
    assert hosts._source_towards("no.such.host.invalid") == ""
    assert "lo" not in hosts._interfaces()
