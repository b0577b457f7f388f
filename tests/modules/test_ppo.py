"""PPO inside ``Trainer.fit``: it learns, counts iterations, logs what it should, and stops where it must."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch.utils.data import DataLoader

from lightning_hybrid import HybridDeepSpeedStrategy, PPOConfig, PPOModule, PromptDataModule, RolloutConfig
from lightning_hybrid.data.task import build_tokenizer
from lightning_hybrid.errors import ConfigError, DataError, RewardError
from lightning_hybrid.generation import used_columns
from lightning_hybrid.models import build_policy
from lightning_hybrid.models.scalar import scalar_from_policy
from lightning_hybrid.modules.batching import minibatches
from tests.helpers import PPO_FIGURES, quiet_trainer, tiny_policy, weights_of

WARM = build_tokenizer().convert_tokens_to_ids("warm")


def warm_share(prompts: list[str], responses: list[str]) -> list[float]:
    return [response.split().count("warm") / max(len(response.split()), 1) for response in responses]


def module(reward: Any = warm_share, rollout: dict[str, Any] | None = None, **config: Any) -> PPOModule:
    settings = {"actor_lr": 3e-3, "critic_lr": 3e-3, "kl_coef": 0.0, "micro_batch_size": 16} | config
    return PPOModule(
        tiny_policy(),
        reward,
        PPOConfig(**settings),
        RolloutConfig(**({"max_new_tokens": 8} | (rollout or {}))),
        build_tokenizer(),
    )


def prompts(rows: int = 64, batch_size: int = 16) -> DataLoader[Any]:
    tokenizer = build_tokenizer()
    texts = ["mia visits the market .", "tom leaves the farm .", "ada sees the museum ."]
    rows_ = [(texts[i % 3], [1, *tokenizer(texts[i % 3])["input_ids"]]) for i in range(rows)]

    def collate(batch: list[Any]) -> dict[str, Any]:
        return {"prompts": [t for t, _ in batch], "prompt_ids": [ids for _, ids in batch]}

    return DataLoader(rows_, batch_size=batch_size, collate_fn=collate)


class History(L.Callback):
    def __init__(self) -> None:
        self.rows: list[dict[str, float]] = []

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        self.rows.append({name: float(value) for name, value in trainer.callback_metrics.items()})


def fit(ppo: PPOModule, steps: int, strategy: Any = "hybrid_deepspeed", **arguments: Any) -> list[dict[str, float]]:
    history = History()
    quiet_trainer(strategy, max_steps=steps, callbacks=[history], **arguments).fit(ppo, prompts())
    return history.rows


def test_a_policy_learns_what_its_reward_prefers() -> None:
    rows = fit(module(), steps=40)
    first, last = (sum(row["reward/score"] for row in part) / 5 for part in (rows[:5], rows[-5:]))
    assert first < 0.1
    assert last > 0.5


def test_an_iteration_is_one_step_however_many_optimizer_steps_it_takes() -> None:
    ppo = module(epochs=3, minibatch_size=8)
    rows = fit(ppo, steps=4)
    assert ppo.trainer.global_step == len(rows) == 4
    assert rows[-1]["optimizer_steps"] == 4 * 3 * 2


def test_schedules_count_iterations() -> None:
    rows = fit(module(schedule="linear", epochs=2), steps=4)
    assert [row["lr"] for row in rows] == pytest.approx([3e-3 * part for part in (1.0, 0.75, 0.5, 0.25)])


def test_every_figure_that_an_iteration_promises_is_logged_and_finite() -> None:
    row = fit(module(), steps=2)[-1]
    gap = {"logprob_gap_mean", "logprob_gap_max", "ratio_outside", "old_logprobs_recomputed"}
    promised = PPO_FIGURES | {f"rollout/{name}" for name in gap}
    assert promised <= set(row)
    assert all(math.isfinite(value) for value in row.values())
    assert row["rollout/logprob_gap_mean"] < 1e-5


def test_the_first_pass_over_fresh_experience_has_ratio_one() -> None:
    row = fit(module(), steps=1)[0]
    assert row["policy/ratio_mean"] == pytest.approx(1.0, abs=1e-5)
    assert row["policy/clip_fraction"] == 0.0
    assert row["policy/kl"] == 0.0  # the reference is the policy as it started


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
@pytest.mark.parametrize("stage", [1, 3])
def test_in_bf16_too_the_reference_is_the_policy_as_it_started(precision: str, stage: int) -> None:
    row = fit(module(), steps=1, strategy=HybridDeepSpeedStrategy(stage=stage), precision=precision)[0]
    assert row["policy/kl"] == 0.0


def test_dropout_does_not_make_a_fresh_policy_differ_from_itself() -> None:
    torch.manual_seed(0)
    gpt2 = build_policy({"model_type": "gpt2", "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}, 49)
    settings = PPOConfig(micro_batch_size=16)
    ppo = PPOModule(gpt2, warm_share, settings, RolloutConfig(max_new_tokens=8), build_tokenizer())
    row = fit(ppo, steps=1)[0]
    assert row["policy/ratio_max"] == pytest.approx(1.0, abs=1e-5)


def test_a_data_module_takes_tokenizer_lengths_and_limit_from_the_module(tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "mia visits the market ."}\n' * 8)
    ppo = module()
    quiet_trainer("hybrid_deepspeed", max_steps=1).fit(ppo, datamodule=PromptDataModule(str(path), batch_size=4))
    path.write_text(('{"prompt": "' + "mia " * 60 + '"}\n') * 8)
    with pytest.raises(DataError, match=r"prompts\.jsonl:1.*"):
        quiet_trainer("hybrid_deepspeed", max_steps=1).fit(
            module(), datamodule=PromptDataModule(str(path), batch_size=4, too_long="error")
        )


def test_frozen_models_stay_as_they_were() -> None:
    reward_model = scalar_from_policy(tiny_policy(seed=3))
    torch.nn.init.normal_(reward_model.model.score.weight)
    ppo = module(reward=reward_model)
    before = weights_of(ppo.reference), weights_of(ppo.reward_model)
    actor, critic = weights_of(ppo.actor), weights_of(ppo.critic)
    fit(ppo, steps=2)
    assert torch.equal(weights_of(ppo.reference), before[0])
    assert torch.equal(weights_of(ppo.reward_model), before[1])
    assert not torch.equal(weights_of(ppo.actor), actor)
    assert not torch.equal(weights_of(ppo.critic), critic)


def test_the_critic_starts_from_the_reward_model() -> None:
    reward_model = scalar_from_policy(tiny_policy(seed=3))
    torch.nn.init.normal_(reward_model.model.score.weight)
    assert torch.equal(weights_of(module(reward=reward_model).critic), weights_of(reward_model))


def test_a_kl_penalty_holds_the_policy_near_its_reference() -> None:
    free, held = (fit(module(kl_coef=coefficient), steps=25)[-1]["policy/kl"] for coefficient in (0.0, 1.0))
    assert held < free / 3


def test_an_adaptive_coefficient_grows_while_the_kl_is_above_its_target() -> None:
    rows = fit(module(kl_coef=0.01, kl_target=1e-3, kl_horizon=200), steps=8)
    assert rows[-1]["policy/kl_coef"] > rows[0]["policy/kl_coef"]


def test_an_update_stops_early_when_the_policy_has_moved_too_far() -> None:
    ppo = module(actor_lr=0.05, epochs=8, early_stop_kl=1e-3)
    row = fit(ppo, steps=1)[0]
    assert row["policy/stopped_early"] == 1.0
    assert 0 < row["optimizer_steps"] < 8


def test_the_actor_waits_while_the_critic_warms_up() -> None:
    ppo = module(critic_warmup_steps=5)
    actor, critic = weights_of(ppo.actor), weights_of(ppo.critic)
    fit(ppo, steps=3)
    assert torch.equal(weights_of(ppo.actor), actor)
    assert not torch.equal(weights_of(ppo.critic), critic)


def test_a_response_without_an_end_pays_the_penalty() -> None:
    rows = fit(module(missing_eos_penalty=0.5, rollout={"max_new_tokens": 1}), steps=1)
    ended = rows[0]["rollout/eos_rate"]
    assert rows[0]["reward/entered"] == pytest.approx(rows[0]["reward/score"] - 0.5 * (1 - ended), abs=1e-5)


def test_normalized_scores_have_unit_deviation() -> None:
    ppo = module(reward=lambda p, r: [100.0 * len(text) for text in r], normalize_reward=True, reward_clip=None)
    fit(ppo, steps=3)
    assert ppo.score_moments.count == 3 * 16
    assert ppo.score_moments.std > 10


def test_scores_that_are_all_equal_stay_as_they_are_when_normalized() -> None:
    row = fit(module(reward=lambda p, r: [0.25] * len(r), normalize_reward=True), steps=1)[0]
    assert row["reward/entered"] == 0.25


@pytest.mark.parametrize("stage", [0, 3])
def test_other_stages_learn_alike(stage: int) -> None:
    rows = fit(module(), steps=3, strategy=HybridDeepSpeedStrategy(stage=stage))
    expected = fit(module(), steps=3)
    assert rows[-1]["value/loss"] == pytest.approx(expected[-1]["value/loss"], rel=1e-3)


def test_validation_scores_held_out_prompts() -> None:
    ppo = module()
    trainer = quiet_trainer("hybrid_deepspeed", max_steps=4, limit_val_batches=1)
    trainer.fit(ppo, prompts(), prompts())
    assert {"val/score", "val/response_length", "val/eos_rate"} <= set(trainer.callback_metrics)
    assert trainer.validate(ppo, prompts(), verbose=False)[0]["val/response_length"] > 0


def test_a_run_resumed_from_a_checkpoint_keeps_its_controller_and_its_count(tmp_path: Path) -> None:
    settings = {"kl_coef": 0.01, "kl_target": 1e-3, "kl_horizon": 200}
    from lightning.pytorch.callbacks import ModelCheckpoint

    keep = ModelCheckpoint(dirpath=tmp_path, save_last=True, every_n_train_steps=2)
    saved = module(**settings)
    quiet_trainer("hybrid_deepspeed", max_steps=4, callbacks=[keep], enable_checkpointing=True).fit(saved, prompts())
    again = module(**settings)
    trainer = quiet_trainer("hybrid_deepspeed", max_steps=6)
    trainer.fit(again, prompts(), ckpt_path=str(tmp_path / "last.ckpt"))
    assert trainer.global_step == 6
    assert again.kl_controller.value > saved.kl_controller.value


@pytest.mark.parametrize(
    ("reward", "message"),
    [
        (lambda p, r: [float("nan")] * len(r), r"returned nan \(float\) for sample 0 \(prompt 'mia visits"),
        (lambda p, r: [0.0] * (len(r) - 1), r"returned 15 scores, none for sample 15"),
        (lambda p, r: ["good"] * len(r), r"returned 'good' \(str\) for sample 0"),
        (lambda p, r: 1 / 0, r"raised ZeroDivisionError: division by zero, for sample 0"),
    ],
    ids=["nan", "one too few", "text", "raises"],
)
def test_a_reward_that_fails_names_the_sample(reward: Any, message: str) -> None:
    with pytest.raises(RewardError, match=message):
        fit(module(reward=reward), steps=1)


def one_rank_fails(rank_that_fails: int) -> None:
    """Entry point of a rank."""

    def reward(p: list[str], r: list[str]) -> list[float]:
        if torch.distributed.get_rank() == rank_that_fails:
            raise KeyError("no such answer")
        return [0.0] * len(r)

    try:
        fit(module(reward=reward), steps=1, devices=2)
    except RewardError as error:
        print("stopped:", str(error).replace("\n", " "))


def test_a_reward_that_fails_on_one_rank_stops_all_ranks_and_names_it(run_ranks: Any) -> None:
    for output in run_ranks(one_rank_fails, 2, 1, timeout=90):
        assert "stopped: the reward failed on 1 of 2 ranks:   rank 1: reward" in output
        assert "no such answer" in output


def test_ppo_needs_the_hybrid_strategy_and_says_so() -> None:
    with pytest.raises(ConfigError, match="runs under strategy='hybrid_deepspeed'; the Trainer has SingleDevice"):
        fit(module(), steps=1, strategy="auto")


def test_a_minibatch_that_does_not_divide_the_rollout_is_refused_with_the_numbers() -> None:
    with pytest.raises(ConfigError, match=r"minibatch_size=5 over 1 ranks does not divide a rollout of 16"):
        fit(module(minibatch_size=5), steps=1)


def test_a_module_given_as_a_policy_needs_a_tokenizer() -> None:
    with pytest.raises(ConfigError, match="tokenizer is required where the model is given as a module"):
        PPOModule(tiny_policy(), warm_share)


def test_minibatches_cover_every_row_once() -> None:
    parts = minibatches(10, 5, torch.Generator().manual_seed(0))
    assert sorted(torch.cat(parts).tolist()) == list(range(10))
    assert torch.equal(minibatches(10, 10, torch.Generator())[0], torch.arange(10))


def test_columns_that_are_padding_everywhere_are_left_out() -> None:
    mask = torch.tensor([[0, 0, 1, 1, 0], [0, 1, 1, 0, 0]]).bool()
    assert used_columns(mask) == slice(1, 4)


def test_a_reference_may_be_given_apart_from_the_actor() -> None:
    reference = tiny_policy(seed=9)
    ppo = PPOModule(
        tiny_policy(),
        warm_share,
        PPOConfig(),
        RolloutConfig(max_new_tokens=4),
        build_tokenizer(),
        reference=copy.deepcopy(reference),
    )
    assert torch.equal(weights_of(ppo.reference), weights_of(reference))
    assert fit(ppo, steps=1)[0]["policy/kl"] != 0.0
