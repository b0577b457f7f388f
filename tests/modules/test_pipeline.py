"""One or more steps off policy: responses are drawn while the ranks train, and none is learned from too old."""

from __future__ import annotations

import copy
import os
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch.utils.data import DataLoader

import lightning_hybrid.modules.ppo as ppo_file
from lightning_hybrid import GRPOConfig, HybridDeepSpeedStrategy, PPOConfig, PPOModule, RolloutConfig
from lightning_hybrid.config import EvaluationConfig
from lightning_hybrid.data.task import build_tokenizer
from lightning_hybrid.engines.agreement import of_all_ranks
from lightning_hybrid.errors import ConfigError, RolloutError
from lightning_hybrid.rollout import PromptRequest
from tests.helpers import quiet_trainer, tiny_policy
from tests.modules.pipelined import Pace, ScriptedBackend
from tests.modules.test_ppo import module as native_module

LONGEST, BATCH, ROWS = 8, 4, 20
CLOCKS = ("seconds/", "throughput/", "engine/", "memory/", "rollout/wait_seconds")
PLACES = ("market", "farm", "museum", "garden", "school")
TEXTS = [f"{name} sees the {place} ." for name in ("mia", "tom", "ada", "ben") for place in PLACES]
SEPARATE = {"backend": "vllm", "vllm": {"colocate": False}}


def one_is_slow(request: PromptRequest) -> int:
    """The first prompt of each batch draws one token while the others draw all of theirs."""
    return 1 if request.index == 0 else 100


def numbered(prompts: list[str], responses: list[str], number: list[int]) -> list[float]:
    """A reward that knows from its column which prompt it judges."""
    assert [TEXTS[n] for n in number] == prompts
    return [len(set(response.split())) / LONGEST for response in responses]


def module(staleness: int, pace: Pace = one_is_slow, training: int = 1, n: int = 1, **config: Any) -> PPOModule:
    settings = {"actor_lr": 1e-2, "kl_coef": 0.0, "importance_cap": 2.0, "micro_batch_size": 16} | config
    algorithm = PPOConfig(**settings) if n == 1 else GRPOConfig(**settings, group_size=n, reference=False)
    rollout = RolloutConfig(**SEPARATE, max_new_tokens=LONGEST, max_staleness=staleness)
    evaluation = EvaluationConfig(samples=1)
    ppo = PPOModule(tiny_policy(), numbered, algorithm, rollout, build_tokenizer(), evaluation=evaluation)
    ppo.backend = ScriptedBackend(ppo.actor, LONGEST, ppo._ends, pace, training)
    return ppo


def collate(numbers: list[int]) -> dict[str, Any]:
    tokenizer = build_tokenizer()
    texts = [TEXTS[number] for number in numbers]
    return {
        "prompts": texts,
        "prompt_ids": [[1, *tokenizer(text)["input_ids"]] for text in texts],
        "fields": {"number": numbers},
    }


def data(rows: int = ROWS, batch: int = BATCH, rank: int = 0, ranks: int = 1) -> DataLoader[Any]:
    """In the same order every time, dealt out to ranks one by one."""
    return DataLoader([*range(rank, rows, ranks)], batch_size=batch, collate_fn=collate)  # type: ignore[arg-type]


class Diary(L.Callback):
    """Of each iteration, the prompts that were learned from, the ages of the tokens, and what was logged."""

    def __init__(self) -> None:
        self.learned: list[list[str]] = []
        self.ages: list[list[int]] = []
        self.rows: list[dict[str, float]] = []
        self.in_flight = -1

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, *_: Any) -> None:
        rollout = pl_module.last_rollout
        texts = build_tokenizer().batch_decode(rollout.prompts, skip_special_tokens=True)
        self.learned.append(texts[:: pl_module.config.group_size])
        if rollout.versions is not None:
            self.ages.append((pl_module.pipeline.version - rollout.versions[rollout.response_mask]).tolist())
        logged = trainer.callback_metrics.items()
        self.rows.append({name: float(value) for name, value in logged if not name.startswith(CLOCKS)})

    def on_train_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        self.in_flight = pl_module.backend.in_flight

    @property
    def all_learned(self) -> list[str]:
        return [text for texts in self.learned for text in texts]


