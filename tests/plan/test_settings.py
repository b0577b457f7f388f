"""What algorithms, groups, adapters, rewards and settings of each model do to the plan, worked out by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig

from lightning_hybrid.errors import ConfigError
from lightning_hybrid.plan import HOST, Moment, Plan, render
from tests.plan.plans import CPU_RUN, GPU_RUN, LLAMA, plan_of

# Embedding and head 2 · 8192 · 512, eight layers of 4 · 512² + 3 · 512 · 1376 + 2 · 512, and a norm of 512.
LINEAR = 8 * (4 * 512**2 + 3 * 512 * 1376)
POLICY = 2 * 8192 * 512 + LINEAR + 8 * 2 * 512 + 512
# Rank 8: r · (inputs + outputs) of four square layers and three of the MLP, in each of eight layers.
ADAPTER = 8 * 8 * (4 * (512 + 512) + 3 * (512 + 1376))
GRPO: dict[str, Any] = {"name": "grpo", "group_size": 4}
LORA: dict[str, Any] = {"adapter": {"r": 8}}


def called(plan: Plan, name: str) -> Moment:
    return next(moment for moments in plan.moments.values() for moment in moments if moment.name == name)


def model_folder(folder: Path, **arguments: Any) -> str:
    """The configuration of a model, which is all that a plan reads."""
    settings = LLAMA | arguments
    config = AutoConfig.for_model(settings.pop("model_type"), **settings)
    config.save_pretrained(folder)
    return str(folder)


# ---- algorithms ------------------------------------------------------------------------------------------------------


def test_an_algorithm_without_a_critic_or_a_reference_has_none_in_any_phase() -> None:
    plan = plan_of(GPU_RUN, algorithm=GRPO)
    assert {*plan.setup.networks} == {"actor", "reference"}
    assert called(plan, "actor's optimizer step").bytes(kind="master weights") == 4 * POLICY
    plan = plan_of(GPU_RUN, algorithm={"name": "dapo", "group_size": 4})
    assert {*plan.setup.networks} == {"actor"}
    assert all(held.owner == "actor" for moments in plan.moments.values() for m in moments for held in m.held)
    assert called(plan, "actor's optimizer step").bytes(kind="weights") == 2 * POLICY


def test_a_run_that_computes_nothing_between_rollout_and_update_still_has_a_scoring_phase() -> None:
    plan = plan_of(GPU_RUN, algorithm={"name": "dapo", "group_size": 4, "old_logprobs": "rollout"})
    assert plan.peaks["score"].name == "between rewards and forward passes"
    assert plan.peaks["score"].bytes(kind="weights") == 2 * POLICY


def test_a_group_multiplies_the_rows_of_a_batch() -> None:
    # 8 layers, keys and values, 8 heads of 64, capacity 192, bf16.
    slot = 8 * 2 * 8 * 64 * 192 * 2
    plan = plan_of(GPU_RUN, algorithm=GRPO)
    assert plan.cache.bytes == 8 * 4 * slot
    assert plan.setup.minibatch == 32
    assert "; 8 × 4 rows of 128 + 64 tokens per rank, 32 generated at once, 4 trained at once" in render(plan)
    assert plan_of(GPU_RUN, algorithm=GRPO | {"minibatch_size": 16}).setup.micro_batches == 4


def test_dynamic_sampling_generates_and_learns_from_as_many_groups_as_it_wants() -> None:
    plan = plan_of(GPU_RUN, algorithm=GRPO | {"groups": 3})
    assert plan.cache.slots == plan.setup.minibatch == 12
    assert plan.setup.drawn == 32  # where further prompts are sampled, up to all of the batch


def test_every_token_of_a_response_is_remembered() -> None:
    # Token 8, two masks, two log-probs 4 each: 18 bytes, of this iteration and the last. Beyond them mask, old
    # log-prob, reward, advantage and reference's log-prob: 17.
    plan = plan_of(GPU_RUN, algorithm=GRPO)
    remembered = (18 + 18 + 17) * 32 * (128 + 64)
    assert plan.moments["score"][0].bytes(kind="buffers") == remembered


def test_texts_of_the_ptx_loss_pass_through_the_actor_after_all_micro_batches() -> None:
    def texts(size: int, **changes: Any) -> Moment:
        run = {
            "algorithm": {"ptx_coef": 0.5},
            "ptx": {"path": "texts", "batch_size": size, "max_length": 256} | changes,
        }
        return called(plan_of(GPU_RUN, **run), "actor's forward and backward pass over texts of the PTX loss")

    assert texts(16).bytes(kind="activations") > 1.9 * texts(8).bytes(kind="activations")
    assert texts(8).bytes(owner="critic", kind="gradients") == 2 * (POLICY - 8192 * 512 + 512)  # waiting to be stepped
    # Without a length, texts are as long as the model has positions.
    longest, limited = texts(2, max_length=None), texts(2, max_length=1024)
    assert longest.bytes() == limited.bytes()
    assert not any("PTX" in moment.name for moment in plan_of(GPU_RUN).moments["train"])


def test_texts_that_nothing_limits_need_a_length(tmp_path: Path) -> None:
    bloom = {"model_type": "bloom", "vocab_size": 512, "hidden_size": 64, "n_layer": 2, "n_head": 4}
    run = {name: value for name, value in CPU_RUN.items() if name != "model"} | {"model": {"architecture": bloom}}
    with pytest.raises(ConfigError, match=r"nothing limits the texts of the PTX loss: set ptx\.max_length"):
        plan_of(run, algorithm={"ptx_coef": 0.5}, ptx={"path": "texts"})


# ---- each model's own settings ---------------------------------------------------------------------------------------


def test_each_role_may_have_a_stage_of_its_own() -> None:
    roles = {"critic": {"zero_stage": 3}, "reference": {"zero_stage": 3}}
    plan = plan_of(GPU_RUN, roles=roles, trainer={"devices": 4})
    networks, step = plan.setup.networks, called(plan, "actor's optimizer step")
    small = {name: 2 * sum(size for size in network.sizes if size < 100_000) for name, network in networks.items()}
    assert step.bytes(owner="actor", kind="weights") == 2 * POLICY
    assert step.bytes(owner="critic", kind="weights") == 2 * networks["critic"].numel // 4 + small["critic"]
    assert step.bytes(owner="reference", kind="weights") == 2 * POLICY // 4 + small["reference"]
    assert called(plan, "reference's forward pass").bytes(owner="reference", kind="weights") > 2 * POLICY
    assert "ZeRO-2 (critic 3, reference 3);" in render(plan)


def test_layers_computed_twice_keep_their_inputs_only() -> None:
    def training(**roles: Any) -> Moment:
        return called(plan_of(GPU_RUN, roles=roles), "actor's forward and backward pass")

    kept, twice = training(), training(actor={"gradient_checkpointing": True})
    assert twice.bytes(kind="activations") < 0.4 * kept.bytes(kind="activations")
    # In bf16 eight inputs of 4 rows of 192 tokens of 512 numbers at least, and one layer's activations.
    assert twice.bytes(kind="activations") > 8 * 4 * 192 * 512 * 2
    critic_only = training(critic={"gradient_checkpointing": True})
    assert critic_only.bytes() == kept.bytes()


def test_dropout_keeps_masks() -> None:
    name = "actor's forward and backward pass"
    dropped = called(plan_of(CPU_RUN, roles={"actor": {"dropout": 0.1}}), name)
    assert dropped.bytes() > called(plan_of(CPU_RUN), name).bytes()


# ---- adapters --------------------------------------------------------------------------------------------------------


def test_under_an_adapter_weights_are_frozen_and_the_reference_is_the_actor_itself() -> None:
    plan = plan_of(GPU_RUN, algorithm=GRPO, model=LORA)
    assert {*plan.setup.networks} == {"actor"}
    step = called(plan, "the actor's gradients in fp32")
    assert step.bytes(kind="weights") == 2 * (POLICY + ADAPTER)
    assert step.bytes(kind="master weights") == 4 * ADAPTER
    assert step.bytes(kind="optimizer states") == 8 * ADAPTER
    assert step.bytes(kind="gradients") == (2 + 4) * ADAPTER
    assert called(plan, "reference's forward pass").bytes(owner="actor", kind="activations") > 0
    assert "actor 0.0343B (0.00062B trained) (bfloat16)" in render(plan)


def test_zero_3_shares_frozen_weights_too() -> None:
    strategy = {"name": "hybrid_deepspeed_stage_3"}
    plan = plan_of(GPU_RUN, algorithm=GRPO, model=LORA, strategy=strategy, trainer={"devices": 4})
    network = plan.setup.networks["actor"]
    small = 2 * sum(size for size in network.sizes if size < 100_000)
    step = called(plan, "actor's optimizer step")
    assert step.bytes(kind="weights") == 2 * (POLICY + ADAPTER) // 4 + small
    assert step.bytes(kind="master weights") == 4 * ADAPTER // 4


def test_a_reference_that_was_given_stays_beside_an_adapter(tmp_path: Path) -> None:
    plan = plan_of(GPU_RUN, algorithm=GRPO, model=LORA | {"reference": model_folder(tmp_path)})
    assert called(plan, "actor's optimizer step").bytes(owner="reference") == 2 * POLICY


def test_a_critic_with_an_adapter_trains_its_head_too() -> None:
    plan = plan_of(GPU_RUN, model={"critic_adapter": {"r": 8}})
    step = called(plan, "critic's optimizer step")
    assert step.bytes(owner="critic", kind="master weights") == 4 * (ADAPTER + 512)
    assert step.bytes(owner="actor", kind="master weights") == 4 * POLICY


def test_weights_under_an_adapter_may_be_in_four_bits() -> None:
    # 4 bits, 8 for each 64 weights and 32 for each 64 · 256: 4.127 bits, 0.516 bytes.
    plan = plan_of(GPU_RUN, algorithm=GRPO, model={"adapter": {"r": 8, "quantize": "nf4"}})
    rest = 2 * (POLICY - LINEAR + ADAPTER)
    step = called(plan, "actor's optimizer step")
    assert step.bytes(kind="weights") == pytest.approx(rest + 0.51587 * LINEAR, rel=1e-4)


@pytest.mark.parametrize("kind", ["rslora", "dora"])
def test_every_kind_of_adapter_is_planned(kind: str) -> None:
    plan = plan_of(GPU_RUN, algorithm=GRPO, model={"adapter": {"r": 8, "kind": kind}})
    lengths = 8 * (4 * 512 + 2 * 1376 + 512) if kind == "dora" else 0  # of each row of each weight
    assert plan.setup.networks["actor"].trained == ADAPTER + lengths


# ---- rewards ---------------------------------------------------------------------------------------------------------


def test_every_term_with_a_model_has_its_weights(tmp_path: Path) -> None:
    judge = model_folder(tmp_path / "judge", num_labels=2)
    terms = {
        "helpful": {"path": model_folder(tmp_path / "reward")},
        "polite": {"classifier": {"path": judge, "label": 1}},
        "loops": {"penalty": "repetition"},
    }
    plan = plan_of(GPU_RUN, reward={"terms": terms})
    networks, step = plan.setup.networks, called(plan, "actor's optimizer step")
    assert {*networks} == {"actor", "critic", "reference", "reward_helpful", "reward_polite"}
    assert step.bytes(owner="reward_helpful") == 2 * networks["reward_helpful"].numel
    # Of no engine: in fp32, whole on every rank.
    assert step.bytes(owner="reward_polite") == 4 * (POLICY - 8192 * 512 + 2 * 512)
    assert "reward_helpful 0.0295B, reward_polite 0.0295B" in render(plan)


def test_a_classifier_does_not_sleep_and_runs_beside_what_generation_left(tmp_path: Path) -> None:
    classifier = {"path": model_folder(tmp_path, num_labels=2), "label": 1}
    sleep = {"frozen_models": True, "kv_cache": True}
    strategy = {"name": "hybrid_deepspeed_stage_3", "sleep": sleep}
    plan = plan_of(GPU_RUN, algorithm=GRPO, reward={"classifier": classifier}, strategy=strategy)
    weights = 4 * plan.setup.networks["reward"].numel
    assert all(m.bytes(owner="reward", kind="weights") == weights for ms in plan.moments.values() for m in ms)
    judging = called(plan, "reward's forward pass")
    assert judging.bytes(kind="KV cache") == plan.cache.bytes
    assert judging.bytes(owner="reference", where=HOST) == 2 * POLICY
    assert called(plan, "reference's forward pass").bytes(kind="KV cache") == 0


def test_a_decoder_with_one_logit_is_a_reward_model_like_others(tmp_path: Path) -> None:
    path = model_folder(tmp_path, num_labels=1)
    plan = plan_of(GPU_RUN, reward={"classifier": {"path": path, "batch_size": 2}})
    assert called(plan, "actor's optimizer step").bytes(owner="reward") == 2 * plan.setup.networks["reward"].numel
    assert plan.setup.networks["critic"].config == plan.setup.networks["reward"].config
    odds = plan_of(GPU_RUN, reward={"classifier": {"path": path, "output": "log_odds"}})
    assert called(odds, "actor's optimizer step").bytes(owner="reward") == 4 * odds.setup.networks["reward"].numel


def test_classifiers_read_as_many_texts_at_once_as_they_are_told_to(tmp_path: Path) -> None:
    bert = {"vocab_size": 512, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_labels": 3}
    AutoConfig.for_model("bert", intermediate_size=128, max_position_embeddings=128, **bert).save_pretrained(tmp_path)

    def reading(size: int) -> int:
        classifier = {"path": str(tmp_path), "label": 2, "batch_size": size}
        plan = plan_of(GPU_RUN, reward={"classifier": classifier})
        return called(plan, "reward's forward pass").bytes(owner="reward", kind="activations")

    assert reading(8) == pytest.approx(4 * reading(2), rel=0.05)
    assert reading(32) == reading(8)  # there are no more


# ---- averages --------------------------------------------------------------------------------------------------------


def test_an_average_of_the_actor_is_one_more_state_of_its_optimizer() -> None:
    plain, averaged = plan_of(GPU_RUN), plan_of(GPU_RUN, callbacks={"ema_decay": 0.99})
    for phase in plain.peaks:
        before, after = plain.moments[phase][0], averaged.moments[phase][0]
        assert after.bytes(kind="optimizer states") - before.bytes(kind="optimizer states") == 4 * POLICY
    asleep = plan_of(GPU_RUN, callbacks={"ema_decay": 0.99}, strategy={"sleep": {"optimizer": True}})
    assert asleep.moments["score"][0].bytes(kind="optimizer states") == 0
    of_adapter = plan_of(GPU_RUN, callbacks={"ema_decay": 0.99}, model=LORA, algorithm=GRPO)
    assert of_adapter.moments["train"][0].bytes(kind="optimizer states") == 12 * ADAPTER


# ---- figures of before -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("run", "changes", "bytes_before"),
    [
        (CPU_RUN, {}, {"generate": 1_223_747_584, "score": 1_215_748_096, "train": 1_769_728_008}),
        (
            GPU_RUN,
            {"strategy": {"name": "hybrid_deepspeed_stage_3"}, "trainer": {"devices": 4}},
            {"generate": 2_376_388_864, "score": 2_443_265_280, "train": 2_536_093_960},
        ),
    ],
)
def test_what_was_planned_before_there_were_these_settings_is_planned_still(
    run: dict[str, Any], changes: dict[str, Any], bytes_before: dict[str, int]
) -> None:
    # Beyond it only what is remembered of 8 responses of 192 tokens, at most 18 + 18 + 25 bytes each.
    plan = plan_of(run, **changes)
    for phase, before in bytes_before.items():
        assert 0 <= plan.peaks[phase].bytes() - before <= 61 * 8 * 192


def test_the_configuration_of_a_folder_is_all_that_is_read(tmp_path: Path) -> None:
    folder = model_folder(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]
    run = {name: value for name, value in GPU_RUN.items() if name != "model"}
    assert plan_of(run | {"model": {"path": folder}}).setup.networks["actor"].numel == POLICY
    assert json.loads((tmp_path / "config.json").read_text())["hidden_size"] == 512
