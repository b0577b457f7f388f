"""Run by two real ranks that share one model during generation."""

from __future__ import annotations

from typing import Any

import torch

from lightning_hybrid.containers import Decoder
from lightning_hybrid.engines import prepare_deepspeed
from lightning_hybrid.errors import RolloutError, StrategyError
from lightning_hybrid.generation import SamplingParams, generate, memory
from lightning_hybrid.models import Policy
from tests.engines.hybrids import failing_at_the_third_call, hybrid, step, whole
from tests.models.test_policy import family

# The ranks of a group hold different numbers of prompts, of different lengths.
PROMPTS = [[[5, 10, 20], [7, 8], [9]], [[4, 5, 6, 7, 8, 9, 10]]]
INDICES = [[0, 1, 2], [3]]


def start() -> int:
    prepare_deepspeed("cpu")
    import deepspeed

    deepspeed.init_distributed("gloo", verbose=False)
    return torch.distributed.get_rank()


def generate_shared(plan: list[tuple[str, int]]) -> None:
    """Entry point of a rank: two ranks draw what one alone would, for each family and ZeRO stage, step after step."""
    rank = start()
    for name, stage in plan:
        policy, alone = Policy(family(name)), Policy(family(name))
        engine = hybrid(policy, stage, inference_tp_size=2, tp_gather_partition_size=1)
        for seed in range(2):
            step(engine, policy, seed=seed)
            alone.load_state_dict(whole(policy))
            for temperature in (0.0, 1.0):
                compare(engine, alone.model, SamplingParams(8, temperature=temperature, n=2, eos_ids=(3,)), seed, rank)
        held = engine.extra_weight_bytes
        model = sum(getattr(p, "ds_numel", p.numel()) * p.element_size() for p in policy.parameters())
        assert held < model if stage == 3 else held == 0, (name, stage, held, model)
    refuse()
    stop_together()
    share_unequal_memory()
    print("same")


def compare(engine: Any, alone: Any, sampling: SamplingParams, seed: int, rank: int) -> None:
    engine.eval()
    rollout = engine.sample(PROMPTS[rank], sampling, seed, INDICES[rank])
    expected = generate(alone, [prompt for prompts in PROMPTS for prompt in prompts], sampling, seed)
    rows = slice(0, 6) if rank == 0 else slice(6, 8)
    assert rollout.prompts == expected.prompts[rows]
    assert rollout.responses == expected.responses[rows]
    for got, wanted in zip(rollout.logprobs, expected.logprobs[rows], strict=True):
        torch.testing.assert_close(torch.tensor(got), torch.tensor(wanted), rtol=1e-4, atol=1e-5)


def stop_together() -> None:
    """At ZeRO-3 one rank is given what it cannot do: every rank raises, and all can go on."""
    rank = torch.distributed.get_rank()
    for pin in (True, False):
        policy = Policy(family("llama"))
        engine = hybrid(policy, 3, pin_parameters=pin)
        for prompts in ([[5] * (3 + 90 * rank)], [[5], []][rank : rank + 1]):
            engine.eval()
            try:
                engine.sample(prompts, SamplingParams(4), seed=0)
            except RolloutError as error:
                print("stopped:", type(error).__name__)
            assert engine.module.training
        engine.eval()
        assert len(engine.sample([[5]], SamplingParams(4, eos_ids=()), seed=0).responses[0]) == 4
        break_on_the_second_rank(engine, rank) if not pin else None
        step(engine, policy)


def break_on_the_second_rank(engine: Any, rank: int) -> None:
    """Layer by layer, one rank fails in the middle of the loop."""
    original = Decoder.logits
    if rank == 1:
        Decoder.logits = failing_at_the_third_call(original)  # type: ignore[method-assign]
    engine.eval()
    try:
        engine.sample([[5]], SamplingParams(8, eos_ids=()), seed=0)
    except (RolloutError, KeyError) as error:
        print("broke:", type(error).__name__)
    finally:
        Decoder.logits = original  # type: ignore[method-assign]


def share_unequal_memory() -> None:
    """A rank with less room: ranks that share a model generate as many rows at once as the poorest can."""
    policy, alone = Policy(family("llama")), Policy(family("llama"))
    engine = hybrid(policy, 2, inference_tp_size=2)
    rank = torch.distributed.get_rank()
    free, memory.free_bytes = memory.free_bytes, lambda *_: [10_000_000, 2 * 32 * 2 * 2 * 8 * 4 + 1][rank]
    compare(engine, alone.model, SamplingParams(8, n=2, eos_ids=(3,)), 0, rank)
    memory.free_bytes = free


def refuse() -> None:
    """Group sizes that do not fit, and ranks that would draw differently."""
    for size in (3, 2):
        try:
            engine = hybrid(Policy(family("llama")), 2, inference_tp_size=size)
            engine.eval()
            engine.sample([[5]], SamplingParams(2), seed=torch.distributed.get_rank())
        except StrategyError as error:
            print(error)
