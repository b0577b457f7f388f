"""The order in which a vLLM engine wakes, is given weights, generates and sleeps, by a double that records calls."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lightning_hybrid.config import AdapterConfig, PPORun, RolloutConfig, VLLMConfig
from lightning_hybrid.config.run import compose_run
from lightning_hybrid.errors import ConfigError, RolloutError
from lightning_hybrid.models import with_adapter
from lightning_hybrid.models.merging import merged_weight
from lightning_hybrid.rollout.vllm.engine import SleepingEngine, take_weights
from lightning_hybrid.rollout.vllm.startup import import_vllm
from lightning_hybrid.rollout.vllm.weights import WeightStream
from tests.helpers import tiny_policy

ONE_ROUND = ["wake weights", "reload", "reset_prefix_cache", "wake kv_cache", "generate", "sleep 2"]


class Recorder:
    """Takes what vLLM takes, and remembers what it was asked; weights as vLLM takes them, by reference."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.weights: dict[str, torch.Tensor] = {}
        self.fails_in: str | None = None
        self.left_out: set[str] = set()

    def _call(self, what: str) -> None:
        self.calls.append(what)
        if self.fails_in is not None and what.startswith(self.fails_in):
            raise RuntimeError(f"no {what}")

    def wake_up(self, tags: list[str]) -> None:
        self._call(f"wake {tags[0]}")

    def sleep(self, level: int) -> None:
        self._call(f"sleep {level}")

    def collective_rpc(self, method: Any, kwargs: dict[str, Any]) -> list[set[str]]:
        assert method is take_weights
        for name, tensor in kwargs["weights"]:
            self.weights[name] = tensor
            if self.fails_in == "reload":
                break
        self._call("reload")
        return [self.left_out]

    def reset_prefix_cache(self) -> None:
        self._call("reset_prefix_cache")

    def generate(self, prompts: list[dict[str, list[int]]], sampling: list[Any], use_tqdm: bool) -> list[str]:
        self._call("generate")
        return ["a response" for _ in prompts]


@pytest.fixture
def llm() -> Recorder:
    return Recorder()


def begun(llm: Recorder, level: int = 2, sleeps: bool = True) -> SleepingEngine:
    engine = SleepingEngine(llm, sleeps=sleeps, level=level)
    assert llm.calls == ([f"sleep {level}"] if sleeps else [])
    llm.calls.clear()
    return engine


def stream() -> WeightStream:
    return WeightStream(tiny_policy().model)


def one_round(engine: SleepingEngine, version: object) -> None:
    with engine.awake(version, None if engine.has(version) else stream()):
        assert engine.generate([[1, 2]], [None]) == ["a response"]


def test_an_engine_sleeps_before_and_after_each_round_and_is_given_weights_before_it_generates(llm: Recorder) -> None:
    engine = begun(llm)
    one_round(engine, version=1)
    assert llm.calls == ONE_ROUND
    assert llm.weights.keys() == tiny_policy().model.state_dict().keys()


def test_forgotten_weights_are_pushed_again_and_kept_ones_only_where_they_have_changed(llm: Recorder) -> None:
    engine = begun(llm, level=1)
    for version in (1, 1, 2):
        one_round(engine, version)
    assert engine.pushes == 2
    engine = begun(another := Recorder())
    for version in (1, 1):
        one_round(engine, version)
    assert another.calls == ONE_ROUND * 2


def test_where_nothing_can_sleep_the_order_is_the_same_and_weights_stay(llm: Recorder) -> None:
    engine = begun(llm, sleeps=False)
    for version in (1, 1, 2):
        one_round(engine, version)
    assert engine.pushes == 2
    assert llm.calls == [*["reload", "reset_prefix_cache", "generate"], "generate"] + [
        *["reload", "reset_prefix_cache", "generate"]
    ]
    with pytest.raises(RolloutError, match="vLLM was asked to generate while it is asleep"):
        engine.generate([[1]], [None])


def test_weights_of_an_unknown_version_are_pushed_every_time(llm: Recorder) -> None:
    engine = begun(llm, level=1)
    one_round(engine, None)
    one_round(engine, None)
    assert engine.pushes == 2


@pytest.mark.parametrize("step", ["wake weights", "reload", "reset_prefix_cache", "wake kv_cache", "generate"])
def test_an_engine_sleeps_after_whatever_failed_and_then_works(llm: Recorder, step: str) -> None:
    engine = begun(llm)
    llm.fails_in = step
    with pytest.raises(RuntimeError, match=f"no {step}"):
        one_round(engine, 1)
    assert llm.calls[-1] == "sleep 2"
    with pytest.raises(RolloutError, match="while it is asleep"):
        engine.generate([[1]], [None])
    llm.fails_in = None
    llm.calls.clear()
    one_round(engine, 1)
    assert llm.calls == ONE_ROUND


