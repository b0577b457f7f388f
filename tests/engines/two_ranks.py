"""Run by two real ranks: PPO updates on given rollouts, and generation that stops at different lengths."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_hybrid import HybridDeepSpeedStrategy, PPOConfig, PPOModule, RolloutConfig
from lightning_hybrid.algorithms import ALGORITHMS
from lightning_hybrid.data.task import build_tokenizer
from lightning_hybrid.rollout import Rollout, RolloutBackend
from tests.helpers import SHARD_EVERYTHING, quiet_trainer, tiny_policy, weights_of

ROWS, WIDTH, PROMPT = 8, 14, 5


def given_rollout() -> Rollout:
    """Eight ragged responses to ragged prompts, the same wherever it is called."""
    generator = torch.Generator().manual_seed(3)
    tokens = torch.randint(4, 40, (ROWS, WIDTH), generator=generator)
    prompt_lengths = torch.tensor([5, 4, 3, 5, 2, 5, 1, 4])
    response_lengths = torch.tensor([9, 3, 7, 1, 9, 5, 2, 8])
    time = torch.arange(WIDTH)
    prompt_mask = (time < PROMPT) & (time >= (PROMPT - prompt_lengths)[:, None])
    response_mask = (time >= PROMPT) & (time < (PROMPT + response_lengths)[:, None])
    tokens = tokens.masked_fill(~(prompt_mask | response_mask), 0)
    zeros = torch.zeros(ROWS, WIDTH)
    return Rollout(tokens, prompt_mask, response_mask, zeros, zeros, tuple("eos" for _ in range(ROWS)))


class GivenRollouts(RolloutBackend):
    """A backend that answers each rank with its rows of the same rollout."""

    def __init__(self, rank: int, world_size: int) -> None:
        self.rows = torch.arange(ROWS).chunk(world_size)[rank]

    def generate(self, engine: Any, prompts: Sequence[Any], **_: Any) -> Rollout:
        whole, rows = given_rollout(), self.rows
        fields = ("tokens", "prompt_mask", "response_mask", "policy_logprobs", "sampling_logprobs")
        reasons = tuple(whole.finish_reasons[i] for i in rows.tolist())
        return Rollout(*(getattr(whole, name)[rows] for name in fields), reasons)


def reward(prompts: list[str], responses: list[str]) -> list[float]:
    return [float(len(response)) / 10 for response in responses]


def update(stage: int, world_size: int, **changes: Any) -> tuple[Tensor, Tensor, dict[str, float]]:
    """Two PPO iterations on the given rollout: actor's weights, critic's weights, the last figures."""
    tokenizer = build_tokenizer()
    settings = {"actor_lr": 1e-3, "critic_lr": 1e-3, "epochs": 2, "micro_batch_size": 2, "reward_clip": None}
    # Ranks score different numbers of tokens: with small chunks, different numbers of head calls.
    settings |= {"logprob_chunk": 4}
    module = PPOModule(
        tiny_policy(), reward, PPOConfig(**settings | changes), RolloutConfig(max_new_tokens=9), tokenizer
    )
    strategy = HybridDeepSpeedStrategy(stage=stage, config=SHARD_EVERYTHING if stage == 3 else None)
    trainer = quiet_trainer(strategy, devices=world_size, max_steps=2)
    module.backend = GivenRollouts(strategy.global_rank, world_size)
    rows = ROWS // world_size
    loader = DataLoader(range(ROWS), batch_size=rows, collate_fn=lambda i: {"prompt_ids": i, "prompts": [""] * len(i)})
    trainer.fit(module, loader)
    figures = {name: float(value) for name, value in trainer.callback_metrics.items()}
    return weights_of(module.actor), weights_of(module.critic), figures


def group_update(name: str, stage: int, world_size: int) -> tuple[Tensor, dict[str, float]]:
    """Two iterations of an algorithm without a critic on the given rollout, groups of two: weights, last figures."""
    settings = {"actor_lr": 1e-3, "epochs": 2, "micro_batch_size": 2, "group_size": 2, "logprob_chunk": 4}
    config = ALGORITHMS[name](**settings)
    module = PPOModule(tiny_policy(), reward, config, RolloutConfig(max_new_tokens=9), build_tokenizer())
    strategy = HybridDeepSpeedStrategy(stage=stage, config=SHARD_EVERYTHING if stage == 3 else None)
    trainer = quiet_trainer(strategy, devices=world_size, max_steps=2)
    module.backend = GivenRollouts(strategy.global_rank, world_size)
    prompts = ROWS // 2 // world_size
    batch = {"prompt_ids": range(prompts), "prompts": [""] * prompts}
    trainer.fit(module, DataLoader([batch] * 2, batch_size=None))  # type: ignore[arg-type]
    return weights_of(module.actor), {name: float(value) for name, value in trainer.callback_metrics.items()}


def save_group_updates(folder: str, world_size: int, names: list[str], stage: int) -> None:
    """Entry point of a rank: write what each algorithm ended with."""
    for name in names:
        weights, figures = group_update(name, stage, world_size)
        if torch.distributed.get_rank() == 0:
            torch.save({"weights": weights, "figures": figures}, Path(folder) / f"{name}.pt")


def save_updates(folder: str, world_size: int, stages: list[int]) -> None:
    """Entry point of a rank: write what each stage ended with."""
    for stage in stages:
        actor, critic, figures = update(stage, world_size)
        if torch.distributed.get_rank() == 0:
            torch.save({"actor": actor, "critic": critic}, Path(folder) / f"{world_size}-{stage}.pt")
            (Path(folder) / f"{world_size}-{stage}.json").write_text(json.dumps(figures))


def generate_ragged(pin: bool) -> None:
    """Entry point of a rank: ranks generate to different lengths at ZeRO-3, then train; print what each drew."""
    from lightning_hybrid.engines import backward, build_engine, engine_config, prepare_deepspeed

    prepare_deepspeed("cpu")
    import deepspeed

    deepspeed.init_distributed("gloo", verbose=False)
    rank = torch.distributed.get_rank()
    policy, reference = tiny_policy(), tiny_policy()
    optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-2)
    config = engine_config(
        stage=3, precision="32-true", hybrid_engine={"pin_parameters": pin}, overrides=SHARD_EVERYTHING
    )
    torch.manual_seed(rank)
    stream = torch.get_rng_state()
    engine = build_engine(policy, optimizer, config, hybrid=True)
    assert torch.equal(stream, torch.get_rng_state()), "the engine overwrote this rank's random state"
    prompt = torch.tensor([[1, 10, 20]])
    mask = torch.ones_like(prompt)
    arguments = {"attention_mask": mask, "max_new_tokens": 3 + 9 * rank, "do_sample": False, "eos_token_id": None}
    for _ in range(2):
        engine.eval()
        drawn = engine.generate(prompt, pad_token_id=0, **arguments)
        expected = reference.model.generate(prompt, pad_token_id=0, **arguments)
        assert torch.equal(drawn, expected), (drawn, expected)
        engine.train()
        backward(
            -policy(drawn[:, :6], torch.ones(1, 6).bool(), torch.tensor([[False] + [True] * 5])).logprobs.sum(),
            [engine],
        )
        engine.step()
        reference.load_state_dict(_whole_state(policy))
    print("drew", drawn.shape[1])


def _whole_state(module: torch.nn.Module) -> dict[str, Tensor]:
    from lightning_hybrid.engines import gathered

    with gathered(module):
        return {name: value.clone() for name, value in module.state_dict().items()}


def sample_in_ppo(folder: str, world_size: int) -> None:
    """Entry point of a rank: two PPO iterations on eight prompts, sampled by the engine; write what was said."""
    responses, weights = sampled_in_ppo(world_size)
    if torch.distributed.get_rank() == 0:
        torch.save(weights, Path(folder) / "weights.pt")
    (Path(folder) / f"responses-{torch.distributed.get_rank()}.json").write_text(json.dumps(responses))


def sampled_in_ppo(world_size: int) -> tuple[list[list[list[int]]], Tensor]:
    """This rank's responses of each iteration, and the actor's weights in the end."""
    settings = PPOConfig(actor_lr=1e-3, critic_lr=1e-3, micro_batch_size=2, reward_clip=None)
    module = PPOModule(tiny_policy(), reward, settings, RolloutConfig(max_new_tokens=9), build_tokenizer())
    strategy = HybridDeepSpeedStrategy(stage=2)
    trainer = quiet_trainer(strategy, devices=world_size, max_steps=2)
    mine = [list(range(3, 5 + i)) for i in range(ROWS)][strategy.global_rank :: world_size]
    batch = {"prompt_ids": mine, "prompts": [""] * len(mine)}
    said: list[list[list[int]]] = []
    sample = module.roll_out

    def heard(*arguments: Any, **named: Any) -> Rollout:
        rollout = sample(*arguments, **named)
        said.append(rollout.responses)
        return rollout

    module.roll_out = heard  # type: ignore[method-assign]
    trainer.fit(module, DataLoader([batch] * 2, batch_size=None))  # type: ignore[arg-type]
    return said, weights_of(module.actor)
