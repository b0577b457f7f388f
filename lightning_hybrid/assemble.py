"""From a validated configuration to the objects of a run: models, data arguments, Trainer."""

from __future__ import annotations

import copy
import logging
import os
import warnings
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lightning as L
from lightning.fabric.plugins.environments.cluster_environment import ClusterEnvironment
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import Logger
from lightning_utilities.core.rank_zero import rank_zero_warn

from lightning_hybrid.callbacks import (
    EMA,
    Checkpoints,
    HFExport,
    History,
    MetricsEvents,
    MetricsFile,
    PhaseProgressBar,
    RichPhaseBar,
    SampleLog,
    StopOnSignal,
    make_wandb,
)
from lightning_hybrid.callbacks.best import best_checkpoint
from lightning_hybrid.checkpoint import newest_complete
from lightning_hybrid.config import DataConfig, ModelConfig, PPORun, Run, StrategyConfig
from lightning_hybrid.errors import CheckpointError, ConfigError
from lightning_hybrid.models import (
    Policy,
    ScalarModel,
    build_policy,
    load_policy,
    load_scalar,
    load_tokenizer,
    max_positions,
    with_adapter,
)
from lightning_hybrid.modules import roles
from lightning_hybrid.report.callback import RunReport
from lightning_hybrid.settings import without_credentials
from lightning_hybrid.strategy import STRATEGIES, HybridDeepSpeedStrategy

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_environment: ClusterEnvironment | None = None


def use_environment(environment: ClusterEnvironment | None) -> None:
    """Have Trainers of this process ask it for their ranks; None: what Lightning finds, such as torchrun or SLURM."""
    global _environment
    _environment = environment


def make_tokenizer(config: ModelConfig) -> PreTrainedTokenizerBase:
    """The tokenizer that the configuration names, or the one beside the model."""
    return load_tokenizer(config.tokenizer or str(config.path))


def make_policy(config: ModelConfig, tokenizer: PreTrainedTokenizerBase, chunk: int = 1024) -> Policy:
    """A pretrained policy, with an adapter if configured, or one with fresh weights, checked against its tokenizer.

    Raises:
        DataError: if the tokenizer has ids that the embedding has not.
        ConfigError: if the model cannot be found, or has no place for the adapter.
    """
    if config.architecture is not None:
        return build_policy(config.architecture, len(tokenizer), chunk)
    loaded = load_policy(str(config.path), chunk, config.adapter.quantize if config.adapter else None)
    return with_adapter(roles.make_policy(loaded, tokenizer, chunk), config.adapter)


def make_scalar(config: ModelConfig) -> ScalarModel:
    """A reward model from a pretrained trunk, with an adapter if configured.

    Raises:
        ConfigError: if the model cannot be found, or has no place for the adapter.
    """
    if config.adapter is not None and config.adapter.quantize is not None:
        raise ConfigError("model.adapter.quantize: only policies can be held in four bits; leave it out")
    return with_adapter(load_scalar(str(config.path)), config.adapter)


def reference_of(run: PPORun) -> str | None:
    """Where the reference is read from; None where it is the policy as it starts, which is at hand."""
    if run.model.reference is None and run.roles.reference.separate:
        return run.model.path
    return run.model.reference


def data_arguments(
    config: DataConfig, tokenizer: PreTrainedTokenizerBase, model: Policy | ScalarModel
) -> dict[str, Any]:
    """Keyword arguments of a DataModule; rows may be as long as the model has positions, unless configured shorter."""
    arguments = config.model_dump()
    limit = max_positions(model.config)
    if arguments["max_length"] is None:
        arguments["max_length"] = limit
    return arguments | {"tokenizer": tokenizer}


def make_trainer(run: Run, stage: str, export: HFExport, callbacks: Sequence[Callback] = ()) -> L.Trainer:
    """The Trainer of a recipe.

    Args:
        run: the whole configuration.
        stage: what the progress bar calls the run.
        export: used where the configuration asks for the model to be exported.
        callbacks: further ones.

    Raises:
        ConfigError: if the configuration asks for Ray, and this is no worker of it.
    """
    if run.launcher.name == "ray" and _environment is None:
        raise ConfigError(
            "launcher.name = 'ray': this process is no worker of Ray. The commands and recipes sft, reward, dpo, kto "
            "and ppo start them; from Python, lightning_hybrid.clusters.launch(run, job) does"
        )
    _quieten()
    folder = _checkpoints_folder(run) if run.trainer.enable_checkpointing else None
    export.form = run.callbacks.export
    exports = [export] if run.callbacks.export_model else []
    report = RunReport(run.output_dir, stage, without_credentials(run.model_dump(mode="json")))
    for callback in callbacks:
        if type(callback) is SampleLog:  # not those that log something else in the same form
            callback.print_every = run.callbacks.print_samples
    standard = [*_standard_callbacks(run, stage), *_averages(run, export), *exports]
    # Those that stop a run come after those that finish what they do first.
    own = [*standard, *callbacks, report, StopOnSignal(folder)]
    arguments = {name: value for name, value in run.trainer.model_dump().items() if value is not None}
    arguments.setdefault("max_epochs", -1)
    if isinstance(run.trainer.val_check_interval, int):
        arguments["check_val_every_n_epoch"] = None  # otherwise Lightning begins to count anew with each epoch
    strategy = make_strategy(run.strategy)
    strategy.run_config = without_credentials(run.model_dump(mode="json"))
    return L.Trainer(
        **arguments,
        strategy=strategy,
        plugins=None if _environment is None else [_environment],
        logger=_make_loggers(run),
        callbacks=own,
        default_root_dir=run.output_dir,
        enable_model_summary=False,
    )


