"""One server and one laboratory for all trials, and the table of what was survived."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.faults.ranks import ForkServer
from tests.faults.trials import Laboratory, Outcomes

OUTCOMES = pytest.StashKey[Outcomes]()


def pytest_configure(config: pytest.Config) -> None:
    config.stash[OUTCOMES] = Outcomes()


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ForkServer]:
    server = ForkServer(tmp_path_factory.mktemp("server") / "log")
    yield server
    server.close()


@pytest.fixture(scope="session")
def laboratory(server: ForkServer, tmp_path_factory: pytest.TempPathFactory, pytestconfig: pytest.Config) -> Laboratory:
    return Laboratory(server, tmp_path_factory.mktemp("uninterrupted"), pytestconfig.stash[OUTCOMES])


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    outcomes = config.stash.get(OUTCOMES, Outcomes())
    if outcomes.tried:
        terminalreporter.section("faults injected")
        terminalreporter.write_line("\n".join(outcomes.table()))