def test_a_push_that_fails_half_way_leaves_no_rank_waiting_for_this_ones_shards(llm: Recorder) -> None:
    engine = begun(llm)
    llm.fails_in = "reload"
    given = stream()
    with pytest.raises(RuntimeError, match="no reload"), engine.awake(1, given):
        pass
    assert len(llm.weights) == 1
    assert next(iter(given), None) is None


def test_weights_that_vllm_passed_over_are_an_error(llm: Recorder) -> None:
    engine = begun(llm)
    llm.left_out = {"model.norm.weight"}
    with pytest.raises(RolloutError, match=r"vLLM left 1 of its weights as they were, such as 'model\.norm\.weight'"):
        one_round(engine, 1)
    assert llm.calls[-1] == "sleep 2"


def test_weights_of_another_architecture_are_refused_before_it_wakes(llm: Recorder) -> None:
    engine = SleepingEngine(llm, sleeps=True, level=2, shapes=stream().shapes)
    llm.calls.clear()
    other = WeightStream(tiny_policy(intermediate_size=32).model)
    with pytest.raises(RolloutError, match="another architecture: .*mlp.* needs rollout.backend=native or hf"):
        engine.awake(1, other).__enter__()
    assert llm.calls == []
    one_round(engine, 1)


def test_each_step_is_agreed_on_so_that_no_rank_goes_on_alone(llm: Recorder) -> None:
    engine, said = begun(llm), list[str]()

    def agreed(step: Any, what: str) -> Any:
        said.append(what)
        return step()

    with engine.awake(1, stream(), agreed):
        assert said == ["waking for weights", "taking the weights", "waking to generate"]


# ---- the weights themselves -----------------------------------------------------------------------------------------


def weights_of(model: Any) -> dict[str, torch.Tensor]:
    return dict(iter(WeightStream(model)))


def test_weights_come_by_their_published_names_layer_by_layer_and_without_copies() -> None:
    model = tiny_policy().model
    given, own = weights_of(model), model.state_dict()
    assert given.keys() == own.keys()
    assert all(tensor.data_ptr() == own[name].data_ptr() for name, tensor in given.items())
    layers = [name.split(".")[2] for name in given if ".layers." in name]
    assert layers == sorted(layers)


def test_a_tied_head_comes_once() -> None:
    given = weights_of(tiny_policy(tie_word_embeddings=True).model)
    assert "model.embed_tokens.weight" in given
    assert "lm_head.weight" not in given


def adapted() -> Any:
    policy = with_adapter(tiny_policy(), AdapterConfig(r=2, alpha=4, target_modules=["q_proj"]))
    for name, parameter in policy.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, generator=torch.Generator().manual_seed(0))
    return policy


def test_adapters_are_merged_on_the_way_and_left_out_where_they_are_off() -> None:
    policy, plain = adapted(), tiny_policy().model.state_dict()
    name = "model.layers.0.self_attn.q_proj.weight"
    layer = policy.model.get_base_model().model.layers[0].self_attn.q_proj
    parts = [layer.base_layer.weight, layer.lora_A["default"].weight, layer.lora_B["default"].weight]
    given = weights_of(policy.model)
    assert given.keys() == plain.keys()
    assert torch.equal(given[name], merged_weight(parts, scale=2.0))
    assert not torch.equal(given[name], plain[name])
    with policy.model.disable_adapter():
        assert all(torch.equal(tensor, plain[key]) for key, tensor in weights_of(policy.model).items())


@pytest.fixture
def no_vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)


def test_where_vllm_is_absent_the_error_says_which_versions_are_tested(no_vllm: None) -> None:
    with pytest.raises(
        ConfigError, match=r"needs vLLM 0\.31\.x, which cannot be imported .* or use rollout.backend=native"
    ):
        import_vllm()


def test_a_version_that_was_never_tested_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(__version__="0.9.2"))
    with pytest.raises(ConfigError, match=r"is tested with vLLM 0\.31\.x, and this is 0\.9\.2"):
        import_vllm()


@pytest.mark.parametrize(
    ("settings", "ranks", "said"),
    [
        ({"num_engines": 3}, 4, "3 × 1 is not 4"),
        ({"num_engines": 2, "tensor_parallel_size": 4}, 4, "2 × 4 is not 4"),
        ({"tensor_parallel_size": 3}, 4, "1.33333 × 3 is not 4"),
    ],
)
def test_engines_that_do_not_come_out_even_are_refused_with_the_numbers(
    settings: dict[str, int], ranks: int, said: str
) -> None:
    problem = VLLMConfig(**settings).problem_with(ranks)
    assert problem is not None
    assert f"num_engines × tensor_parallel_size = number of ranks does not hold: {said}" in problem


