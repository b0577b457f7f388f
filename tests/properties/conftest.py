"""Says at the end of a run how many generated inputs were tried."""

from __future__ import annotations

import pytest

from tests.properties.cases import COUNT, OUTCOMES


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if COUNT:
        listed = ", ".join(f"{name.removeprefix('test_')} {count:,}" for name, count in COUNT.items())
        outcomes = ", ".join(f"{number:,} {outcome}" for outcome, number in OUTCOMES.items())
        terminalreporter.write_line(f"generated inputs: {COUNT.total():,} in all ({listed}); {outcomes}")
