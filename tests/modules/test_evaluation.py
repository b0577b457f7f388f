"""Evaluation during training: figures over all ranks, a reference that is asked once, and no trace in training."""

from __future__ import annotations

import itertools
import json
import random
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch.utils.data import DataLoader

from lightning_hybrid import HybridDeepSpeedStrategy, PPOConfig, PPOModule, PromptDataModule, RolloutConfig
from lightning_hybrid.callbacks import Checkpoints, EvaluationLog
from lightning_hybrid.config import AdapterConfig, EvaluationConfig, RolesConfig
from lightning_hybrid.data.task import build_tokenizer
from lightning_hybrid.errors import ConfigError
from lightning_hybrid.models import with_adapter
from lightning_hybrid.modules.judgement import Judgement, expected_best, figures_of, pass_at_k, win
from tests.helpers import SHARD_EVERYTHING, quiet_trainer, tiny_policy, weights_of

NOUNS = ["mia", "tom", "ada", "leo", "zoe", "max", "eva", "kim", "ben"]
FIGURES = {"val/score", "val/greedy/score", "val/best_of_3", "val/win_rate", "val/kl", "val/response_length"}


def warm_share(prompts: list[str], responses: list[str]) -> list[float]:
    return [response.split().count("warm") / max(len(response.split()), 1) for response in responses]


def unruly(prompts: list[str], responses: list[str]) -> list[float]:
    """A reward that draws from every global stream."""
    torch.rand(7), random.random()
    return warm_share(prompts, responses)


def module(
    reward: Any = warm_share, policy: Any = None, samples: int = 3, roles: RolesConfig | None = None, **config: Any
) -> PPOModule:
    settings = {"actor_lr": 3e-3, "critic_lr": 3e-3, "kl_coef": 0.0, "micro_batch_size": 16} | config
    return PPOModule(
        policy or tiny_policy(),
        reward,
        PPOConfig(**settings),
        RolloutConfig(max_new_tokens=8),
        build_tokenizer(),
        roles=roles,
        evaluation=EvaluationConfig(samples=samples),
    )


def data(folder: Path, held_out: int = 5, batch_size: int = 4) -> PromptDataModule:
    paths = folder / "prompts.jsonl", folder / "held_out.jsonl"
    texts = [f"{noun} visits the {place} ." for noun in NOUNS for place in ("farm", "market")]
    for path, rows in zip(paths, (texts[:8], texts[8 : 8 + held_out]), strict=True):
        path.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in rows))
    return PromptDataModule(str(paths[0]), validation_path=str(paths[1]), batch_size=batch_size)


class Evaluations(L.Callback):
    """What each validation logged, by the global step."""

    def __init__(self) -> None:
        self.rows: dict[int, dict[str, float]] = {}

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
        self.rows[trainer.global_step] = {name: value for name, value in metrics.items() if name.startswith("val/")}


def fit(
    ppo: PPOModule, folder: Path, steps: int = 4, strategy: Any = "hybrid_deepspeed", every: int = 2, **arguments: Any
) -> dict[int, dict[str, float]]:
    evaluations, callbacks, ckpt_path = Evaluations(), arguments.pop("callbacks", []), arguments.pop("ckpt_path", None)
    schedule = {"val_check_interval": every, "check_val_every_n_epoch": None, "use_distributed_sampler": True}
    trainer = quiet_trainer(
        strategy, max_steps=steps, max_epochs=-1, callbacks=[evaluations, *callbacks], **(schedule | arguments)
    )
    trainer.fit(ppo, datamodule=data(folder), ckpt_path=ckpt_path)
    return evaluations.rows


# ---- the numbers ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("n", "c", "k", "expected"), [(4, 1, 1, 0.25), (4, 1, 2, 0.5), (4, 2, 2, 5 / 6), (4, 0, 4, 0.0), (5, 3, 3, 1.0)]
)
def test_pass_at_k_is_that_of_chen_et_al(n: int, c: int, k: int, expected: float) -> None:
    assert pass_at_k(n, c, k) == pytest.approx(expected, abs=1e-15)


@pytest.mark.parametrize("k", [1, 2, 3, 5])
def test_pass_at_k_and_the_expected_best_are_means_over_all_choices(k: int) -> None:
    scores = [0.25, -1.5, 3.0, 0.25, 2.0]
    choices = list(itertools.combinations(scores, k))
    assert expected_best(scores, k) == pytest.approx(sum(max(choice) for choice in choices) / len(choices), abs=1e-12)
    passing = sum(any(score >= 2.0 for score in choice) for choice in choices) / len(choices)
    assert pass_at_k(5, 2, k) == pytest.approx(passing, abs=1e-12)


