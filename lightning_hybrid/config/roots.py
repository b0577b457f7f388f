"""The whole configuration of each recipe, and the rules between its groups."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field, NonNegativeInt, PositiveInt

from lightning_hybrid.config.algorithm import PPOConfig, RewardConfig, SFTConfig
from lightning_hybrid.config.data import InstructionDataConfig, PreferenceDataConfig, PromptDataConfig
from lightning_hybrid.config.groups import (
    CallbacksConfig,
    LoggerConfig,
    ModelConfig,
    PPOModelConfig,
    RewardSourceConfig,
    RolloutConfig,
    StrategyConfig,
    TrainerConfig,
)
from lightning_hybrid.settings import Problem, Rule, Settings


def ranks_of(trainer: TrainerConfig) -> int | None:
    """Number of processes, or None when only the machine knows it."""
    if isinstance(trainer.devices, int):
        return trainer.devices * trainer.num_nodes
    return None if trainer.devices == "auto" else len(trainer.devices.split(",")) * trainer.num_nodes


def _checkpoints_are_enabled(run: Run) -> Problem | None:
    if run.callbacks.checkpoint_every_n_steps is None or run.trainer.enable_checkpointing:
        return None
    remedy = "needs trainer.enable_checkpointing=true"
    return Problem("callbacks.checkpoint_every_n_steps", remedy, str(run.callbacks.checkpoint_every_n_steps))


def _tensor_parallel_fits_ranks(run: Run) -> Problem | None:
    ranks, size = ranks_of(run.trainer), run.strategy.hybrid_engine.inference_tp_size
    if ranks is None or ranks % size == 0:
        return None
    remedy = f"must divide the number of ranks ({ranks}, from trainer.devices and trainer.num_nodes)"
    return Problem("strategy.hybrid_engine.inference_tp_size", remedy, str(size))


class Run(Settings):
    """What every recipe needs."""

    rules: ClassVar[tuple[Rule, ...]] = (_checkpoints_are_enabled, _tensor_parallel_fits_ranks)

    strategy: StrategyConfig = Field(default_factory=StrategyConfig)
    """strategy of the trainer"""
    trainer: TrainerConfig
    """arguments of the trainer"""
    callbacks: CallbacksConfig = Field(default_factory=CallbacksConfig)
    """what happens beside training"""
    logger: LoggerConfig = Field(default_factory=LoggerConfig)
    """where metrics are written"""
    seed: NonNegativeInt = 0
    """seed of weights, data order and sampling"""
    root: str = "outputs"
    """folder that the stages of one experiment share; other values refer to it as ${root}"""
    shared: str | None = None
    """folder with models and data that come from elsewhere; other values refer to it as ${shared}"""
    output_dir: str
    """folder that this run writes to"""
    ckpt_path: str | None = None
    """checkpoint to go on from; 'last' for the newest complete one of output_dir, if there is one"""


class SFTRun(Run):
    """Configuration of the recipe `sft`."""

    model: ModelConfig
    """the model to train"""
    data: InstructionDataConfig
    """texts to learn"""
    algorithm: SFTConfig = Field(default_factory=SFTConfig)
    """settings of supervised fine-tuning"""


def _reward_starts_from_weights(run: RewardRun) -> Problem | None:
    if run.model.architecture is None:
        return None
    return Problem("model.architecture", "a reward model starts from a trained one: give model.path", "an architecture")


class RewardRun(Run):
    """Configuration of the recipe `reward`."""

    rules: ClassVar[tuple[Rule, ...]] = (*Run.rules, _reward_starts_from_weights)

    model: ModelConfig
    """the model whose body the reward model starts from"""
    data: PreferenceDataConfig
    """pairs of a preferred and another text"""
    algorithm: RewardConfig = Field(default_factory=RewardConfig)
    """settings of reward modelling"""


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
    ranks, size = ranks_of(run.trainer), run.algorithm.minibatch_size
    if ranks is None or size is None or run.data.batch_size * ranks % size == 0:
        return None
    remedy = f"must divide the rollout batch of {run.data.batch_size * ranks} (data.batch_size times ranks)"
    return Problem("algorithm.minibatch_size", remedy, str(size))


def _rollout_fits_workspace(run: PPORun) -> Problem | None:
    limit, asked = run.strategy.hybrid_engine.max_out_tokens, run.rollout.max_new_tokens + 1
    if run.rollout.backend != "native" or max(asked, run.data.max_length or 0) <= limit:
        return None
    needs = "rollout.max_new_tokens and a prompt" if asked > limit else "data.max_length"
    remedy = f"must be at least {max(asked, run.data.max_length or 0)}, what {needs} may need"
    return Problem("strategy.hybrid_engine.max_out_tokens", remedy, str(limit))


def rollout_lacks_old_logprobs(rollout: RolloutConfig) -> str | None:
    """Why PPO's old log-probs cannot come from a rollout sampled like this; None where they can.

    PPO's are at the rollout's temperature, over all tokens. A rollout knows those at temperature 1, and those under the
    distribution that it drew from, which are the same thing only where the temperature alone shaped it.
    """
    if rollout.temperature == 1.0:
        return None
    shapes = {
        "top_k": (rollout.top_k, 0),
        "top_p": (rollout.top_p, 1.0),
        "min_p": (rollout.min_p, 0.0),
        "repetition_penalty": (rollout.repetition_penalty, 1.0),
        "min_new_tokens": (rollout.min_new_tokens, 0),
    }
    given = [f"{name}={value}" for name, (value, off) in shapes.items() if value != off]
    if not given:
        return None
    return (
        f"with rollout.temperature={rollout.temperature} and {', '.join(given)} the rollout does not know the "
        "log-probs at that temperature over all tokens"
    )


def _rollout_knows_old_logprobs(run: PPORun) -> Problem | None:
    if run.algorithm.old_logprobs != "rollout":
        return None
    reason = rollout_lacks_old_logprobs(run.rollout)
    if reason is None:
        return None
    return Problem("algorithm.old_logprobs", f"{reason}: use recompute or auto", "'rollout'")


LONGEST_PAUSE = 60.0  # seconds, between two tries of an endpoint


def _reward_ends_before_ranks_stop_waiting(run: PPORun) -> Problem | None:
    """While one rank waits for its scores, the others wait for that rank."""
    reward, limit = run.reward, run.strategy.timeout_seconds
    tries = reward.retries + 1 if reward.url is not None else 1
    longest = tries * reward.timeout_seconds + (tries - 1) * LONGEST_PAUSE
    if reward.path is not None or longest < limit or ranks_of(run.trainer) == 1:
        return None
    may_take = f"with {tries - 1} retries a reward may take {longest:g} s"
    remedy = f"{may_take}, which must be less than strategy.timeout_seconds ({limit:g})"
    return Problem("reward.timeout_seconds", remedy, f"{reward.timeout_seconds:g}")


class PPORun(Run):
    """Configuration of the recipe `ppo`."""

    rules: ClassVar[tuple[Rule, ...]] = (
        *Run.rules,
        _clipping_is_the_algorithms,
        _accumulation_is_the_algorithms,
        _minibatch_divides_over_ranks,
        _minibatch_fits_rollout,
        _rollout_fits_workspace,
        _rollout_knows_old_logprobs,
        _reward_ends_before_ranks_stop_waiting,
    )

    model: PPOModelConfig
    """the policy, and the models beside it"""
    data: PromptDataConfig
    """prompts to respond to"""
    algorithm: PPOConfig = Field(default_factory=PPOConfig)
    """settings of PPO"""
    rollout: RolloutConfig = Field(default_factory=RolloutConfig)
    """how responses are sampled"""
    reward: RewardSourceConfig
    """where scores come from"""


class StageOverrides(Settings):
    """Hydra overrides for each stage of the quickstart, such as 'trainer.max_steps=10'."""

    sft: list[str] = Field(default_factory=list)
    """overrides of supervised fine-tuning"""
    reward: list[str] = Field(default_factory=list)
    """overrides of reward modelling"""
    ppo: list[str] = Field(default_factory=list)
    """overrides of PPO"""


class QuickstartRun(Settings):
    """Configuration of the recipe `quickstart`: the three stages on the built-in task, and their comparison."""

    stages: str = "quickstart"
    """folder of conf/experiment whose sft, reward and ppo files are run"""
    output_dir: str
    """folder that everything is written to; it becomes the ${root} of the stages"""
    seed: NonNegativeInt = 0
    """seed of the task and of every stage"""
    overrides: StageOverrides = Field(default_factory=StageOverrides)
    """changes to the stages"""
    heldout_samples: PositiveInt = 256
    """held-out prompts on which the policies before and after PPO are compared"""
