"""The whole configuration of each recipe, and the rules between its groups."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field, NonNegativeInt, PositiveInt

from lightning_hybrid.config.algorithm import RewardConfig, SFTConfig
from lightning_hybrid.config.data import InstructionDataConfig, PreferenceDataConfig
from lightning_hybrid.config.groups import (
    CallbacksConfig,
    LoggerConfig,
    ModelConfig,
    StrategyConfig,
    TrainerConfig,
)
from lightning_hybrid.config.launcher import LauncherConfig, ray_has_gpus_for_ranks, ray_is_given_numbers
from lightning_hybrid.config.sweep import SweepConfig
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


def _the_best_is_of_checkpoints(run: Run) -> Problem | None:
    if run.callbacks.best_metric is None or run.trainer.enable_checkpointing:
        return None
    return Problem("callbacks.best_metric", "needs trainer.enable_checkpointing=true", repr(run.callbacks.best_metric))


def _tensor_parallel_fits_ranks(run: Run) -> Problem | None:
    ranks, size = ranks_of(run.trainer), run.strategy.hybrid_engine.inference_tp_size
    if ranks is None or ranks % size == 0:
        return None
    remedy = f"must divide the number of ranks ({ranks}, from trainer.devices and trainer.num_nodes)"
    return Problem("strategy.hybrid_engine.inference_tp_size", remedy, str(size))


def _samples_are_drawn(run: Run) -> Problem | None:
    if run.callbacks.print_samples is None or "rollout" in type(run).model_fields:
        return None
    remedy = "this recipe samples no responses: leave it out"
    return Problem("callbacks.print_samples", remedy, str(run.callbacks.print_samples))


class Run(Settings):
    """What every recipe needs."""

    rules: ClassVar[tuple[Rule, ...]] = (
        _checkpoints_are_enabled,
        _the_best_is_of_checkpoints,
        _tensor_parallel_fits_ranks,
        _samples_are_drawn,
        ray_is_given_numbers,
        ray_has_gpus_for_ranks,
    )

    strategy: StrategyConfig = Field(default_factory=StrategyConfig)
    """strategy of the trainer"""
    trainer: TrainerConfig
    """arguments of the trainer"""
    launcher: LauncherConfig = Field(default_factory=LauncherConfig)
    """what starts the processes"""
    callbacks: CallbacksConfig = Field(default_factory=CallbacksConfig)
    """what happens beside training"""
    logger: LoggerConfig = Field(default_factory=LoggerConfig)
    """where metrics are written"""
    sweep: SweepConfig = Field(default_factory=SweepConfig)
    """what the runs of a sweep are ranked by"""
    seed: NonNegativeInt = 0
    """seed of weights, data order and sampling"""
    root: str = "outputs"
    """folder that the stages of one experiment share; other values refer to it as ${root}"""
    shared: str | None = None
    """folder with models and data that come from elsewhere; other values refer to it as ${shared}"""
    output_dir: str
    """folder that this run writes to"""
    ckpt_path: str | None = None
    """checkpoint to go on from; 'last': the newest complete one of output_dir, if there is one; 'best': the best one"""


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
    sweep: SweepConfig = Field(default_factory=SweepConfig)
    """what the runs of a sweep are ranked by"""
    heldout_samples: PositiveInt = 256
    """held-out prompts on which the policies before and after PPO are compared"""
