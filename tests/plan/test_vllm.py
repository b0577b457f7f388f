"""The plan of runs that generate with vLLM: figures worked out by hand, each verdict, and what other processes take."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lightning_hybrid.config import PlanRun
from lightning_hybrid.config.run import compose_run
from lightning_hybrid.errors import ConfigError
from lightning_hybrid.plan import HOST, Plan, advise, make_plan, render
from lightning_hybrid.plan.vllm import GIB, VLLMEngine
from tests.conftest import RunRanks
from tests.plan.measuring import ENVIRONMENT
from tests.plan.measuring_vllm import measure_engine
from tests.plan.plans import CPU_RUN, GPU_RUN, LLAMA, plan_of

# A layer: 4 · 512² + 3 · 512 · 1376 + 2 · 512 = 3,163,136 weights; 8 of them, an embedding and a head of 8192 · 512
# each, and the last norm.
ACTOR = 8 * 3_163_136 + 2 * 8192 * 512 + 512
# 8 layers of keys and values of 8 heads of 64, in bf16, for a row of 128 + 64 tokens, which is 12 pages of 16.
ROW = 8 * 2 * 8 * 64 * 192 * 2


def with_vllm(run: dict[str, Any] = GPU_RUN, *, vllm: dict[str, Any] | None = None, **changes: Any) -> Plan:
    rollout = {"backend": "vllm", "vllm": vllm or {}} | changes.pop("rollout", {})
    return plan_of(run, rollout=rollout, **changes)


def engine_of(plan: Plan) -> VLLMEngine:
    assert plan.engine is not None
    return plan.engine


def test_an_engine_takes_its_share_of_the_device_as_worked_out_by_hand() -> None:
    # A GPU of 80 GiB: 16,384 tokens and 1,024 rows of a pass. A token takes 2 · 512 + 4 · 1376 elements inside a layer
    # (queries, keys, values and what attention says are 8 · 512: fewer), and a row 4 times 8192 logits in fp32.
    plan = with_vllm(vllm={"gpu_memory_utilization": 0.25})
    engine = engine_of(plan)
    assert engine.weights == 2 * ACTOR
    assert engine.activations == 16_384 * (2 * 512 + 4 * 1376) * 2
    assert engine.logits == 1024 * 4 * 8192 * 4
    assert engine.row == ROW
    assert engine.awake == 20 * GIB
    assert engine.rows == (20 * GIB - 2 * ACTOR - engine.activations - engine.logits) // ROW
    assert plan.cache.slots == 8
    peak = plan.peaks["generate"]
    assert peak.name == "vLLM generates"
    assert peak.bytes(owner="vLLM") == 20 * GIB
    native = plan_of(GPU_RUN).peaks["generate"]
    for kind in ("weights", "master weights", "optimizer states"):
        assert peak.bytes(kind=kind) - peak.bytes(owner="vLLM", kind=kind) == native.bytes(kind=kind)


def test_on_a_cpu_the_cache_is_what_is_given_and_nothing_sleeps() -> None:
    plan = with_vllm(CPU_RUN, vllm={"kv_cache_gib": 0.5})
    engine = engine_of(plan)
    assert engine.cache == GIB // 2
    assert engine.row == 2 * ROW  # fp32; 6 pages of 32 tokens
    # 8 rows of 128 tokens are read at once.
    assert engine.activations == 8 * 128 * (2 * 512 + 4 * 1376) * 4
    for phase, generates in (("generate", True), ("score", False), ("train", False)):
        passing = engine.activations + engine.logits if generates else 0
        assert plan.peaks[phase].bytes(owner="vLLM") == 4 * ACTOR + GIB // 2 + passing
    assert engine_of(with_vllm(CPU_RUN)).cache == GIB


@pytest.mark.parametrize(
    ("settings", "on_device", "on_host"),
    [({"sleep_level": 2}, False, False), ({"sleep_level": 1}, False, True), ({"enable_sleep": False}, True, False)],
)
def test_what_an_engine_holds_while_ranks_train(settings: dict[str, Any], on_device: bool, on_host: bool) -> None:
    plan = with_vllm(vllm=settings)
    engine = engine_of(plan)
    for phase in ("score", "train"):
        held = plan.peaks[phase]
        assert held.bytes(owner="vLLM") == (engine.weights + engine.cache if on_device else 0)
        assert held.bytes(owner="vLLM", where=HOST) == (engine.weights if on_host else 0)
    assert plan.host == (engine.weights if on_host else 0)


def test_ranks_that_share_an_engine_share_weights_and_heads() -> None:
    alone, shared = (engine_of(with_vllm(vllm={"tensor_parallel_size": n}, trainer={"devices": 2})) for n in (1, 2))
    norms = (8 * 2 + 1) * 512
    assert shared.weights == 2 * ((ACTOR - norms) // 2 + norms)
    assert shared.row == alone.row // 2
    assert shared.asked == 2 * alone.asked


def test_fewer_heads_of_keys_and_values_than_ranks_of_an_engine_are_held_by_several() -> None:
    few = {"architecture": LLAMA | {"num_key_value_heads": 2}}
    run = {"model": few, "trainer": {"devices": 4}}
    rows = [engine_of(with_vllm(vllm={"tensor_parallel_size": size}, **run)).row for size in (1, 2, 4)]
    assert rows == [ROW // 4, ROW // 8, ROW // 8]
    with pytest.raises(ConfigError, match="tensor_parallel_size=3 does not come out even over the actor's 8 heads"):
        with_vllm(vllm={"tensor_parallel_size": 3}, model=few, trainer={"devices": 3})


def test_engines_that_do_not_come_out_even_over_the_ranks_are_refused_with_the_equation() -> None:
    with pytest.raises(
        ConfigError, match="rollout.vllm: num_engines × tensor_parallel_size = number of ranks does not"
    ):
        with_vllm(vllm={"num_engines": 3}, trainer={"devices": 2})


@pytest.mark.parametrize(("stage", "layer"), [(2, 0), (3, 8192 * 512 + 512)])
def test_a_push_holds_a_layer_whole_where_ranks_hold_shards(stage: int, layer: int) -> None:
    # The last norm and the head are larger than a layer. The bucket of gradients sleeps.
    strategy = {"name": f"hybrid_deepspeed_stage_{stage}", "sleep": {"gradients": True}}
    plan = with_vllm(strategy=strategy, trainer={"devices": 2})
    pushing = plan.moments["generate"][0]
    assert pushing.name == "pushing weights to vLLM"
    assert pushing.bytes(owner="vLLM") == engine_of(plan).weights
    remembered = 8 * 192 * (8 + 2 + 8)
    assert pushing.bytes(owner="actor", kind="buffers") == 2 * layer + remembered


def test_a_push_of_a_model_with_an_adapter_merges_a_layer() -> None:
    plan, plain = with_vllm(model={"adapter": {"r": 8}}), with_vllm()
    assert engine_of(plan).weights == engine_of(plain).weights == 2 * ACTOR
    buffers = [p.moments["generate"][0].bytes(owner="actor", kind="buffers") for p in (plan, plain)]
    assert buffers[0] - buffers[1] == 2 * (8192 * 512 + 512) + 4 * 8192 * 512


def test_a_share_that_cannot_fit_beside_what_stays_awake_is_told_with_the_largest_that_does() -> None:
    plan = with_vllm(vllm={"gpu_memory_utilization": 0.9}, device_memory_gib=4.0)
    assert not plan.fits
    awake = plan.peaks["generate"].bytes() - plan.peaks["generate"].bytes(owner="vLLM")
    most = int(100 * (1 - awake / (4 * GIB))) / 100
    report = render(plan, advise(plan))
    assert f"gpu_memory_utilization=0.9 cannot fit beside the {awake / GIB:.2f} GiB that stay awake" in report
    assert f"at most {most:g} fits." in report
    assert f"rollout.vllm.gpu_memory_utilization={most:g} " in report
    assert with_vllm(vllm={"gpu_memory_utilization": most}, device_memory_gib=4.0).fits
    assert not with_vllm(vllm={"gpu_memory_utilization": most + 0.01}, device_memory_gib=4.0).fits


def test_a_cache_of_a_given_size_that_cannot_fit_is_told_with_the_largest_that_does() -> None:
    plan = with_vllm(vllm={"kv_cache_gib": 3.5}, device_memory_gib=4.0)
    assert not plan.fits
    (said,) = [
        line for line in render(plan).splitlines() if line.startswith("rollout.vllm.kv_cache_gib=3.5 cannot fit")
    ]
    most = float(said.split("at most ")[1].split()[0])
    assert with_vllm(vllm={"kv_cache_gib": most}, device_memory_gib=4.0).fits
    assert not with_vllm(vllm={"kv_cache_gib": most + 0.01}, device_memory_gib=4.0).fits


def test_a_cache_smaller_than_one_row_does_not_fit_and_is_told_with_the_least_that_does() -> None:
    small = {"device_memory_gib": 4.0, "trainer": {"devices": 1}}
    plan = with_vllm(vllm={"gpu_memory_utilization": 0.04}, **small)
    assert engine_of(plan).rows == 0
    assert not plan.fits
    (said,) = [
        line for line in render(plan).splitlines() if line.startswith("The KV cache is smaller than one row of 192")
    ]
    enough = float(said.split("rollout.vllm.gpu_memory_utilization of ")[1].split()[0])
    assert engine_of(with_vllm(vllm={"gpu_memory_utilization": enough}, **small)).rows >= 1
    assert engine_of(with_vllm(vllm={"gpu_memory_utilization": enough - 0.01}, **small)).rows == 0


def test_fewer_rows_at_once_than_are_asked_for_are_told() -> None:
    plan = with_vllm(vllm={"kv_cache_gib": 3.5 * ROW / GIB})
    assert plan.cache.slots == 3
    assert "Of 8 rows that are asked for at a time, 3 are generated at once." in render(plan)


def test_where_no_share_fits_it_is_said() -> None:
    plan = with_vllm(device_memory_gib=0.9)
    assert "no value has room for its weights and one row" in render(plan)


def test_engines_of_their_own_leave_the_ranks_only_the_push_and_have_a_row_each() -> None:
    apart = {"colocate": False, "num_engines": 2, "tensor_parallel_size": 2, "bucket_mib": 8}
    plan = with_vllm(vllm=apart, trainer={"devices": 2})
    for peak in plan.peaks.values():
        assert peak.bytes(owner="vLLM") == 0
        assert peak.bytes(owner="vLLM", where=HOST) == 0
    pushing = plan.moments["generate"][0]
    assert pushing.bytes(owner="actor", kind="buffers") == 8 * 2**20 + 8 * 192 * (8 + 2 + 8)
    assert [(server.name, server.devices) for server in plan.servers] == [("vLLM engine 0", 2), ("vLLM engine 1", 2)]
    assert plan.servers[0].peak.bytes() == engine_of(plan).awake == pytest.approx(0.4 * 80 * GIB, abs=1)
    assert "vLLM engine 1 apart, each of 2 devices" in render(plan)
    inside = with_vllm(vllm={"tensor_parallel_size": 2}, trainer={"devices": 2})
    assert plan.peaks["train"].bytes() == inside.peaks["train"].bytes()


def test_an_engine_of_its_own_may_have_all_of_its_device_and_no_more() -> None:
    assert with_vllm(vllm={"colocate": False, "gpu_memory_utilization": 0.95}).fits
    too_large = with_vllm(vllm={"colocate": False, "kv_cache_gib": 80.0})
    assert not too_large.fits
    assert "rollout.vllm.kv_cache_gib=80 cannot fit: at most 79." in render(too_large)


def test_pipelined_rollouts_take_no_more_in_the_ranks() -> None:
    apart: dict[str, Any] = {"backend": "vllm", "vllm": {"colocate": False}}
    algorithm = {"importance_cap": 2.0}
    plain, pipelined = (
        plan_of(GPU_RUN, rollout=apart | {"max_staleness": steps}, algorithm=algorithm) for steps in (0, 2)
    )
    # The actor's forward pass for old log-probs runs in both.
    assert {name: peak.bytes() for name, peak in plain.peaks.items()} == {
        name: peak.bytes() for name, peak in pipelined.peaks.items()
    }


@pytest.mark.parametrize(("run", "device", "width"), [(CPU_RUN, None, 4), (GPU_RUN, 7, 2)])
def test_a_reference_of_its_own_is_not_in_the_ranks(
    tmp_path: Path, run: dict[str, Any], device: int | None, width: int
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    model = {"reference": str(tmp_path)}
    together = plan_of(run, model=model)
    apart = {"model": model, "roles": {"reference": {"separate": True, "device": device}}}
    plan = plan_of(run, **apart)
    assert together.peaks["train"].bytes() - plan.peaks["train"].bytes() == width * ACTOR
    assert all(peak.bytes(owner="reference") == 0 for peak in plan.peaks.values())
    assert not plan.setup.reference_is_actor
    (server,) = plan.servers
    assert server.peak.bytes(kind="weights") == width * ACTOR
    assert server.peak.bytes(kind="activations") > 0
    assert ("reference apart, on the CPU" in render(plan)) == (device is None)
    # The host's memory is not judged by what a device has.
    tight = plan_of(run, **apart, device_memory_gib=0.05)
    assert tight.servers[0].too_much(tight.device) == (0 if device is None else server.peak.bytes() - tight.device)


def test_the_recipe_plans_what_vllm_takes() -> None:
    architecture = ",".join(f"{key}: {str(value).lower()}" for key, value in LLAMA.items())
    overrides = ["model.path=null", f"model.architecture={{{architecture}}}", "trainer=cpu", "rollout=vllm"]
    run = compose_run("plan", PlanRun, overrides)
    assert engine_of(make_plan(run)).weights == 4 * ACTOR


@pytest.mark.slow
def test_a_real_engine_holds_the_weights_and_the_cache_that_were_planned(run_ranks: RunRanks) -> None:
    pytest.importorskip("vllm", reason="vLLM is in an environment of its own: see .ci/vllm")
    (output,) = run_ranks(measure_engine, 1, LLAMA, 0.5, timeout=600, env=ENVIRONMENT)
    taken = json.loads(output.split("measured:")[1])
    engine = engine_of(with_vllm(CPU_RUN, vllm={"kv_cache_gib": 0.5}))
    ratio = (engine.weights + engine.cache) / taken
    print(f"{ratio:.3f} of {taken >> 20} MiB")
    assert ratio == pytest.approx(1.0, abs=0.1)