def test_more_than_were_sampled_cannot_be_chosen() -> None:
    with pytest.raises(ValueError, match="pass@k of n=3, c=1, k=4"):
        pass_at_k(3, 1, 4)
    with pytest.raises(ValueError, match="best of k=4 among 3 scores"):
        expected_best([1.0, 2.0, 3.0], 4)
    with pytest.raises(ConfigError, match=r"k = 5.*must not exceed samples \(4\)"):
        EvaluationConfig(k=5)


def judgement(index: int, score: float, scores: tuple[float, ...], reference: float, kl: float) -> Judgement:
    count = len(scores)
    return Judgement(
        index, "p", "r", score, scores, (4,) * count, (True, *(False,) * (count - 1)), {}, (kl,) * count, "s", reference
    )


def test_figures_over_prompts_are_those_worked_by_hand() -> None:
    judged = [
        judgement(0, score=2.0, scores=(1.0, 0.0, 0.0, 1.0), reference=1.0, kl=0.5),
        judgement(1, score=0.0, scores=(0.0, 0.0, 0.0, 1.0), reference=0.0, kl=1.5),
        judgement(2, score=0.0, scores=(0.0, 0.0, 0.0, 0.0), reference=3.0, kl=1.0),
    ]
    figures = figures_of(judged, EvaluationConfig(samples=4, k=2, pass_threshold=1.0))
    assert figures == pytest.approx(
        {
            "val/score": 3 / 12,
            "val/greedy/score": 2 / 3,
            "val/response_length": 4.0,
            "val/eos_rate": 0.25,
            "val/kl": 1.0,
            "val/win_rate": (1.0 + 0.5 + 0.0) / 3,
            "val/best_of_2": (5 / 6 + 1 / 2 + 0) / 3,
            "val/pass@1": (1 / 2 + 1 / 4) / 3,
            "val/pass@2": (5 / 6 + 1 / 2) / 3,
        },
        abs=1e-12,
    )


def test_equal_scores_are_half_a_win() -> None:
    assert (win(1.0, 0.5), win(0.5, 0.5), win(0.0, 0.5)) == (1.0, 0.5, 0.0)


# ---- in training -----------------------------------------------------------------------------------------------------


def test_a_policy_that_is_its_reference_ties_with_it_and_then_learns_to_win(tmp_path: Path) -> None:
    ppo = module()
    trainer = quiet_trainer("hybrid_deepspeed")
    before = trainer.validate(ppo, datamodule=data(tmp_path), verbose=False)[0]
    assert set(before) >= FIGURES
    assert (before["val/win_rate"], before["val/kl"]) == (0.5, 0.0)
    after = fit(ppo, tmp_path, steps=20, every=20)[20]
    assert after["val/score"] > before["val/score"] + 0.05
    assert after["val/win_rate"] > 0.5
    assert after["val/kl"] > 0.0


def test_the_same_weights_are_judged_alike_every_time(tmp_path: Path) -> None:
    rows = fit(module(actor_lr=1e-30, critic_warmup_steps=9), tmp_path)
    assert rows[2] == rows[4]


def trained(folder: Path, every: int | None, reward: Any = unruly) -> tuple[torch.Tensor, torch.Tensor, Any]:
    """Actor, critic and random state after a run with dropout, which draws from torch's stream."""
    torch.manual_seed(5), random.seed(5)
    ppo = module(reward, roles=RolesConfig(actor={"dropout": 0.1}))
    fit(ppo, folder, every=every or 1, limit_val_batches=None if every else 0)
    return weights_of(ppo.actor), weights_of(ppo.critic), (torch.get_rng_state(), random.getstate())


def test_training_is_the_same_to_the_last_bit_with_and_without_evaluation(tmp_path: Path) -> None:
    with_it, without = trained(tmp_path, every=1), trained(tmp_path, every=None)
    assert torch.equal(with_it[0], without[0])
    assert torch.equal(with_it[1], without[1])
    assert torch.equal(with_it[2][0], without[2][0])
    assert with_it[2][1] == without[2][1]


def test_the_reference_is_asked_once_in_a_run(tmp_path: Path) -> None:
    ppo, asked = module(), []
    generate = ppo.backend.generate

    def counting(engine: Any, *arguments: Any, **settings: Any) -> Any:
        asked.append(engine is ppo.reference.model)
        return generate(engine, *arguments, **settings)

    ppo.backend.generate = counting  # type: ignore[method-assign]
    fit(ppo, tmp_path, steps=4, every=2)
    assert asked.count(True) == 2  # batches of held-out prompts, of two evaluations


