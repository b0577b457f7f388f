"""The command `lightning-hybrid`: quick where it only answers, the recipe where it runs."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from lightning_hybrid_cli import COMMANDS, FILES

ROOT = Path(__file__).resolve().parents[2]


def call(*arguments: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "lightning_hybrid_cli.py"), *arguments]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(command, env=environment, cwd=cwd, capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize("argument", ["--help", "-h", "help"])
def test_help_names_every_command(argument: str) -> None:
    answer = call(argument)
    assert answer.returncode == 0
    assert all(f"  {command} " in answer.stdout for command in COMMANDS)


def test_no_command_gets_the_help() -> None:
    assert call().stdout == call("--help").stdout


def test_help_and_refusals_load_neither_torch_nor_lightning() -> None:
    code = """
import sys, lightning_hybrid_cli
for arguments in (["--help"], ["qickstart"]):
    try:
        lightning_hybrid_cli.main(arguments)
    except SystemExit:
        pass
lightning_hybrid_cli._recipes_dir()
print("loaded:", sorted({"torch", "lightning", "lightning_hybrid", "hydra", "deepspeed"} & set(sys.modules)))
"""
    answer = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert answer.stdout.splitlines()[-1] == "loaded: []"


def test_unknown_command_is_refused_with_the_nearest_one() -> None:
    answer = call("qickstart")
    assert answer.returncode == 2
    assert answer.stderr == "error: no command 'qickstart'. Did you mean 'quickstart'? See lightning-hybrid --help\n"


def test_unlike_command_is_refused_with_all_of_them() -> None:
    assert f"There are: {', '.join(COMMANDS)}." in call("zzz").stderr


def test_every_command_has_its_recipe() -> None:
    files = {command: ROOT / "recipes" / f"{FILES.get(command, command)}.py" for command in COMMANDS}
    assert {command for command, file in files.items() if not file.is_file()} == set()


def test_no_recipe_hides_a_module_of_python_from_the_others() -> None:
    assert {file.stem for file in (ROOT / "recipes").glob("*.py")} & sys.stdlib_module_names == set()


def test_wrong_configuration_ends_with_its_report_alone(tmp_path: Path) -> None:
    answer = call("sft", "algorithm.learning_rate=1", "data.path=rows.jsonl", "model.path=m", cwd=tmp_path)
    assert answer.returncode == 2
    assert answer.stderr.splitlines()[-2] == "error: 1 problem in the configuration:"
    assert answer.stderr.splitlines()[-1].startswith("  1. algorithm.learning_rate = 1: unknown key.")
    assert "Traceback" not in answer.stderr


def test_wheel_carries_configurations_and_recipes(tmp_path: Path) -> None:
    pytest.importorskip("hatchling", reason="hatchling builds the wheel; it is in the test extra")
    pip_wheel = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation"]
    build = subprocess.run([*pip_wheel, "-w", str(tmp_path), str(ROOT)], capture_output=True, text=True, timeout=300)
    assert build.returncode == 0, build.stderr
    names = zipfile.ZipFile(next(tmp_path.glob("*.whl"))).namelist()
    for folder in ("conf", "recipes"):
        for path in (ROOT / folder).rglob("*.*"):
            if "__pycache__" not in path.parts:
                assert f"lightning_hybrid/_bundled/{path.relative_to(ROOT)}" in names
    assert {"lightning_hybrid_cli.py", "lightning_hybrid/__init__.py", "lightning_hybrid/paths.py"} <= set(names)
    assert not [name for name in names if name.startswith(("tests/", "conf/", "recipes/"))]
