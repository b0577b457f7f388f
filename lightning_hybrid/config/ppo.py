"""The whole configuration of the recipe `ppo`, whose algorithm comes in kinds, and the rules between its groups."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any, ClassVar

from pydantic import Field, SerializeAsAny, create_model, field_validator

from lightning_hybrid.algorithms import ALGORITHMS, GroupConfig, OnlineConfig, PPOConfig
from lightning_hybrid.config.adapters import AdapterConfig
from lightning_hybrid.config.data import InstructionDataConfig, PromptDataConfig
from lightning_hybrid.config.evaluation import EvaluationConfig
from lightning_hybrid.config.groups import PPOModelConfig, RolloutConfig
from lightning_hybrid.config.reward import RewardSourceConfig, longest_seconds
from lightning_hybrid.config.roles import RolesConfig, TrainedRoleConfig
from lightning_hybrid.config.roots import Run, ranks_of
from lightning_hybrid.config.sampling import (
    rollout_fits_workspace,
    rollout_knows_old_logprobs,
    staleness_is_corrected,
    vllm_engines_are_reached,
    vllm_engines_come_out_even,
)
from lightning_hybrid.config.separate import (
    separate_models_are_reached,
    separate_models_have_a_device,
    separate_reference_is_in_a_folder,
    separate_reward_is_a_model,
)
from lightning_hybrid.rl import ERROR_LIMIT
from lightning_hybrid.settings import Problem, Rule, refuse


def _clipping_is_the_algorithms(run: PPORun) -> Problem | None:
    if run.trainer.gradient_clip_val is None:
        return None
    remedy = "PPO clips each optimizer's gradients itself: use algorithm.max_grad_norm"
    return Problem("trainer.gradient_clip_val", remedy, str(run.trainer.gradient_clip_val))


def _accumulation_is_the_algorithms(run: PPORun) -> Problem | None:
    if run.trainer.accumulate_grad_batches == 1:
        return None
    remedy = "PPO accumulates inside its update: use algorithm.minibatch_size and algorithm.micro_batch_size"
    return Problem("trainer.accumulate_grad_batches", remedy, str(run.trainer.accumulate_grad_batches))


def _minibatch_divides_over_ranks(run: PPORun) -> Problem | None:
    ranks, size = ranks_of(run.trainer), run.algorithm.minibatch_size
    if ranks is None or size is None or size % ranks == 0:
        return None
    remedy = f"must be a multiple of the number of ranks ({ranks}): it counts sequences over all of them"
    return Problem("algorithm.minibatch_size", remedy, str(size))


def _minibatch_fits_rollout(run: PPORun) -> Problem | None:
    ranks, size, prompts = ranks_of(run.trainer), run.algorithm.minibatch_size, _prompts_learned_from(run)
    if ranks is None or size is None or prompts * ranks * run.algorithm.group_size % size == 0:
        return None
    factors = "data.batch_size times ranks" if prompts == run.data.batch_size else "algorithm.groups times ranks"
    factors += "" if run.algorithm.group_size == 1 else f" times algorithm.group_size {run.algorithm.group_size}"
    remedy = f"must divide the rollout batch of {prompts * ranks * run.algorithm.group_size} ({factors})"
    return Problem("algorithm.minibatch_size", remedy, str(size))


def _prompts_learned_from(run: PPORun) -> int:
    groups = run.algorithm.groups if isinstance(run.algorithm, GroupConfig) else None
    return groups or run.data.batch_size


def _groups_come_from_the_batch(run: PPORun) -> Problem | None:
    if _prompts_learned_from(run) <= run.data.batch_size:
        return None
    remedy = f"must not exceed data.batch_size ({run.data.batch_size}), the prompts to choose from"
    return Problem("algorithm.groups", remedy, str(_prompts_learned_from(run)))


def _kl_is_controlled_in_small_steps(run: PPORun) -> Problem | None:
    ranks, horizon = ranks_of(run.trainer), run.algorithm.kl_horizon
    samples = _prompts_learned_from(run) * (ranks or 1) * run.algorithm.group_size
    if run.algorithm.kl_target is None or samples * ERROR_LIMIT < horizon:
        return None
    remedy = (
        f"must be above {samples * ERROR_LIMIT:g}, a fifth of an iteration's {samples} responses, or kl_coef may be 0"
    )
    return Problem("algorithm.kl_horizon", remedy, str(horizon))


def _dropout_is_the_roles(run: PPORun) -> Problem | None:
    for role in ("actor", "critic"):
        key = "adapter" if role == "actor" else "critic_adapter"
        adapter: AdapterConfig | None = getattr(run.model, key)
        if adapter is not None and adapter.dropout > 0:
            remedy = f"PPO sets every dropout of a model by its role: use roles.{role}.dropout"
            return Problem(f"model.{key}.dropout", remedy, f"{adapter.dropout:g}")
    return None


def _low_precision_needs_master_weights(run: PPORun) -> Problem | None:
    if run.trainer.precision == "32-true":
        return None
    for name, role in (("actor", run.roles.actor), ("critic", run.roles.critic)):
        if role.zero_stage == 0:
            remedy = f"has no fp32 master weights for {run.trainer.precision}: use 1, the same memory on one rank"
            return Problem(f"roles.{name}.zero_stage", remedy, "0")
    return None


def _overlong_buffer_fits_responses(run: PPORun) -> Problem | None:
    buffer, longest = run.algorithm.overlong_buffer, run.rollout.max_new_tokens
    if buffer is None or buffer < longest:
        return None
    return Problem("algorithm.overlong_buffer", f"must be below rollout.max_new_tokens ({longest})", str(buffer))


def _ptx_has_texts_and_a_weight(run: PPORun) -> Problem | None:
    coef, path = run.algorithm.ptx_coef, run.ptx.path
    if (coef > 0) == (path is not None):
        return None
    if path is None:
        return Problem("ptx.path", "needed with algorithm.ptx_coef above 0: the texts of the PTX loss", "None")
    return Problem("algorithm.ptx_coef", "must be above 0 for ptx.path to have an effect", "0")


def _a_reference_is_kept_where_one_is_given(run: PPORun) -> Problem | None:
    if run.model.reference is None or run.algorithm.reference:
        return None
    return Problem(
        "model.reference", "needs algorithm.reference=true: there is none otherwise", repr(run.model.reference)
    )


def _only_a_critic_has_its_settings(run: PPORun) -> Problem | None:
    if run.algorithm.critic:
        return None
    given = {
        "model.critic": run.model.critic,
        "model.critic_adapter": run.model.critic_adapter,
        "roles.critic": run.roles.critic,
    }
    for key, value in given.items():
        if value not in (None, TrainedRoleConfig()):
            return Problem(key, f"algorithm {run.algorithm.name!r} has no critic: leave it out", repr(value))
    return None


def _reward_ends_before_ranks_stop_waiting(run: PPORun) -> Problem | None:
    """While one rank waits for its scores, the others wait for that rank."""
    reward, limit, longest = run.reward, run.strategy.timeout_seconds, longest_seconds(run.reward)
    if longest < limit or ranks_of(run.trainer) == 1:
        return None
    remedy = f"with all retries the reward may take {longest:g} s, which must be less than strategy.timeout_seconds"
    return Problem("reward.timeout_seconds", f"{remedy} ({limit:g})", f"{reward.timeout_seconds:g}")


def _each_setting_has_an_effect(config: PTXConfig) -> Problem | None:
    for key in ("validation_path", "validation_fraction", "num_workers"):
        if value := getattr(config, key):
            return Problem(key, "has no effect on the texts of the PTX loss: leave it out", repr(value))
    return None


class PTXConfig(InstructionDataConfig):
    """Texts whose likelihood PPO keeps up."""

    rules: ClassVar[tuple[Rule, ...]] = (*InstructionDataConfig.rules, _each_setting_has_an_effect)

    path: str | list[str] | None = None  # type: ignore[assignment]
    """file, or list of files; null for no PTX loss"""
    prompt_key: str | None = None
    """key of the prompt; null when the whole text is to be learned"""
    response_key: str = "text"
    """key of the text to learn"""


class PPORun(Run):
    """Configuration of the recipe `ppo`; `algorithm.name` decides what settings `algorithm` has."""

    rules: ClassVar[tuple[Rule, ...]] = (
        *Run.rules,
        _clipping_is_the_algorithms,
        _accumulation_is_the_algorithms,
        _minibatch_divides_over_ranks,
        _minibatch_fits_rollout,
        _groups_come_from_the_batch,
        _kl_is_controlled_in_small_steps,
        _dropout_is_the_roles,
        vllm_engines_come_out_even,
        vllm_engines_are_reached,
        _low_precision_needs_master_weights,
        rollout_fits_workspace,
        rollout_knows_old_logprobs,
        staleness_is_corrected,
        _overlong_buffer_fits_responses,
        _reward_ends_before_ranks_stop_waiting,
        _ptx_has_texts_and_a_weight,
        _a_reference_is_kept_where_one_is_given,
        _only_a_critic_has_its_settings,
        separate_reference_is_in_a_folder,
        separate_reward_is_a_model,
        separate_models_have_a_device,
        separate_models_are_reached,
    )

    model: PPOModelConfig
    """the policy, and the models beside it"""
    data: PromptDataConfig
    """prompts to respond to"""
    algorithm: SerializeAsAny[OnlineConfig] = Field(default_factory=PPOConfig)
    """settings of the algorithm"""
    rollout: RolloutConfig = Field(default_factory=RolloutConfig)
    """how responses are sampled"""
    reward: RewardSourceConfig
    """where scores come from"""
    evaluation: EvaluationConfig = Field(default_factory=EvaluationConfig)
    """how the policy is judged on held-out prompts"""
    ptx: PTXConfig = Field(default_factory=PTXConfig)
    """texts of the PTX loss"""
    roles: RolesConfig = Field(default_factory=RolesConfig)
    """what differs between the models"""

    @field_validator("algorithm", mode="before")
    @classmethod
    def _of_its_kind(cls, value: Any) -> Any:
        """A mapping, as the algorithm that it names; a schema for one algorithm knows that already."""
        if cls.model_fields["algorithm"].annotation is not OnlineConfig or not isinstance(value, Mapping):
            return value
        return ALGORITHMS[value.get("name", "ppo")](**value)

    @classmethod
    def schema_for(cls, values: Mapping[str, Any]) -> type[PPORun]:
        """The schema whose `algorithm` has the settings of the one that is named."""
        group = values.get("algorithm")
        if isinstance(group, OnlineConfig):
            return _with_algorithm(cls, type(group))
        name = group.get("name", "ppo") if isinstance(group, Mapping) else "ppo"
        if not isinstance(name, str) or name not in ALGORITHMS:
            refuse(
                [Problem("algorithm.name", f"must be one of {', '.join(ALGORITHMS)}", repr(name))],
                "in the configuration",
            )
        return _with_algorithm(cls, ALGORITHMS[name])


@cache
def _with_algorithm(schema: type[PPORun], algorithm: type[OnlineConfig]) -> type[PPORun]:
    field = Field(default_factory=algorithm, description=schema.model_fields["algorithm"].description)
    return create_model(schema.__name__, __base__=schema, __module__=schema.__module__, algorithm=(algorithm, field))
