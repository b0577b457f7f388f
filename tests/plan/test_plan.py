"""The plan on paper: figures worked out by hand, and what settings do to them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_hybrid.config import PlanRun, validate
from lightning_hybrid.errors import ConfigError
from lightning_hybrid.plan import HOST, Plan, advise, make_plan, render
from tests.plan.plans import CPU_RUN, GPU_RUN, LLAMA, plan_of

GIB = 2**30
LLAMA_70B = LLAMA | {
    "vocab_size": 128256,
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "max_position_embeddings": 8192,
}


def seventy_billion(folder: Path, **strategy: Any) -> Plan:
    """Actor, critic, reference and reward of 70B each on 6 nodes of 8 GPUs of 80 GiB."""
    (folder / "config.json").write_text(json.dumps(LLAMA_70B))
    run = {
        "model": {"path": str(folder)},
        "reward": {"path": str(folder)},
        "algorithm": {"micro_batch_size": 1},
        "data": {"path": "unread", "batch_size": 8},
        "trainer": {"accelerator": "gpu", "devices": 8, "num_nodes": 6, "precision": "bf16-mixed", "max_steps": 1},
        "strategy": {
            "name": "hybrid_deepspeed_stage_3",
            "hybrid_engine": {"inference_tp_size": 4, "max_out_tokens": 512},
        }
        | strategy,
        "device_memory_gib": 80.0,
        "output_dir": "outputs",
    }
    return make_plan(validate(PlanRun, run))


def in_gib(plan: Plan, phase: str, **which: str) -> float:
    return plan.peaks[phase].bytes(**which) / GIB


def test_70b_on_48_gpus_as_worked_out_by_hand(tmp_path: Path) -> None:
    # A layer: q and o 2 · 8192², k and v 2 · 8192 · 1024, MLP 3 · 8192 · 28672, two norms of 8192:
    #   134,217,728 + 16,777,216 + 704,643,072 + 16,384 = 855,654,400 weights; 80 of them: 68,452,352,000.
    # Embedding and head: 128256 · 8192 = 1,050,673,152 each; the last norm 8192.
    #   Policy: 68,452,352,000 + 2 · 1,050,673,152 + 8,192 = 70,553,706,496.
    #   Scalar model: a head of 8192 instead: 69,503,041,536.
    # A rank has 1/48: 1,469,868,885 and 1,447,980,032 weights, here in GiB (2^30):
    #   bf16 weights, and gradients         2 bytes   2.738   2.697
    #   fp32 master weights                 4 bytes   5.476   5.394
    #   AdamW's two moments                 8 bytes  10.951  10.788
    # and 500,000,000 elements of a reduce bucket, 0.931 GiB, in each of the two engines that train; 50,000,000 weights
    # arrive at a time in a buffer of 0.093 GiB.
    plan = seventy_billion(tmp_path)
    assert {role: network.numel for role, network in plan.setup.networks.items()} == {
        "actor": 70_553_706_496,
        "critic": 69_503_041_536,
        "reference": 70_553_706_496,
        "reward": 69_503_041_536,
    }
    assert in_gib(plan, "train", kind="master weights") == pytest.approx(5.476 + 5.394, abs=0.002)
    assert in_gib(plan, "train", kind="optimizer states") == pytest.approx(10.951 + 10.788, abs=0.002)
    assert in_gib(plan, "train", kind="gradients") == pytest.approx(2.738 + 2.697, abs=0.002)
    assert in_gib(plan, "train", kind="buffers") == pytest.approx(2 * 0.931 + 0.093, abs=0.002)
    # Weights in training: four shards, norms kept whole (161 of 8192: 0.0025 GiB each), and as many of the actor's as
    # ZeRO-3 lets live, 1,000,000,000 and 50,000,000 prefetched; an embedding of 1,050,673,152 is more: 1.957 GiB.
    assert in_gib(plan, "train", kind="weights") == pytest.approx(2 * (2.738 + 2.697) + 4 * 0.0025 + 1.957, abs=0.005)
    # Generation: a quarter of the actor, 17,638,426,624 weights, 32.85 GiB; and, while 8 units are gathered (the
    # embedding and 7 layers are the largest 8), 7,040,253,952 weights, 13.11 GiB.
    assert in_gib(plan, "generate", kind="weights") == pytest.approx(
        2 * (2.738 + 2.697) + 4 * 0.0025 + 32.85 + 13.11, abs=0.01
    )
    # In all 56.84 + 5.43 + 10.87 + 21.74 + 1.86 = 96.75 GiB before there is a KV cache: too much. Scoring and training
    # fit.
    assert in_gib(plan, "generate") == pytest.approx(96.8, abs=0.1)
    assert not plan.fits
    assert in_gib(plan, "score") < 80
    assert in_gib(plan, "train") < 80


def test_70b_fits_once_optimizer_states_sleep(tmp_path: Path) -> None:
    # 96.75 - 21.74 = 75.01 GiB leave 4.99; the KV cache takes up to 70% of it: of 512 tokens in 80 layers with two of
    # the eight key-value heads of 128, a row takes 512 · 80 · 2 · 2 · 128 · 2 bytes = 40 MiB; 32 rows (8 prompts
    # of 4 ranks) take 1.25 GiB. 18 prompts are read at once, 8192 // 448: 8064 tokens of 2 · 8192 + 4 · 28672 / 4
    # numbers of 2 bytes take 0.68 GiB, and their logits 3 · 18 · 128256 · 4 bytes, 0.03 GiB.
    plan = seventy_billion(tmp_path, sleep={"optimizer": True})
    assert plan.cache.bytes == 32 * 40 * 2**20
    assert in_gib(plan, "generate") == pytest.approx(75.01 + 1.25 + 0.68 + 0.03, abs=0.02)
    assert in_gib(plan, "generate", where=HOST) == pytest.approx(21.74, abs=0.01)
    assert plan.fits


@pytest.mark.parametrize(
    ("stage", "weights", "master", "states", "kept"),
    [(1, 1.0, 1 / 4, 1 / 4, 1.0), (2, 1.0, 1 / 4, 1 / 4, 1 / 4), (3, 1 / 4, 1 / 4, 1 / 4, 1 / 4)],
)
def test_each_stage_shards_more(stage: int, weights: float, master: float, states: float, kept: float) -> None:
    run = {"strategy": {"name": f"hybrid_deepspeed_stage_{stage}"}, "trainer": {"devices": 4}}
    plan = plan_of(GPU_RUN, **run)
    networks = plan.setup.networks
    elements = networks["actor"].numel + networks["critic"].numel
    step = next(moment for moment in plan.moments["train"] if moment.name == "the actor's gradients in fp32")
    assert step.bytes(kind="master weights") == pytest.approx(4 * elements * master, rel=1e-4)
    assert step.bytes(kind="optimizer states") == pytest.approx(8 * elements * states, rel=1e-4)
    # The fp32 copy of the rank's share is the actor's alone.
    assert step.bytes(kind="gradients") == pytest.approx(2 * elements * kept + networks["actor"].numel, rel=1e-4)
    small = sum(size for size in networks["reference"].sizes if size < 100_000) * 2 if stage == 3 else 0
    assert step.bytes(owner="reference") == pytest.approx(2 * networks["reference"].numel * weights + small, rel=1e-4)


def test_stage_0_keeps_one_copy_of_weights_and_no_second_one_for_the_optimizer() -> None:
    plan = plan_of(CPU_RUN, strategy={"name": "hybrid_deepspeed", "config": {"zero_optimization": {"stage": 0}}})
    assert plan.peaks["train"].bytes(kind="master weights") == 0
    assert plan_of(CPU_RUN).peaks["train"].bytes(kind="master weights") > 0


@pytest.mark.parametrize(
    ("setting", "kind", "awake"),
    [
        ("optimizer", "optimizer states", "train"),
        ("master_weights", "master weights", "train"),
        ("frozen_models", "weights", "score"),
        ("kv_cache", "KV cache", "generate"),
        ("gradients", "gradients", "train"),
        ("weights", "weights", "train"),
    ],
)
def test_what_sleeps_leaves_the_phases_that_do_not_need_it(setting: str, kind: str, awake: str) -> None:
    strategy = {"name": "hybrid_deepspeed_stage_3"}
    plan = plan_of(GPU_RUN, strategy=strategy)
    asleep = plan_of(GPU_RUN, strategy=strategy | {"sleep": {setting: True}})
    for phase in plan.peaks:
        before, after = plan.peaks[phase].bytes(kind=kind), asleep.peaks[phase].bytes(kind=kind)
        assert after == before if phase == awake else after <= before
    assert any(asleep.peaks[phase].bytes(kind=kind) < plan.peaks[phase].bytes(kind=kind) for phase in plan.peaks)


def test_on_a_cpu_sleep_moves_nothing_anywhere() -> None:
    asleep = plan_of(CPU_RUN, strategy={"sleep": {"optimizer": True, "frozen_models": True}})
    assert {phase: moment.bytes() for phase, moment in asleep.peaks.items()} == {
        phase: moment.bytes() for phase, moment in plan_of(CPU_RUN).peaks.items()
    }


def test_offload_moves_optimizer_and_master_weights_to_the_host() -> None:
    plan = plan_of(GPU_RUN, strategy={"name": "hybrid_deepspeed_stage_2_offload"})
    assert plan.peaks["train"].bytes(kind="optimizer states") == 0
    assert plan.peaks["train"].bytes(kind="optimizer states", where=HOST) > 0
    assert "Host memory: " in render(plan)


def test_a_function_as_reward_takes_nothing_and_a_model_its_weights(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    assert "reward" not in plan_of(CPU_RUN, reward={"function": "rewards:polite"}).setup.networks
    plan = plan_of(CPU_RUN, reward={"path": str(tmp_path)})
    networks = plan.setup.networks
    assert plan.peaks["train"].bytes(owner="reward") == 4 * networks["reward"].numel
    assert networks["critic"].config == networks["reward"].config


def test_the_kv_cache_holds_what_a_budget_allows() -> None:
    # 8 layers, keys and values, 8 heads of 64, capacity 192 (128 + 64 - 1, rounded up to 32s), fp32.
    slot = 8 * 2 * 8 * 64 * 192 * 4
    assert plan_of(CPU_RUN).cache.bytes == 8 * slot
    assert plan_of(CPU_RUN, rollout={"max_tokens_in_flight": 600}).cache.bytes == 3 * slot


def test_smaller_chunks_of_logits_and_smaller_micro_batches_take_less() -> None:
    def training(algorithm: dict[str, Any]) -> tuple[int, int]:
        peak = next(m for m in plan_of(GPU_RUN, algorithm=algorithm).moments["train"] if m.name.startswith("actor's"))
        return peak.bytes(kind="activations"), peak.bytes(kind="logits")

    activations, _ = training({"micro_batch_size": 4})
    fewer, _ = training({"micro_batch_size": 2})
    assert fewer < 0.6 * activations
    # Three times a chunk of logits: in bf16 and in fp32, the second divided by the temperature, and its exponentials.
    wide = {"model": {"architecture": LLAMA | {"vocab_size": 65536}}}
    whole, chunk = (
        plan_of(GPU_RUN, **wide, algorithm={"logprob_chunk": chunk}).moments["score"][0].bytes(kind="logits")
        for chunk in (256, 64)
    )
    assert chunk == whole / 4


def test_advice_names_settings_that_make_it_fit_and_what_each_saves() -> None:
    plan = plan_of(GPU_RUN, strategy={"name": "hybrid_deepspeed_stage_1"}, device_memory_gib=2.5)
    assert not plan.fits
    advice = advise(plan)
    assert [item.saved for item in advice if len(item.overrides) == 1] == sorted(
        (item.saved for item in advice if len(item.overrides) == 1), reverse=True
    )
    assert any(item.plan.fits for item in advice)
    report = render(plan, advice)
    assert "It does not fit" in report
    assert "then it fits" in report


@pytest.mark.parametrize("budget", [None, 600])
def test_advice_shares_a_model_only_between_ranks_that_its_key_value_heads_divide_over(budget: int | None) -> None:
    run = {
        "model": {"architecture": LLAMA | {"num_key_value_heads": 2}},
        "strategy": {"name": "hybrid_deepspeed_stage_3"},
        "trainer": {"devices": 8},
        "rollout": {"max_tokens_in_flight": budget},
        "device_memory_gib": 0.1,
    }
    overrides = [override for item in advise(plan_of(GPU_RUN, **run)) for override in item.overrides]
    sizes = {override for override in overrides if "inference_tp_size" in override}
    assert sizes == {"strategy.hybrid_engine.inference_tp_size=2"}


def test_a_model_shared_between_more_ranks_than_its_key_value_heads_divide_over_is_refused() -> None:
    run = {
        "model": {"architecture": LLAMA | {"num_key_value_heads": 2}},
        "strategy": {"name": "hybrid_deepspeed_stage_3", "hybrid_engine": {"inference_tp_size": 4}},
        "trainer": {"devices": 4},
    }
    with pytest.raises(ConfigError, match="inference_tp_size=4 does not divide the actor's 2 key-value heads"):
        plan_of(GPU_RUN, **run)


def test_the_host_has_room_for_all_that_ever_sleeps(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    sleep = {"optimizer": True, "weights": True, "frozen_models": True}
    plan = plan_of(GPU_RUN, reward={"path": str(tmp_path)}, strategy={"sleep": sleep})
    networks = plan.setup.networks
    states = 8 * (networks["actor"].numel + networks["critic"].numel)
    assert plan.host == pytest.approx(states + 2 * sum(network.numel for network in networks.values()), rel=1e-4)
    # Only between the rewards and the forward passes may all of them be asleep at once.
    held = {moment.name: moment.bytes(where=HOST) for moments in plan.moments.values() for moment in moments}
    assert held.pop("between rewards and forward passes") == plan.host
    assert max(held.values()) < plan.host


def test_ranks_are_counted_in_words() -> None:
    assert "; 1 rank, ZeRO-2;" in render(plan_of(CPU_RUN))
    assert "; 2 ranks, ZeRO-2;" in render(plan_of(CPU_RUN, trainer={"devices": 2}))


def test_prompts_are_as_long_as_the_settings_allow_unless_it_is_said() -> None:
    assert plan_of(CPU_RUN, prompt_tokens=None).setup.prompt == 512 - 64
    engine = {"hybrid_engine": {"max_out_tokens": 4096}}
    assert plan_of(CPU_RUN, prompt_tokens=None, strategy=engine).setup.prompt == 1024 - 64
    assert plan_of(CPU_RUN, prompt_tokens=100).setup.prompt == 100


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": {"architecture": {"model_type": "llama"}}}, "must have vocab_size: a plan reads no tokenizer"),
        ({"model": {"path": "./nowhere", "architecture": None}}, "model path './nowhere' does not exist"),
        ({"rollout": {"max_new_tokens": 511}, "prompt_tokens": None, "data": {"max_length": 400}}, "no prompt fits"),
    ],
)
def test_what_cannot_be_planned_is_refused_with_the_reason(changes: dict[str, Any], message: str) -> None:
    run = {name: value for name, value in CPU_RUN.items() if name != "model" or "model" not in changes}
    with pytest.raises(ConfigError, match=message):
        plan_of(run, **changes)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_a_gpu_that_is_not_here_needs_its_memory_told() -> None:
    with pytest.raises(ConfigError, match="set device_memory_gib"):
        plan_of(GPU_RUN, device_memory_gib=None)