def _averages(run: Run, export: HFExport) -> list[Callback]:
    """The running average of what the recipe exports, where one is asked for; written beside it, in the same way."""
    if run.callbacks.ema_decay is None:
        return []
    of_average = copy.copy(export)
    of_average.folder = Path(run.output_dir) / "ema"
    return [EMA(export.child, run.callbacks.ema_decay, of_average)]


def make_strategy(config: StrategyConfig) -> HybridDeepSpeedStrategy:
    """The registered strategy of that name, with the configured engine settings."""
    _, arguments = STRATEGIES[config.name]
    return HybridDeepSpeedStrategy(
        **arguments,
        hybrid_engine=config.hybrid_engine.model_dump(),
        config=dict(config.config),
        timeout=timedelta(seconds=config.timeout_seconds),
        sleep=config.sleep.model_dump(),
        checkpoint=config.checkpoint.model_dump(),
        max_nonfinite_steps=config.max_nonfinite_steps,
    )


def resolve_checkpoint(run: Run) -> Path | str | None:
    """The checkpoint that a run goes on from; None to start anew.

    ``last`` is the newest complete one of the run's own folder, ``best`` the best one there. Whatever a job says that
    SLURM started again, it is ``last``: its command is still that of its first start.

    Raises:
        CheckpointError: if there is none that is meant.
    """
    requeued = _was_requeued()
    if run.ckpt_path != "last" and not requeued:
        return _named_checkpoint(run)
    newest = newest_complete(_checkpoints_folder(run))
    if newest is not None:
        return newest
    if run.ckpt_path != "last":
        return _named_checkpoint(run)
    left = sorted(path.name for path in _checkpoints_folder(run).glob("*.ckpt") if path.is_dir())
    if left:
        raise CheckpointError(
            f"no checkpoint in '{_checkpoints_folder(run)}' is complete ({', '.join(left)}): give ckpt_path=null to "
            "start anew, which drops what was logged, or another folder as output_dir"
        )
    rank_zero_warn(f"no checkpoint in {_checkpoints_folder(run)}: starting anew")
    return None


def _named_checkpoint(run: Run) -> Path | str | None:
    return best_checkpoint(_checkpoints_folder(run)) if run.ckpt_path == "best" else run.ckpt_path


def _checkpoints_folder(run: Run) -> Path:
    return Path(run.output_dir) / "checkpoints"


def _make_loggers(run: Run) -> list[Logger] | bool:
    """The table that reports read, and beside it what was asked for."""
    config, folder = run.logger, run.output_dir
    if config.name == "none":
        return False
    loggers: list[Logger] = [MetricsFile(folder)]
    if config.name == "tensorboard":
        loggers.append(MetricsEvents(folder))
    if config.name == "wandb":
        resuming = run.ckpt_path is not None or _was_requeued()
        settings = without_credentials(run.model_dump(mode="json"))
        loggers.append(make_wandb(folder, config.project, config.offline, resuming, settings))
    return loggers


def _was_requeued() -> bool:
    """Whether SLURM started the job again."""
    return int(os.environ.get("SLURM_RESTART_COUNT") or 0) > 0


def _standard_callbacks(run: Run, stage: str) -> list[Callback]:
    callbacks: list[Callback] = [History()]
    if run.trainer.enable_progress_bar:
        callbacks.append(RichPhaseBar(stage) if run.callbacks.progress == "rich" else PhaseProgressBar(stage))
    if run.trainer.enable_checkpointing:
        settings = run.callbacks
        folder = _checkpoints_folder(run)
        kept = (settings.checkpoint_every_n_steps, settings.keep_checkpoints, settings.best_metric, settings.best_mode)
        callbacks.append(Checkpoints(folder, *kept))
    return callbacks


def _show_remarks() -> None:
    """Show what the project says, such as the schema it found in the data; with the user's own logging, if any."""
    logger = logging.getLogger("lightning_hybrid")
    logger.setLevel(logging.INFO)
    if not logger.hasHandlers():
        logger.addHandler(logging.StreamHandler())


def _quieten() -> None:
    """A recipe's own progress bar and results are what its user reads."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    _show_remarks()
    # What a data module without rows for validation returns.
    warnings.filterwarnings("ignore", r"Total length of `list` across ranks is zero")
    # Frozen models are meant to be in evaluation mode.
    warnings.filterwarnings("ignore", r"Found \d+ module\(s\) in eval mode at the start of training")
    warnings.filterwarnings("ignore", r"`isinstance\(treespec, LeafSpec\)` is deprecated")
    warnings.filterwarnings("ignore", r"Checkpoint directory .* exists and is not empty")
