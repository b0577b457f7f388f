"""What sleeps is off the device, and training goes on from it to the last bit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from lightning_hybrid.config import SleepConfig
from lightning_hybrid.engines import build_engine, build_evaluation_engine, engine_config
from lightning_hybrid.engines.belongings import gradients_pending, trained_belongings
from lightning_hybrid.engines.memory import (
    PeakMemory,
    out_of_memory_in,
    readable,
    requested_bytes,
    resident_bytes,
)
from lightning_hybrid.engines.sleep import Sleeper, give_own_storage
from lightning_hybrid.errors import StrategyError
from lightning_hybrid.models import Policy
from lightning_hybrid.strategy.residency import Residency
from tests.engines.hybrids import hybrid, step, whole
from tests.helpers import SHARD_EVERYTHING, tiny_policy

CPU = torch.device("cpu")
EVERYTHING = SleepConfig(**dict.fromkeys(SleepConfig.model_fields, True))
PROMPT = torch.tensor([[5, 10, 20], [0, 7, 8]])
MASK = torch.tensor([[1, 1, 1], [0, 1, 1]])
STAGES = [
    ("32-true", 0),
    ("32-true", 1),
    ("32-true", 2),
    ("32-true", 3),
    ("bf16-mixed", 1),
    ("bf16-mixed", 2),
    pytest.param("bf16-mixed", 3, marks=pytest.mark.slow),
]
alone = pytest.mark.usefixtures("alone_in_group")


def drawn(engine: Any) -> torch.Tensor:
    engine.eval()
    return engine.generate(PROMPT, attention_mask=MASK, do_sample=False, max_new_tokens=6, pad_token_id=0)


def said(policy: Policy) -> torch.Tensor:
    """Log-probs of the prompts' last tokens."""
    return policy(PROMPT, MASK.bool(), torch.tensor([[False, True, True]] * 2)).logprobs


# ---- storages ----------------------------------------------------------------------------------------------------


def test_every_view_of_a_storage_is_right_again_after_sleep() -> None:
    flat = torch.arange(12.0)
    view, transposed = flat[4:8], flat.view(3, 4).t()
    sleeper = Sleeper(CPU)
    assert sleeper.sleep([view, flat])
    assert flat.untyped_storage().nbytes() == 0
    sleeper.wake([transposed])
    assert flat.tolist() == list(range(12))
    assert view.tolist() == [4, 5, 6, 7]
    assert transposed[1].tolist() == [1, 5, 9]


def test_sleeping_twice_and_waking_twice_change_nothing() -> None:
    x = torch.arange(3.0)
    sleeper = Sleeper(CPU)
    assert sleeper.sleep([x])
    assert not sleeper.sleep([x])
    sleeper.wake()
    sleeper.wake()
    assert x.tolist() == [0, 1, 2]
    assert sleeper.empty


def test_what_sleeps_may_settle_on_the_host_for_good() -> None:
    flat = torch.arange(6.0)
    view = flat[2:4]
    sleeper = Sleeper(CPU)
    sleeper.sleep([flat])
    sleeper.settle([flat, view])
    view.zero_()
    assert flat.tolist() == [0, 1, 0, 0, 4, 5]
    assert sleeper.empty


def test_gradients_wake_as_zeros() -> None:
    x = torch.ones(4)
    sleeper = Sleeper(CPU)
    sleeper.sleep([x], "zeros")
    sleeper.wake()
    assert x.tolist() == [0, 0, 0, 0]


