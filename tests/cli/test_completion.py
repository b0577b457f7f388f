"""Completion in a real bash."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from lightning_hybrid_cli import COMMANDS

ROOT = Path(__file__).resolve().parents[2]
Press = Callable[[str], list[str]]

# What readline does when TAB is pressed behind $1.
PRESS_TAB = """
eval "$(lightning-hybrid completion)"
complete -p lightning-hybrid
COMP_LINE="$1" COMP_POINT=${#1} COMPREPLY=()
compopt() { echo "compopt $*"; }
_lightning_hybrid_completion
printf '%s\\n' "${COMPREPLY[@]}"
"""


@pytest.fixture
def press_tab(tmp_path: Path) -> Press:
    bash = shutil.which("bash")
    if bash is None:
        pytest.skip("no bash here")
    command = tmp_path / "lightning-hybrid"
    command.write_text(f'#!/bin/sh\nexec "{sys.executable}" "{ROOT}/lightning_hybrid_cli.py" "$@"\n')
    command.chmod(0o755)
    environment = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}

    def press(line: str) -> list[str]:
        arguments = [bash, "--norc", "-c", PRESS_TAB, "bash", line]
        ended = subprocess.run(arguments, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=60)
        assert ended.stderr == ""
        declared, *offered = ended.stdout.splitlines()
        assert declared.endswith("-F _lightning_hybrid_completion lightning-hybrid")
        return offered

    return press


def test_commands(press_tab: Press) -> None:
    assert [word for word in press_tab("lightning-hybrid ") if word in COMMANDS] == list(COMMANDS)
    assert press_tab("lightning-hybrid quick") == ["compopt +o nospace", "quickstart"]


def test_choices_of_a_group(press_tab: Press) -> None:
    """Bash puts them in place of what stands behind the `=`."""
    assert press_tab("lightning-hybrid ppo algorithm=gr") == ["compopt +o nospace", "grpo"]
    assert press_tab("lightning-hybrid ppo trainer=") == ["auto", "cpu", "gpu"]
    offered = press_tab("lightning-hybrid ppo trainer=cpu experiment=movie_sentiment/r")
    assert offered == [
        f"movie_sentiment/{name}" for name in ("reinforce_plus_plus", "reinforce_plus_plus_baseline", "rloo")
    ]


def test_keys_and_their_values(press_tab: Press) -> None:
    assert press_tab("lightning-hybrid ppo algorithm.kl_c") == ["algorithm.kl_coef="]
    assert press_tab("lightning-hybrid ppo algorithm=grpo algorithm.group_s") == ["algorithm.group_size="]
    assert press_tab("lightning-hybrid sft trai") == ["trainer.", "trainer="]
    assert press_tab("lightning-hybrid ppo algorithm.kl_coef=") == ["compopt +o nospace", "0.05"]


def test_choices_are_offered_as_they_are(tmp_path: Path, press_tab: Press) -> None:
    """Neither names of files that they match nor what a shell would make of them."""
    command = tmp_path / "lightning-hybrid"
    program = command.read_text().splitlines()[1]
    answer = "a=* a=[xy] a=$(touch made) a=~ b=1"
    command.write_text(f"#!/bin/sh\nif [ $1 = ppo ]; then echo '{answer}'; exit; fi\n{program}\n")
    (tmp_path / "x").touch()
    assert press_tab("lightning-hybrid ppo a=") == ["*", "[xy]", "$(touch", "~"]
    assert press_tab("lightning-hybrid ppo ") == answer.split()
    assert not (tmp_path / "made").exists()


def test_nothing_is_loaded_for_a_completion() -> None:
    code = (
        "import sys, lightning_hybrid_cli\n"
        "lightning_hybrid_cli.main(['ppo', '-sc', 'query=bash'])\n"
        "print('loaded:', sorted({'torch', 'lightning', 'lightning_hybrid'} & set(sys.modules)))"
    )
    environment = os.environ | {"COMP_LINE": "ppo algorithm=gr"}
    ended = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60
    )
    assert ended.stdout.splitlines()[-1] == "loaded: []", ended.stderr
