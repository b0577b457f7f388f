"""A wrong configuration is refused before any training, with one report of all its problems."""

from __future__ import annotations

import re
from typing import Any

import pytest
from omegaconf import OmegaConf
from pydantic import ValidationError

from lightning_hybrid.algorithms import ALGORITHMS
from lightning_hybrid.config import PPOConfig, PPORun, RewardRun, RolloutConfig, SFTRun, StrategyConfig, validate
from lightning_hybrid.config.run import compose_run
from lightning_hybrid.errors import ConfigError

NEEDED = ["model.path=a-model", "data.path=rows.jsonl", "reward.path=a-reward-model"]


def report(*overrides: str) -> str:
    """The report on a PPO configuration that is complete but for `overrides`."""
    with pytest.raises(ConfigError, match="in the configuration") as caught:
        compose_run("ppo", PPORun, [*NEEDED, *overrides])
    return str(caught.value)


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("algorithm.kl_ceof=0.2", "algorithm.kl_ceof = 0.2: unknown key. Did you mean 'kl_coef'?"),
        ("algorthm.kl_coef=0.2", "algorthm = {'kl_coef': 0.2}: unknown key. Did you mean 'algorithm'?"),
        ("algorithm.max_new_tokens=9", "Did you mean 'rollout.max_new_tokens'?"),
        ("rollout.zzz=9", "Known keys here: backend, max_new_tokens"),
        ("algorithm.kl_coef=abc", "algorithm.kl_coef = 'abc': must be a valid number"),
        ("algorithm.kl_coef=true", "algorithm.kl_coef = True: must be a valid number"),
        ("algorithm.kl_coef=-3", "algorithm.kl_coef = -3: must be greater than or equal to 0"),
        ("algorithm.kl_estimator=k4", "algorithm.kl_estimator = 'k4': must be 'k1', 'k2' or 'k3'"),
        ("algorithm.lam=1.5", "algorithm.lam = 1.5: must be less than or equal to 1"),
        ("algorithm.early_stop_kl=0", "algorithm.early_stop_kl = 0: must be greater than 0"),
        (
            "algorithm.old_logprobs=always",
            "algorithm.old_logprobs = 'always': must be 'auto', 'rollout' or 'recompute'",
        ),
        ("algorithm.old_logprob_tolerance=0", "algorithm.old_logprob_tolerance = 0: must be greater than 0"),
        ("algorithm.importance_cap=0.5", "algorithm.importance_cap = 0.5: must be greater than or equal to 1"),
        ("algorithm.dual_clip=1", "algorithm.dual_clip = 1: must be greater than 1"),
        ("algorithm.betas=[0.9,2.0]", "algorithm.betas (item 1) = 2.0: must be less than 1"),
        ("algorithm.betas=[0.9]", "algorithm.betas.1: required, but not given"),
        ("algorithm.kl_coef=inf", "algorithm.kl_coef = inf: must be a finite number"),
        ("algorithm.overlong_penalty=nan", "algorithm.overlong_penalty = nan: must be a finite number"),
        ("rollout.temperature=0", "rollout.temperature = 0: must be greater than 0"),
        ("rollout.top_p=0", "rollout.top_p = 0: must be greater than 0"),
        ("rollout.top_p=1.1", "rollout.top_p = 1.1: must be less than or equal to 1"),
        ("trainer.max_steps=0", "trainer.max_steps = 0: must be greater than 0"),
        ("trainer.devices=1.5", "trainer.devices = 1.5: must be a valid integer or a valid string"),
        ("trainer.devices=many", "trainer.devices = 'many': must be a valid integer or match pattern"),
        ("data.path=[]", "data.path = []: must be a valid string or have at least 1 item"),
        ("data.path=5", "data.path = 5: must be a valid string or a valid list"),
        ("data=5", "data = 5: must be a valid dictionary"),
        ("strategy.name=hybrid", "strategy.name = 'hybrid': must be 'hybrid_deepspeed', "),
        ("seed=${sed}", "seed: cannot be resolved: Interpolation key 'sed' not found"),
        ("model.path=???", "model.path: required, but not given (folder or hub name"),
        ("strategy.config.zero_optimization.stage=???", "strategy.config.zero_optimization.stage: required"),
    ],
)
def test_wrong_value_is_named_with_what_is_allowed(override: str, line: str) -> None:
    if override == "data=5":
        with pytest.raises(ConfigError, match=re.escape(line)):
            validate(PPORun, {"data": 5})
    else:
        assert line in report(override)


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        (["trainer.precision=16-true", "trainer.accelerator=cpu"], "fp16 does not run on a CPU: use 32-true"),
        (["trainer.max_steps=null"], "trainer.max_steps = None: give max_steps or max_epochs"),
        (["trainer.gradient_clip_val=1.0"], "trainer.gradient_clip_val = 1.0: PPO clips each optimizer's gradients"),
        (["trainer.accumulate_grad_batches=2"], "PPO accumulates inside its update: use algorithm.minibatch_size"),
        (["algorithm.minibatch_size=3", "trainer.devices=2"], "must be a multiple of the number of ranks (2"),
        (["algorithm.minibatch_size=3", "trainer.devices='0,1'"], "must be a multiple of the number of ranks (2"),
        (["algorithm.minibatch_size=5"], "algorithm.minibatch_size = 5: must divide the rollout batch of 8"),
        (["algorithm.minibatch_size=12"], "algorithm.minibatch_size = 12: must divide the rollout batch of 8"),
        (["algorithm.kl_coef=0", "algorithm.kl_target=6.0"], "must be above 0 when kl_target is set"),
        (
            ["roles.critic.zero_stage=0", "trainer.precision=bf16-true"],
            "roles.critic.zero_stage = 0: has no fp32 master weights for bf16-true: use 1",
        ),
        (
            ["algorithm.kl_target=6.0", "data.batch_size=512", "algorithm.kl_horizon=100"],
            "algorithm.kl_horizon = 100: must be above 102.4, a fifth of an iteration's 512 responses",
        ),
        (
            ["adapter=lora", "model.adapter.dropout=0.1"],
            "model.adapter.dropout = 0.1: PPO sets every dropout of a model by its role: use roles.actor.dropout",
        ),
        (
            ["algorithm.old_logprobs=rollout", "algorithm.importance_cap=2.0"],
            "algorithm.importance_cap = 2.0 with old_logprobs='rollout': compares the rollout's log-probs with "
            "recomputed ones: use old_logprobs=recompute, or null for no weights",
        ),
        (
            ["algorithm.old_logprobs=rollout", "rollout.temperature=0.7", "rollout.top_p=0.9"],
            "algorithm.old_logprobs = 'rollout': with rollout.temperature=0.7 and top_p=0.9 the rollout does not know "
            "the log-probs at that temperature over all tokens: use recompute or auto",
        ),
        (["rollout.min_new_tokens=65"], "rollout.min_new_tokens = 65: must not exceed max_new_tokens (64)"),
        (["reward.function=rewards:length"], "reward.path = 'a-reward-model' beside function 'rewards:length'"),
        (["reward.path=null"], "reward.path = nothing: give exactly one of path (a reward model), classifier, func"),
        (["model.path=null"], "model.path = nothing: give exactly one of path"),
        (
            [
                "reward.path=null",
                "reward.url=https://x",
                "reward.timeout_seconds=600",
                "reward.retries=2",
                "trainer.devices=2",
            ],
            "reward.timeout_seconds = 600: with all retries the reward may take 1920 s, which must be less than",
        ),
        (["+model.architecture={hidden_size: 8}"], "model.path = 'a-model' beside model.architecture"),
        (["+model.architecture={hidden_size: 8}"], "must have the key model_type, such as 'llama'"),
        (["+model.architecture={model_type: llama}"], "model.tokenizer = None: required with model.architecture"),
        (["data.validation_fraction=0.1", "data.validation_path=v.jsonl"], "choose one of them"),
        (
            ["callbacks.checkpoint_every_n_steps=5", "trainer.enable_checkpointing=false"],
            "callbacks.checkpoint_every_n_steps = 5: needs trainer.enable_checkpointing=true",
        ),
        (["strategy.hybrid_engine.inference_tp_size=2"], "must divide the number of ranks (1,"),
        (["+strategy.config.hybrid_engine.enabled=true"], "belongs in strategy.hybrid_engine"),
        (
            ["strategy=hybrid_deepspeed_stage_2", "+strategy.config.zero_optimization.stage=3"],
            "strategy.config.zero_optimization.stage = 3: strategy.name is 'hybrid_deepspeed_stage_2'",
        ),
    ],
)
def test_values_that_contradict_each_other_are_named_with_the_remedy(overrides: list[str], line: str) -> None:
    assert line in report(*overrides)