def test_a_failure_to_go_to_sleep_leaves_everything_awake(monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = [torch.ones(4), torch.ones(5), torch.ones(6)]
    sleeper = Sleeper(CPU)
    monkeypatch.setattr(sleeper, "_host", failing_at_the_second_call(sleeper._host))
    with pytest.raises(MemoryError):
        sleeper.sleep(tensors)
    assert [int(tensor.sum()) for tensor in tensors] == [4, 5, 6]
    assert sleeper.empty


def test_a_failure_to_wake_keeps_the_values_until_there_is_room(monkeypatch: pytest.MonkeyPatch) -> None:
    from lightning_hybrid.engines import sleep

    tensors = [torch.ones(4), torch.ones(5), torch.ones(6)]
    sleeper = Sleeper(CPU)
    sleeper.sleep(tensors)
    with monkeypatch.context() as patch:
        patch.setattr(sleep, "_wake", failing_at_the_second_call(sleep._wake))
        with pytest.raises(MemoryError):
            sleeper.wake()
    assert int(tensors[0].sum()) == 4
    assert tensors[2].untyped_storage().nbytes() == 0
    sleeper.wake()
    assert [int(tensor.sum()) for tensor in tensors] == [4, 5, 6]


def failing_at_the_second_call(function: Callable[..., Any]) -> Callable[..., Any]:
    calls: list[Any] = []

    def call(*arguments: Any) -> Any:
        calls.append(arguments)
        if len(calls) == 2:
            raise MemoryError
        return function(*arguments)

    return call


def test_weights_on_a_mapped_file_get_memory_of_their_own_and_stay_tied(tmp_path: Path) -> None:
    save_file({"a": torch.arange(6.0).view(2, 3)}, tmp_path / "w.safetensors")
    loaded = load_file(tmp_path / "w.safetensors")["a"]
    assert not loaded.untyped_storage().resizable()
    first, second = nn.Parameter(loaded), nn.Parameter(loaded)
    give_own_storage([first, second])
    sleeper = Sleeper(CPU)
    sleeper.sleep([first, second])
    sleeper.wake()
    assert first.tolist() == loaded.tolist()
    assert first.data_ptr() == second.data_ptr()


def test_memory_elsewhere_is_left_alone() -> None:
    x = torch.ones(4)
    assert not Sleeper(torch.device("meta")).sleep([x])
    assert int(x.sum()) == 4


# ---- engines -----------------------------------------------------------------------------------------------------


@alone
@pytest.mark.parametrize(("precision", "stage"), STAGES)
def test_training_is_bit_identical_with_and_without_sleep(precision: str, stage: int) -> None:
    results, responses = [], []
    for sleeps in (False, True):
        policy = tiny_policy()
        engine = hybrid(policy, stage, precision)
        residency = Residency({"actor": engine}, {}, EVERYTHING if sleeps else None)
        residency.enter(None)
        for seed in range(4):
            residency.enter("score")
            residency.enter("generate", runs=["actor"])
            responses.append(drawn(engine))
            residency.enter("train")
            step(engine, policy, seed)
        results.append(whole(policy))
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])
    assert all(map(torch.equal, responses[:4], responses[4:]))


@alone
def test_base_weights_under_adapters_sleep_too() -> None:
    from tests.engines.test_lora import adapted

    policy = adapted("llama")
    engine = hybrid(policy, 2)
    residency = Residency({"actor": engine}, {}, EVERYTHING)
    before = drawn(engine)
    residency.enter("score")
    assert residency.bytes()["actor/weights"] == 0
    residency.enter("generate", runs=["actor"])
    assert torch.equal(drawn(engine), before)


@alone
@pytest.mark.parametrize(("precision", "stage"), STAGES)
def test_nothing_of_a_trained_engine_stays_in_phases_that_do_not_run_it(precision: str, stage: int) -> None:
    policy = tiny_policy()
    engine = hybrid(policy, stage, precision)
    residency = Residency({"actor": engine}, {}, EVERYTHING)
    drawn(engine)
    step(engine, policy)
    awake = residency.bytes()
    held = {"actor/weights", "actor/optimizer", "actor/kv_cache"} | ({"actor/master_weights"} if stage else set())
    assert held <= {owner for owner, size in awake.items() if size}
    residency.enter("score")
    assert set(residency.bytes().values()) == {0}
    residency.enter("train")
    assert residency.bytes() == awake | {"actor/kv_cache": 0}


@alone
@pytest.mark.parametrize("stage", [0, 2, 3])
def test_gradients_that_wait_for_a_step_do_not_sleep(stage: int) -> None:
    results = []
    for sleeps in (False, True):
        policy = tiny_policy()
        engine = hybrid(policy, stage)
        residency = Residency({"actor": engine}, {}, SleepConfig(gradients=sleeps))
        step(engine, policy)
        accumulate(engine, policy, seed=1)
        assert gradients_pending(engine, list(policy.parameters()))
        residency.enter("generate", runs=["actor"])
        drawn(engine)
        residency.enter("train")
        engine.train()
        step(engine, policy, seed=2)
        assert not gradients_pending(engine, list(policy.parameters()))
        results.append(whole(policy))
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])


def accumulate(engine: Any, policy: Policy, seed: int) -> None:
    step_ = engine.step
    engine.step = lambda: None
    step(engine, policy, seed)
    engine.step = step_


@alone
@pytest.mark.parametrize("stage", [0, 3])
def test_frozen_models_sleep_and_say_the_same_afterwards(stage: int) -> None:
    policy = tiny_policy().requires_grad_(False)
    config = engine_config(stage=stage, precision="32-true", overrides=SHARD_EVERYTHING if stage == 3 else None)
    model = build_evaluation_engine(policy, config, CPU)
    residency = Residency({}, {"reference": model}, SleepConfig(frozen_models=True))
    before = said(policy)
    residency.enter("train")
    assert residency.bytes() == {"reference/weights": 0}
    residency.enter("score", runs=["reference"])
    assert torch.equal(said(policy), before)


