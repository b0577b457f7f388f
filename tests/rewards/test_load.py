from __future__ import annotations

from pathlib import Path

import pytest

from lightning_hybrid.config import RewardSourceConfig
from lightning_hybrid.errors import ConfigError
from lightning_hybrid.rewards import RemoteReward, RewardFunction, load_reward_function, reward_from


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    package = tmp_path / "house_of_scores"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "good.py").write_text(
        "LIMIT = 3\ndef length(prompts, responses):\n    return [len(r) for r in responses]\n"
    )
    (package / "broken.py").write_text("import a_package_nobody_has\n")
    (package / "wrong.py").write_text("def f(:\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    return "house_of_scores"


def test_a_function_is_found_by_its_name(module: str) -> None:
    reward = RewardFunction(load_reward_function(f"{module}.good:length"))
    assert reward(["a"], ["four"]).tolist() == [4.0]


@pytest.mark.parametrize("spec", ["", "good", "good.length", "good:", ":length", "a:b:c", "a b:c", "./good.py:length"])
def test_a_wrong_format_says_the_right_one(spec: str) -> None:
    with pytest.raises(ConfigError, match='has the wrong format: write "package.module:function"'):
        load_reward_function(spec)


def test_a_module_that_does_not_exist_is_named() -> None:
    with pytest.raises(ConfigError, match="importing 'no_such_module' raised ModuleNotFoundError: .*PYTHONPATH"):
        load_reward_function("no_such_module:score")


def test_a_module_that_fails_on_import_shows_its_own_error(module: str) -> None:
    with pytest.raises(ConfigError, match="raised ModuleNotFoundError: No module named 'a_package_nobody_has'"):
        load_reward_function(f"{module}.broken:score")
    with pytest.raises(ConfigError, match="raised SyntaxError"):
        load_reward_function(f"{module}.wrong:score")


def test_a_missing_name_lists_what_is_there(module: str) -> None:
    with pytest.raises(
        ConfigError, match=r"module 'house_of_scores.good' \(.*good.py\) has no 'lenght'; it has length"
    ):
        load_reward_function(f"{module}.good:lenght")


def test_a_name_that_cannot_be_called_is_refused(module: str) -> None:
    with pytest.raises(ConfigError, match="is 3, which cannot be called"):
        load_reward_function(f"{module}.good:LIMIT")


def test_a_configuration_names_a_path_a_function_or_an_endpoint_with_its_limits(module: str) -> None:
    assert reward_from(RewardSourceConfig(path="a/reward/model")) == "a/reward/model"
    function = reward_from(RewardSourceConfig(function=f"{module}.good:length", timeout_seconds=3.0))
    assert isinstance(function, RewardFunction)
    assert function.timeout_seconds == 3.0
    assert function(["a"], ["four"]).tolist() == [4.0]
    endpoint = reward_from(RewardSourceConfig(url="https://scores.example", timeout_seconds=4.0, retries=2))
    assert isinstance(endpoint, RemoteReward)
    assert (endpoint.timeout_seconds, endpoint.retries) == (4.0, 2)
    with pytest.raises(ConfigError, match="'NO_SUCH_TOKEN', but the environment has no such variable"):
        reward_from(RewardSourceConfig(url="https://scores.example", token_variable="NO_SUCH_TOKEN"))