def fit(
    ppo: PPOModule, loader: Any = None, strategy: Any = "hybrid_deepspeed", also: Any = (), **arguments: Any
) -> Diary:
    diary = Diary()
    arguments = {"max_epochs": 1} | arguments
    resume, validation = arguments.pop("resume", None), arguments.pop("validation", None)
    trainer = quiet_trainer(strategy, callbacks=[diary, *also], **arguments)
    trainer.fit(ppo, data() if loader is None else loader, validation, ckpt_path=resume)
    return diary


@pytest.mark.parametrize("staleness", [1, 2, 3])
def test_no_token_is_older_than_it_may_be_and_each_prompt_is_learned_from_once(staleness: int) -> None:
    diary = fit(module(staleness))
    assert sorted(diary.all_learned) == sorted(TEXTS)
    assert max(max(ages) for ages in diary.ages) == staleness  # as old as allowed, and no older
    assert diary.in_flight == 0
    for ages, row in zip(diary.ages, diary.rows, strict=True):
        assert row["rollout/staleness_max"] == max(ages)
        assert row["rollout/staleness_mean"] == pytest.approx(sum(ages) / len(ages))


def test_one_step_off_policy_learns_from_the_batches_in_their_order() -> None:
    diary = fit(module(1))
    assert diary.learned == [TEXTS[at : at + BATCH] for at in range(0, ROWS, BATCH)]
    assert [max(ages) for ages in diary.ages] == [0, 1, 1, 1, 1]  # nothing was asked for before the first
    assert [row["rollout/carried_over"] for row in diary.rows] == [0] * 5


def test_what_takes_long_is_carried_over_and_counted() -> None:
    diary = fit(module(3))
    learned: set[str] = set()
    for step, (texts, row) in enumerate(zip(diary.learned, diary.rows, strict=True)):
        learned |= {*texts}
        assert row["rollout/carried_over"] == len({*TEXTS[: BATCH * (step + 1)]} - learned)
    assert max(row["rollout/carried_over"] for row in diary.rows) == 2
    assert max(row["rollout/interrupted"] for row in diary.rows) > 0
    assert diary.rows[-1]["rollout/carried_over"] == 0


def test_responses_to_a_prompt_stay_together() -> None:
    diary = fit(module(2, n=2))
    assert sorted(diary.all_learned) == sorted(TEXTS)
    assert max(max(ages) for ages in diary.ages) == 2


def test_a_short_last_batch_is_learned_from_once_as_well() -> None:
    diary = fit(module(2), data(rows=10), max_epochs=2)
    assert [len(texts) for texts in diary.learned] == [4, 4, 2] * 2
    assert sorted(diary.all_learned) == sorted(TEXTS[:10] * 2)


@pytest.mark.parametrize("limit", [{"max_steps": 3}, {"limit_train_batches": 3}])
def test_nothing_is_asked_for_that_no_iteration_will_learn_from(limit: dict[str, Any]) -> None:
    ppo = module(2)
    diary = fit(ppo, **limit)
    backend: Any = ppo.backend
    assert len(backend.submitted) == 3 * BATCH
    assert sorted(diary.all_learned) == sorted(TEXTS[: 3 * BATCH])


def test_without_a_change_of_weights_it_is_the_run_that_takes_turns() -> None:
    still = {"actor_lr": 1e-30, "critic_lr": 1e-30, "kl_coef": 0.1}
    ahead, in_turns = (fit(module(staleness, **still)).rows for staleness in (1, 0))
    for one, other in zip(ahead, in_turns, strict=True):
        assert other == {name: value for name, value in one.items() if name in other}
        assert one["rollout/importance_weight_mean"] == pytest.approx(1.0, abs=1e-5)