@alone
def test_weights_that_a_frozen_model_shares_with_a_trained_one_stay_awake() -> None:
    policy = tiny_policy()
    residency = Residency({"actor": hybrid(policy, 0)}, {"reference": policy}, SleepConfig(frozen_models=True))
    held = residency.bytes()
    residency.enter("train")
    assert residency.bytes() == held


@alone
def test_the_workspace_goes_when_weights_move_since_graphs_point_to_them() -> None:
    engine = hybrid(tiny_policy(), 1)
    residency = Residency({"actor": engine}, {}, SleepConfig(weights=True))
    drawn(engine)
    residency.enter("generate", runs=["actor"])
    assert engine._workspace is not None
    residency.enter("score")
    assert engine._workspace is None


@alone
@pytest.mark.filterwarnings("ignore")
def test_a_sleeping_model_refuses_to_run() -> None:
    policy, reference = tiny_policy(), tiny_policy()
    residency = Residency({"actor": hybrid(policy, 2)}, {"reference": reference}, EVERYTHING)
    residency.enter("generate", runs=["actor"])
    with pytest.raises(StrategyError, match=r"reference was run in phase 'generate', where reference/weights sleeps"):
        said(reference)
    with pytest.raises(StrategyError, match=r"reference was run in phase 'generate'"):
        reference.model.model(PROMPT)
    with pytest.raises(StrategyError, match=r"actor was trained in phase 'generate', where actor/\w+ sleeps"):
        said(policy)
    with torch.no_grad():
        said(policy)
    residency.enter("train", runs=["reference"])
    said(policy)
    said(reference)


@alone
def test_optimizer_states_offloaded_by_deepspeed_train_on_after_sleep() -> None:
    results = []
    for settings in (SleepConfig(), EVERYTHING):
        policy = tiny_policy()
        optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-2)
        engine = build_engine(policy, optimizer, engine_config(stage=2, precision="32-true", offload_optimizer=True))
        residency = Residency({"actor": engine}, {}, settings)
        for seed in range(2):
            residency.enter("train")
            step(engine, policy, seed)
            residency.enter(None)
        results.append(whole(policy))
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])


def train_with_and_without_sleep(stage: int) -> None:
    """Entry point of a rank."""
    from lightning_hybrid.engines import prepare_deepspeed

    prepare_deepspeed("cpu")
    import deepspeed

    deepspeed.init_distributed("gloo", verbose=False)
    test_training_is_bit_identical_with_and_without_sleep("32-true", stage)
    if stage:
        test_training_is_bit_identical_with_and_without_sleep("bf16-mixed", stage)
    print("the same")


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_two_ranks_train_bit_identically_with_and_without_sleep(stage: int, run_ranks: Any) -> None:
    assert all("the same" in output for output in run_ranks(train_with_and_without_sleep, 2, stage))


# ---- figures -----------------------------------------------------------------------------------------------------


@alone
def test_memory_is_counted_once_for_all_views_of_it() -> None:
    policy = tiny_policy()
    engine = hybrid(policy, 1)
    parameters = sum(p.numel() * 4 for p in policy.parameters())
    step(engine, policy)
    held = resident_bytes(trained_belongings("actor", engine), CPU)
    assert held["actor/weights"] == pytest.approx(parameters, rel=1e-3)
    assert held["actor/optimizer"] == 2 * held["actor/master_weights"] == 2 * held["actor/weights"]


def test_the_peak_of_a_phase_is_its_own() -> None:
    peak = PeakMemory(CPU)
    peak.start()
    before = peak.bytes()
    torch.ones(2**24)
    assert peak.bytes() - before > 50 * 2**20
    peak.start()
    assert peak.bytes() - before < 30 * 2**20


@pytest.mark.parametrize(
    ("message", "size"),
    [
        ("CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has", int(2.5 * 2**30)),
        ("DefaultCPUAllocator: can't allocate memory: you tried to allocate 4096 bytes. Error", 4096),
        ("Unable to allocate 7.11 PiB for an array", int(7.11 * 2**50)),
        ("no idea", None),
    ],
)
def test_what_an_allocation_asked_for_is_read_from_its_message(message: str, size: int | None) -> None:
    assert requested_bytes(RuntimeError(message)) == size


def test_only_allocations_that_failed_are_out_of_memory() -> None:
    wrapped = ValueError("wrapped")
    wrapped.__cause__ = MemoryError()
    assert out_of_memory_in(wrapped) is wrapped.__cause__
    assert out_of_memory_in(torch.OutOfMemoryError("CUDA out of memory"))
    assert out_of_memory_in(RuntimeError("shapes differ")) is None
    with pytest.raises(RuntimeError) as real:
        torch.empty(10**15)
    assert out_of_memory_in(real.value) is real.value


def test_bytes_are_written_as_people_read_them() -> None:
    assert [readable(size) for size in (5, 2048, 3 * 2**29)] == ["5 bytes", "2.0 KiB", "1.5 GiB"]