def test_one_report_lists_every_kind_of_problem_once() -> None:
    text = report(
        "algorithm.kl_ceof=0.2",
        "algorithm.kl_coef=-3",
        "data.path=???",
        "rollout.top_p=high",
        "trainer.precision=16-mixed",
        "trainer.accelerator=cpu",
    )
    assert text.startswith("5 problems in the configuration:\n")
    assert [line.split(".", 1)[0].strip() for line in text.splitlines()[1:]] == ["1", "2", "3", "4", "5"]
    for key in ("algorithm.kl_ceof", "algorithm.kl_coef", "data.path", "rollout.top_p", "trainer.precision"):
        assert len(re.findall(rf"{key}\b", text)) == 1


def test_rule_over_a_wrong_value_adds_no_second_problem() -> None:
    assert report("rollout.max_new_tokens=many", "rollout.min_new_tokens=500").startswith("1 problem ")


def test_settings_made_in_python_give_the_same_report() -> None:
    with pytest.raises(ConfigError, match=r"1 problem in PPOConfig:\n  1\. kl_coef = -3: must be greater than"):
        PPOConfig(kl_coef=-3)
    with pytest.raises(ConfigError, match="2 problems in RolloutConfig"):
        RolloutConfig(temperature=0, min_new_tokens=100)
    with pytest.raises(ConfigError, match=r"hybrid_engine\.max_out_token = 5: unknown key. Did you mean 'max_out_tok"):
        StrategyConfig(hybrid_engine={"max_out_token": 5})  # type: ignore[arg-type]


