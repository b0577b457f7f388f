from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from lightning_hybrid.config import PPORun, RewardSourceConfig, validate
from lightning_hybrid.config.reward import longest_seconds
from lightning_hybrid.config.run import compose_run
from lightning_hybrid.errors import ConfigError
from lightning_hybrid.modules.roles import make_reward
from lightning_hybrid.paths import conf_dir
from lightning_hybrid.rewards import (
    ExactReward,
    LearnedReward,
    MathReward,
    RemoteReward,
    RewardFunction,
    WeightedRewards,
    load_reward_function,
    reward_from,
)
from tests.rewards.classifiers import save_classifier


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


def test_a_configuration_names_a_function_or_an_endpoint_with_its_limits(module: str) -> None:
    function = reward_from(RewardSourceConfig(function=f"{module}.good:length", timeout_seconds=3.0))
    assert isinstance(function, RewardFunction)
    assert function.timeout_seconds == 3.0
    assert function(["a"], ["four"]).tolist() == [4.0]
    endpoint = reward_from(RewardSourceConfig(url="https://scores.example", timeout_seconds=4.0, retries=2))
    assert isinstance(endpoint, RemoteReward)
    assert (endpoint.timeout_seconds, endpoint.retries) == (4.0, 2)
    with pytest.raises(ConfigError, match="'NO_SUCH_TOKEN', but the environment has no such variable"):
        reward_from(RewardSourceConfig(url="https://scores.example", token_variable="NO_SUCH_TOKEN"))


# ---- what a configuration may say ----------------------------------------------------------------------------------


def test_each_source_makes_its_reward(tmp_path: Path) -> None:
    path = save_classifier(tmp_path / "model", "llama", {0: "good"})
    model = reward_from(RewardSourceConfig(path=path))
    assert isinstance(model, LearnedReward)
    assert make_reward(path, model.tokenizer)[0].keys() == {"reward_model"}
    assert isinstance(reward_from(RewardSourceConfig(verify="math", answer_key="gold")), MathReward)
    assert reward_from(RewardSourceConfig(verify="gsm8k", answer_key="gold")).needed_fields == {"gold"}
    assert isinstance(reward_from(RewardSourceConfig(verify="exact")), ExactReward)
    assert reward_from(RewardSourceConfig(format=".*b"))([""], ["a\nb"]).tolist() == [1.0]
    assert reward_from(RewardSourceConfig(penalty="repetition", ngram=1))([""], ["a a"]).tolist() == [-0.5]


def test_terms_are_built_with_their_weights_and_models_become_children_by_their_names(
    module: str, tmp_path: Path
) -> None:
    path = save_classifier(tmp_path / "model", "llama", {0: "good"})
    terms = {
        "taste": {"path": path, "weight": 0.5},
        "length": {"function": f"{module}.good:length", "weight": -0.1},
        "right": {"verify": "gsm8k", "answer_key": "gold"},
    }
    reward = reward_from(RewardSourceConfig(terms=terms))
    assert isinstance(reward, WeightedRewards)
    assert reward.needed_fields == {"gold"}
    models, same = make_reward(reward, reward.terms["taste"].tokenizer)  # type: ignore[attr-defined]
    assert same is reward
    assert models == {"reward_model_taste": reward.terms["taste"].model}  # type: ignore[attr-defined]
    alone = reward.terms["taste"](["mia"], [" tom"])
    scores = reward(["mia"], [" tom"], {"gold": ["5"]})
    assert scores.tolist() == pytest.approx([0.5 * alone.item() - 0.1 * 4])


def test_a_term_that_cannot_be_built_is_named() -> None:
    terms = {"a": {"verify": "exact"}, "b": {"function": "no_such_module:score"}}
    with pytest.raises(ConfigError, match="reward.terms.b: reward function 'no_such_module:score': importing"):
        reward_from(RewardSourceConfig(terms=terms))


def test_all_problems_of_all_terms_are_in_one_report() -> None:
    terms = {
        "score": {"verify": "exact", "weight": 0.0},
        "twice": {"verify": "exact", "url": "https://x", "weight": 0.0},
        "none": {"weight": "much"},
        "form": {"format": "(", "weight": 0.0},
        "judge": {"classifier": {"path": "c", "template": "{prompt}", "lable": 1}, "verfy": "exact", "weight": 0.0},
        "sent": {"verify": "exact", "send_fields": ["answer"], "weight": 0.0},
        "2nd": {"verify": "exact"},
    }
    with pytest.raises(ConfigError) as caught:
        validate(RewardSourceConfig, {"terms": terms, "cache": "scores.db"})
    for said in (
        "terms = 'score': a term is logged as reward/<name>, and score, score_std, entered are taken",
        "terms.twice.path = url 'https://x' beside verify 'exact': give exactly one of path, classifier",
        "terms.none.path = nothing: give exactly one",
        "terms.none.weight = 'much': must be a valid number (its scores are multiplied by this; 0 for",
        "terms.form.format = '(': is no regular expression of Python: missing )",
        "terms.judge.verfy = 'exact': unknown key. Did you mean 'verify'",
        "terms.judge.classifier.lable = 1: unknown key. Did you mean 'label'",
        "terms.judge.classifier.template = '{prompt}': must be chat, or a text that holds {response}",
        "terms.sent.send_fields = ['answer']: columns are sent to an endpoint: give url",
        "terms.2nd.[key] = '2nd': must match pattern",
    ):
        assert said in str(caught.value), said


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"terms": {"a": {"verify": "exact", "weight": 0.0}}}, "terms = terms a: every weight is 0"),
        (
            {"verify": "exact", "terms": {"a": {"verify": "exact"}}},
            r"verify 'exact' beside terms \['a'\]: give",
        ),
        (
            {"verify": "exact", "cache": True},
            "cache = True: holds scores of function, url, classifier and verify",
        ),
        ({"verify": "maths"}, "verify = 'maths': must be 'math', 'gsm8k' or 'exact'"),
        (
            {"terms": {"a": {"verify": "exact", "weight": float("inf")}}},
            "terms.a.weight = inf: must be a finite",
        ),
        ({"classifier": {}}, "classifier.path: required, but not given"),
    ],
)
def test_what_contradicts_itself_is_refused(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        RewardSourceConfig(**settings)


def test_terms_are_given_on_the_command_line_too() -> None:
    needed = ["model.path=m", "data.path=d.jsonl"]
    run = compose_run("ppo", PPORun, [*needed, "reward.terms.right.verify=gsm8k", "reward.terms.right.weight=2.0"])
    assert run.reward.terms["right"].weight == 2.0
    run = compose_run("ppo", PPORun, [*needed, "reward.classifier.path=c", "reward.classifier.label=good"])
    assert run.reward.classifier is not None
    assert run.reward.classifier.label == "good"


def test_the_yaml_holds_every_key_with_its_default() -> None:
    yaml: Any = OmegaConf.to_container(OmegaConf.load(conf_dir() / "ppo.yaml"))["reward"]  # type: ignore[index,call-overload]
    assert yaml == RewardSourceConfig.model_construct().model_dump()


def test_ranks_wait_as_long_as_all_terms_together_may_take() -> None:
    terms = {
        "a": {"url": "https://x", "timeout_seconds": 100.0, "retries": 2},  # 3 tries and 2 pauses of 60
        "b": {"verify": "math", "timeout_seconds": 50.0},
        "c": {"path": "a-model"},
    }
    assert longest_seconds(RewardSourceConfig(terms=terms)) == 3 * 100 + 2 * 60 + 50