def test_weights_and_log_probs_are_those_of_the_weights_that_drew_each_token(monkeypatch: pytest.MonkeyPatch) -> None:
    """Recomputed by hand, from the weights that the backend was given at each version."""
    gained: list[tuple[int, Any, Any]] = []
    gain = ppo_file.gain_experience

    def spied(of: PPOModule, rollout: Any, *arguments: Any) -> Any:
        experience = gain(of, rollout, *arguments)
        assert of.pipeline is not None
        gained.append((of.pipeline.version, rollout, experience))
        return experience

    monkeypatch.setattr(ppo_file, "gain_experience", spied)
    ppo = module(2, actor_lr=3e-2)
    diary = fit(ppo)
    backend: Any = ppo.backend
    model = copy.deepcopy(backend.model)

    def logprobs(version: int, tokens: torch.Tensor) -> torch.Tensor:
        model.load_state_dict(backend.weights[version])
        with torch.no_grad():
            scores = model(tokens[None]).logits[0].log_softmax(-1)
        return torch.cat([scores.new_zeros(1), scores[:-1].gather(1, tokens[1:, None])[:, 0]])

    older = 0
    for (now, rollout, experience), row in zip(gained, diary.rows, strict=True):
        capped = total = 0.0
        for number, tokens in enumerate(rollout.tokens):
            real, drawn = rollout.attention_mask[number], rollout.response_mask[number]
            current = torch.zeros(len(tokens))
            current[real] = logprobs(now, tokens[real])
            sampling = torch.zeros(len(tokens))
            for version in set(rollout.versions[number][drawn].tolist()):
                by = torch.zeros(len(tokens))
                by[real] = logprobs(version, tokens[real])
                sampling = torch.where(rollout.versions[number] == version, by, sampling)
                older += version < now
            close = {"rtol": 1e-4, "atol": 1e-5}
            torch.testing.assert_close(rollout.sampling_logprobs[number][drawn], sampling[drawn], **close)
            torch.testing.assert_close(experience.old_logprobs[number][drawn], current[drawn], **close)
            ratio = (current - sampling).exp()
            expected = ratio.clamp(max=2.0)[drawn]
            torch.testing.assert_close(experience.weights[number][drawn], expected, rtol=1e-3, atol=1e-4)
            capped, total = capped + float((ratio[drawn] >= 2.0).sum()), total + float(expected.sum())
        tokens_drawn = int(rollout.response_mask.sum())
        assert row["rollout/importance_weight_mean"] == pytest.approx(total / tokens_drawn, rel=1e-3)
        assert row["rollout/importance_capped"] == pytest.approx(capped / tokens_drawn)
    assert older > 5


# ---- what happens in between -----------------------------------------------------------------------------------------


def test_an_evaluation_in_between_leaves_what_is_in_flight_alone() -> None:
    evaluated = fit(module(2), validation=data(rows=4), val_check_interval=2)
    assert "val/score" in evaluated.rows[-1] or any(name.startswith("val") for name in evaluated.rows[-1])
    undisturbed = fit(module(2))
    assert evaluated.learned == undisturbed.learned
    for one, other in zip(undisturbed.rows, evaluated.rows, strict=True):
        assert one == {name: value for name, value in other.items() if name in one}


def test_engines_that_sleep_meanwhile_change_nothing() -> None:
    asleep = ("optimizer", "gradients", "master_weights", "weights", "kv_cache", "frozen_models")
    strategy = HybridDeepSpeedStrategy(sleep=dict.fromkeys(asleep, True))
    assert fit(module(2), strategy=strategy).rows == fit(module(2)).rows