def test_a_run_whose_engines_do_not_come_out_even_is_refused_before_anything_is_loaded() -> None:
    needed = ["model.path=a-model", "data.path=rows.jsonl", "reward.path=a-reward-model", "rollout=vllm"]
    with pytest.raises(ConfigError, match="rollout.vllm: num_engines × .* does not hold: 3 × 1 is not 2"):
        compose_run("ppo", PPORun, [*needed, "trainer.devices=2", "rollout.vllm.num_engines=3"])
    run = compose_run("ppo", PPORun, [*needed, "trainer.devices=2", "rollout.vllm.tensor_parallel_size=2"])
    assert run.rollout.backend == "vllm"


@pytest.mark.parametrize(("engines", "ranks"), [(1, 5), (2, 4), (4, 2), (3, 3)])
def test_separate_engines_and_ranks_of_which_one_divides_the_other_come_out_even(engines: int, ranks: int) -> None:
    assert VLLMConfig(colocate=False, num_engines=engines, tensor_parallel_size=8).problem_with(ranks) is None


@pytest.mark.parametrize(("engines", "ranks"), [(2, 3), (3, 2)])
def test_separate_engines_that_ranks_cannot_share_evenly_are_refused_with_the_numbers(engines: int, ranks: int) -> None:
    problem = VLLMConfig(colocate=False, num_engines=engines).problem_with(ranks)
    assert problem is not None
    assert problem.startswith(f"{engines} engines (num_engines) cannot be shared evenly by {ranks} ranks")


def test_devices_are_named_for_separate_engines_only_and_for_each_of_them() -> None:
    with pytest.raises(ConfigError, match=r"devices = \[1\]: are the ranks' own with colocate=true"):
        VLLMConfig(devices=[1])
    with pytest.raises(ConfigError, match=r"devices = \[1, 2, 3\]: 2 × 2 = 4 different ones are needed"):
        VLLMConfig(colocate=False, devices=[1, 2, 3], num_engines=2, tensor_parallel_size=2)
    assert VLLMConfig(colocate=False, devices=[2, 3], tensor_parallel_size=2).processes == 1


def test_the_group_of_separate_engines_composes() -> None:
    needed = ["model.path=a-model", "data.path=rows.jsonl", "reward.path=a-reward-model", "rollout=vllm_separate"]
    run = compose_run("ppo", PPORun, [*needed, "trainer.devices=2"])
    assert (run.rollout.backend, run.rollout.vllm.colocate) == ("vllm", False)
    with pytest.raises(ConfigError, match="rollout.vllm: 2 engines .* cannot be shared evenly by 3 ranks"):
        compose_run("ppo", PPORun, [*needed, "trainer.devices=3", "rollout.vllm.num_engines=2"])


def test_engines_that_come_out_even_are_not() -> None:
    assert VLLMConfig(tensor_parallel_size=2).problem_with(4) is None
    assert VLLMConfig(tensor_parallel_size=2, num_engines=2).problem_with(4) is None


def test_what_the_backend_decides_itself_is_no_option() -> None:
    with pytest.raises(ConfigError, match=r"options.seed = 3: is not vLLM's to decide here: each response has a seed"):
        VLLMConfig(options={"seed": 3})


def test_texts_that_end_a_response_are_refused() -> None:
    with pytest.raises(ConfigError, match="the backend vllm ends responses at tokens only"):
        RolloutConfig(backend="vllm", stop=["\n"])


def test_a_bound_on_the_native_cache_is_refused() -> None:
    with pytest.raises(ConfigError, match="max_tokens_in_flight = 64: the backend vllm bounds its cache by vllm"):
        RolloutConfig(backend="vllm", max_tokens_in_flight=64)


def test_a_head_set_apart_by_an_adapter_is_no_longer_tied() -> None:
    policy = tiny_policy(tie_word_embeddings=True)
    assert WeightStream(policy.model).config.tie_word_embeddings
    adapted = with_adapter(policy, AdapterConfig(r=2, target_modules=["lm_head"]))
    weights = WeightStream(adapted.model)
    assert not weights.config.tie_word_embeddings
    assert {"lm_head.weight", "model.embed_tokens.weight"} <= weights.shapes.keys()


def test_modules_trained_beside_an_adapter_are_left_out_where_it_is_off() -> None:
    from peft import LoraConfig, get_peft_model

    plain = tiny_policy().model
    before = plain.lm_head.weight.detach().clone()
    model = get_peft_model(plain, LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"]))
    torch.nn.init.zeros_(model.get_base_model().lm_head.modules_to_save["default"].weight)
    assert not weights_of(model)["lm_head.weight"].any()
    with model.disable_adapter():
        assert torch.equal(weights_of(model)["lm_head.weight"], before)