@pytest.mark.parametrize(
    ("stage", "adapter"),
    [(0, False), (3, False), (2, True), pytest.param(3, True, marks=pytest.mark.slow)],
)
def test_the_reference_says_the_same_at_every_stage_and_with_adapters(
    tmp_path: Path, stage: int, adapter: bool
) -> None:
    expected = module()
    quiet_trainer("hybrid_deepspeed").validate(expected, datamodule=data(tmp_path), verbose=False)
    policy = with_adapter(tiny_policy(), AdapterConfig(r=4)) if adapter else tiny_policy()
    ppo = module(policy=policy)
    rows = fit(ppo, tmp_path, strategy=HybridDeepSpeedStrategy(stage=stage, config=SHARD_EVERYTHING))
    said = [(each.reference_response, each.reference_score) for each in ppo.evaluation.judgements]
    assert said == [(each.reference_response, each.reference_score) for each in expected.evaluation.judgements]
    assert rows[4]["val/kl"] != 0.0  # k1 may be negative


def test_without_a_reference_there_is_nothing_to_win_against(tmp_path: Path) -> None:
    row = fit(module(reference=False), tmp_path)[4]
    assert "val/score" in row
    assert not {"val/win_rate", "val/kl"} & set(row)


def test_phases_of_an_evaluation_let_the_same_sleep_as_training(tmp_path: Path) -> None:
    sleep = {"optimizer": True, "frozen_models": True, "kv_cache": True}
    asleep = fit(module(), tmp_path, strategy=HybridDeepSpeedStrategy(stage=2, sleep=sleep))
    assert asleep == fit(module(), tmp_path, strategy=HybridDeepSpeedStrategy(stage=2))


def test_a_resumed_run_finds_what_the_uninterrupted_one_found(tmp_path: Path) -> None:
    file = tmp_path / "evaluation.jsonl"

    def run(ckpt_path: Path | None = None) -> dict[int, dict[str, float]]:
        callbacks = [EvaluationLog(file, rows=2), Checkpoints(tmp_path / "checkpoints", 2)]
        return fit(module(), tmp_path, steps=6, callbacks=callbacks, enable_checkpointing=True, ckpt_path=ckpt_path)

    whole, written = run(), file.read_text()
    assert run(tmp_path / "checkpoints" / "step=000004.ckpt") == {6: whole[6]}
    assert file.read_text() == written
    lines = [json.loads(line) for line in written.splitlines()]
    assert [(line["step"], line["index"]) for line in lines] == [(s, i) for s in (2, 4, 6) for i in (0, 1)]
    assert {"prompt", "response", "score", "mean_score", "reference_response", "reference_score"} <= set(lines[0])


def test_rows_without_an_index_are_judged_too() -> None:
    tokenizer, ppo = build_tokenizer(), module()
    rows = [f"{noun} visits the farm ." for noun in NOUNS]

    def collate(batch: list[str]) -> dict[str, Any]:
        return {"prompts": batch, "prompt_ids": [[1, *tokenizer(text)["input_ids"]] for text in batch]}

    loader = DataLoader(rows, batch_size=4, collate_fn=collate)  # type: ignore[arg-type]
    quiet_trainer("hybrid_deepspeed").validate(ppo, loader, verbose=False)
    assert [each.prompt for each in ppo.evaluation.judgements] == rows


def two_ranks(folder: str, stage: int) -> None:
    """Entry point of a rank: five held-out prompts over two ranks, one of them repeated by the sampler."""
    strategy = HybridDeepSpeedStrategy(stage=stage, config=SHARD_EVERYTHING)
    ppo = module(actor_lr=1e-30, critic_warmup_steps=9)
    rows = fit(ppo, Path(folder), steps=1, every=1, strategy=strategy, devices=2)
    print("evaluated:", json.dumps([rows[1], [each.index for each in ppo.evaluation.judgements]]))


@pytest.mark.slow
@pytest.mark.parametrize("stage", [2, 3])
def test_two_ranks_find_what_one_finds_and_count_no_prompt_twice(run_ranks: Any, tmp_path: Path, stage: int) -> None:
    alone = fit(module(actor_lr=1e-30, critic_warmup_steps=9), tmp_path, steps=1, every=1)[1]
    for output in run_ranks(two_ranks, 2, str(tmp_path), stage, timeout=110):
        figures, places = json.loads(output.split("evaluated:", 1)[1])
        assert places == [0, 1, 2, 3, 4]
        assert figures == pytest.approx(alone, abs=1e-5)