class StopAfter(L.Callback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        trainer.should_stop = trainer.global_step >= self.step


def test_it_is_said_how_many_prompts_were_in_flight_when_training_was_stopped(caplog: pytest.LogCaptureFixture) -> None:
    ppo = module(2)
    diary = fit(ppo, also=(StopAfter(2),), min_epochs=0)
    backend: Any = ppo.backend
    assert len(diary.learned) == 2
    assert (diary.in_flight, backend.closed) == (BATCH, 1)
    (said,) = [record.getMessage() for record in caplog.records if "in flight" in record.getMessage()]
    assert f"the {BATCH} prompts whose responses were in flight were never learned from" in said


def test_an_engine_that_fails_ends_the_run_and_is_closed() -> None:
    ppo = module(2)
    backend: Any = ppo.backend
    wait = backend.wait

    def fail_later(keys: Any, count: int) -> list[int]:
        if backend.version == 2:
            raise RolloutError("engine 0 died twice")
        return wait(keys, count)

    backend.wait = fail_later
    with pytest.raises(RolloutError, match="engine 0 died twice"):
        fit(ppo)
    assert backend.closed == 1


# ---- going on from a checkpoint --------------------------------------------------------------------------------------


class SaveAt(L.Callback):
    """Save when a step has ended, or within the step after it, before its experience is gained."""

    def __init__(self, step: int, path: Path, within: bool = False) -> None:
        self.step, self.path, self.within = step, path, within

    def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        def save(phase: str) -> None:
            if phase == "experience" and trainer.global_step == self.step:
                trainer.save_checkpoint(self.path)

        if self.within:
            pl_module.phases.listeners.append(save)

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        if trainer.global_step == self.step and not self.within:
            trainer.save_checkpoint(self.path)


@pytest.mark.parametrize(
    ("staleness", "within"), [(3, False), (3, True), pytest.param(1, True, marks=pytest.mark.slow)]
)
def test_a_resumed_epoch_learns_from_each_prompt_once(staleness: int, within: bool, tmp_path: Path) -> None:
    path = tmp_path / "saved.ckpt"
    whole = fit(module(staleness), also=(SaveAt(2, path, within),))
    carried_over = whole.rows[1]["rollout/carried_over"]
    assert carried_over >= (1 if staleness > 1 else 0)
    resumed = fit(module(staleness), resume=path)
    learned = [text for texts in whole.learned[:2] for text in texts] + resumed.all_learned
    assert sorted(learned) == sorted(TEXTS)
    assert len(resumed.learned) == 3
    assert max(max(ages) for ages in resumed.ages) <= staleness


@pytest.mark.slow
def test_a_run_that_takes_turns_says_what_of_a_checkpoint_it_leaves_out(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "saved.ckpt"
    whole = fit(module(3), also=(SaveAt(2, path),))
    carried_over = int(whole.rows[1]["rollout/carried_over"])
    resumed = fit(module(0), resume=path)
    assert resumed.learned == [TEXTS[at : at + BATCH] for at in range(2 * BATCH, ROWS, BATCH)]
    assert f"the checkpoint holds {carried_over} prompts that were carried over" in caplog.text


# ---- two ranks -------------------------------------------------------------------------------------------------------


def train_on_two_ranks(folder: str) -> None:
    """Entry point of a rank."""
    torch.set_num_threads(1)
    rank = int(os.environ["RANK"])
    path = Path(folder) / "saved.ckpt"

    def on_two(saves: Any = (), **arguments: Any) -> Diary:
        loader = data(batch=BATCH // 2, rank=rank, ranks=2)
        return fit(module(2), loader, also=saves, devices=2, **arguments)

    whole = on_two((SaveAt(2, path),))
    of_both = of_all_ranks((whole.learned, whole.ages, whole.rows))
    assert len(of_both) == 2
    assert sorted(text for learned, _, _ in of_both for texts in learned for text in texts) == sorted(TEXTS)
    assert of_both[0][2] == of_both[1][2]  # figures are the same on all ranks
    oldest = [max(max(ages[step]) for _, ages, _ in of_both) for step in range(5)]
    assert [row["rollout/staleness_max"] for row in whole.rows] == oldest
    assert max(oldest) == 2
    assert whole.rows[1]["rollout/carried_over"] >= 1
    before = [text for learned, _, _ in of_both for texts in learned[:2] for text in texts]
    resumed = on_two(resume=path)
    after = [text for texts in of_all_ranks(resumed.all_learned) for text in texts]
    assert sorted(before + after) == sorted(TEXTS)
    if rank == 0:
        (Path(folder) / "before.txt").write_text("\n".join(before))


def test_two_ranks_learn_from_each_prompt_once_and_one_goes_on_for_both(run_ranks: Any, tmp_path: Path) -> None:
    run_ranks(train_on_two_ranks, 2, str(tmp_path), timeout=300)
    before = (tmp_path / "before.txt").read_text().splitlines()
    resumed = fit(module(2), resume=tmp_path / "saved.ckpt")
    assert len(resumed.learned) == 3
    assert sorted(before + resumed.all_learned) == sorted(TEXTS)


# ---- what is refused -------------------------------------------------------------------------------------------------


def test_settings_that_cannot_go_together_are_refused() -> None:
    rollout = RolloutConfig(**SEPARATE, max_staleness=1)
    with pytest.raises(ConfigError, match=r"max_staleness = 1: .* use backend=vllm with vllm.colocate=false"):
        RolloutConfig(max_staleness=1)
    with pytest.raises(ConfigError, match=r"max_staleness = 2: .* use backend=vllm with vllm.colocate=false"):
        RolloutConfig(backend="vllm", max_staleness=2)
    with pytest.raises(ConfigError, match=r"algorithm.importance_cap = None: needed with rollout.max_staleness=1"):
        PPOModule(tiny_policy(), numbered, PPOConfig(), rollout, build_tokenizer())
    with pytest.raises(
        ConfigError, match=r"old_logprobs='rollout' is not possible: .*max_staleness=1 .* older weights"
    ):
        PPOModule(tiny_policy(), numbered, PPOConfig(old_logprobs="rollout"), rollout, build_tokenizer())
    grouped = GRPOConfig(importance_cap=2.0, groups=2)
    with pytest.raises(ConfigError, match=r"algorithm.groups = 2: waits for a batch .* leave one of them out"):
        PPOModule(tiny_policy(), numbered, grouped, rollout, build_tokenizer())


def test_a_backend_that_takes_turns_is_refused() -> None:
    ppo = module(1)
    ppo.backend = native_module().backend
    with pytest.raises(ConfigError, match=r"rollout.max_staleness = 1: NativeRollout cannot generate beside training"):
        fit(ppo)


def test_a_loader_that_cannot_be_looked_ahead_in_is_refused() -> None:
    class Endless(torch.utils.data.IterableDataset[Any]):
        def __iter__(self) -> Any:
            return iter([0, 1, 2, 3] * 4)

    with pytest.raises(ConfigError, match="looking one batch ahead needs one training loader that has a length"):
        fit(module(1), DataLoader(Endless(), batch_size=4, collate_fn=collate))


@pytest.mark.slow
def test_a_policy_learns_one_step_off_policy_what_its_reward_prefers() -> None:
    def few_words(prompts: list[str], responses: list[str], number: list[int]) -> list[float]:
        return [response.split().count("warm") / max(len(response.split()), 1) for response in responses]

    rollout = RolloutConfig(**SEPARATE, max_new_tokens=LONGEST, max_staleness=1)
    config = PPOConfig(actor_lr=3e-3, critic_lr=3e-3, kl_coef=0.0, importance_cap=2.0, micro_batch_size=16)
    ppo = PPOModule(tiny_policy(), few_words, config, rollout, build_tokenizer())
    ppo.backend = ScriptedBackend(ppo.actor, LONGEST, ppo._ends)
    rows = fit(ppo, data(rows=16, batch=16), max_epochs=40).rows
    first, last = (sum(row["reward/score"] for row in part) / 5 for part in (rows[:5], rows[-5:]))
    assert first < 0.1
    assert last > 0.5