def test_settings_made_in_python_may_hold_settings() -> None:
    ppo = PPOConfig(kl_coef=0.01)
    run = compose_run("ppo", PPORun, NEEDED)
    again = PPORun(**{**dict(run), "algorithm": ppo})
    assert again.algorithm is ppo


def test_settings_do_not_change_after_validation() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        PPOConfig().kl_coef = 0.5


def test_hydras_own_node_is_left_out() -> None:
    plain = {
        "model": {"path": "a-model"},
        "data": {"path": "rows.jsonl"},
        "trainer": {"max_epochs": 1},
        "root": "here",
        "output_dir": "${root}/sft",
        "hydra": {"run": {"dir": "${output_dir}"}},
    }
    assert validate(SFTRun, plain).output_dir == "here/sft"
    assert validate(SFTRun, OmegaConf.create(plain)).data.path == "rows.jsonl"


def test_key_of_another_recipe_is_unknown() -> None:
    with pytest.raises(ConfigError, match=r"algorithm\.kl_coef = 0\.1: unknown key"):
        compose_run("reward", RewardRun, [*NEEDED[:2], "algorithm.kl_coef=0.1"])


def test_unknown_choice_of_a_group_lists_the_choices() -> None:
    with pytest.raises(ConfigError, match=r"trainer=gpux: no such choice\. Did you mean 'gpu'\? There are: auto"):
        compose_run("ppo", PPORun, ["trainer=gpux"])


@pytest.mark.parametrize(
    ("recipe", "schema", "override", "said"),
    [
        ("ppo", PPORun, "algorithm=dpo", r"algorithm=dpo is for lightning-hybrid dpo, not for ppo, which has: cispo, "),
        ("sft", SFTRun, "algorithm=grpo", r"algorithm=grpo is for lightning-hybrid ppo, not for sft, which has: sft$"),
        (
            "sft",
            SFTRun,
            "experiment=quickstart/reward",
            r"experiment=quickstart/reward is for lightning-hybrid reward,",
        ),
    ],
)
def test_a_choice_for_another_recipe_names_that_one(recipe: str, schema: Any, override: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        compose_run(recipe, schema, [*NEEDED[:2], override])


@pytest.mark.parametrize("overrides", [["rollout.temperature=0.7"], ["rollout.top_p=0.9"], ["rollout.min_p=0.1"]])
def test_a_rollout_that_knows_old_log_probs_may_give_them(overrides: list[str]) -> None:
    run = compose_run("ppo", PPORun, [*NEEDED, "algorithm.old_logprobs=rollout", *overrides])
    assert run.algorithm.old_logprobs == "rollout"


@pytest.mark.parametrize("name", ALGORITHMS)
def test_a_run_takes_the_settings_of_any_algorithm_as_an_object(name: str) -> None:
    run = compose_run("ppo", PPORun, [*NEEDED, f"algorithm={name}"])
    again = PPORun(**dict(run))
    assert again.algorithm == run.algorithm
    assert again.model_dump()["algorithm"] == run.model_dump()["algorithm"]
