"""A sweep whose values Optuna chooses: what `hydra/sweeper=optuna` does."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import NonNegativeInt, PositiveInt

from lightning_hybrid.config.sweep import SweepConfig, ranking_of
from lightning_hybrid.errors import ConfigError
from lightning_hybrid.settings import Problem, Rule, Settings

if TYPE_CHECKING:
    from hydra.core.override_parser.types import Override
    from omegaconf import DictConfig
    from optuna import Study, Trial
    from optuna.distributions import BaseDistribution

_PATIENCE = 3  # runs that may fail at first; all further ones would hardly fare better


def _has_a_place_to_go_on_in(settings: OptunaConfig) -> Problem | None:
    if settings.study_name is None or settings.storage is not None:
        return None
    return Problem("study_name", "needs storage, such as sqlite:///study.db: without it no study is kept")


class OptunaConfig(Settings):
    """Keys of `hydra.sweeper` with `hydra/sweeper=optuna`."""

    rules: ClassVar[tuple[Rule, ...]] = (_has_a_place_to_go_on_in,)

    n_trials: PositiveInt = 20
    """runs in all"""
    n_jobs: PositiveInt = 1
    """runs at a time, which the launcher must be able to start together"""
    seed: NonNegativeInt = 0
    """of Optuna's sampler, the tree-structured Parzen estimator; a study that goes on adds the number of its runs"""
    storage: str | None = None
    """where the study is kept, such as sqlite:///study.db; null for memory"""
    study_name: str | None = None
    """a study of that storage to go on with, or to begin"""


def search(
    arguments: Sequence[str], settings: Mapping[str, Any], config: DictConfig, loader: Any, launcher: Any
) -> Any:
    """Run trial after trial, and say which was best.

    Args:
        arguments: the overrides of the command line, those that are given several values searched.
        settings: of the sweeper, see `OptunaConfig`.
        config: what Hydra composed of all that is not searched.
        loader: Hydra's loader of configurations.
        launcher: Hydra's launcher, which runs jobs and returns what they came to.

    Returns:
        The best value; None when no run came to one.

    Raises:
        ConfigError: for settings that are not valid, nothing to search, or no `sweep.metric`.
    """
    from omegaconf import OmegaConf

    asked, ranking = OptunaConfig(**settings), ranking_of(config)
    fixed, space = _split(arguments, loader)
    study = _study(asked, ranking)
    Path(config.hydra.sweep.dir).mkdir(parents=True, exist_ok=True)
    OmegaConf.save(config, Path(config.hydra.sweep.dir) / "multirun.yaml")
    for first in range(0, asked.n_trials, asked.n_jobs):
        trials = [study.ask(space) for _ in range(first, min(first + asked.n_jobs, asked.n_trials))]
        _run(study, trials, fixed, launcher, first)
        if len(study.trials) >= min(_PATIENCE, asked.n_trials) and not _completed(study):
            sys.stderr.write(f"error: none of the first {len(study.trials)} runs came to a value: the search ends\n")
            return None
    best = study.best_trial
    values = " ".join(f"{key.lstrip('+')}={value}" for key, value in best.params.items())
    sys.stdout.write(f"best of {len(study.trials)} runs: {values} with {ranking.metric}={best.value:.6g}\n")
    return best.value


def _study(asked: OptunaConfig, ranking: SweepConfig) -> Study:
    import optuna

    if ranking.metric is None:
        raise ConfigError(
            "hydra/sweeper=optuna needs to know what it is after: give sweep.metric, such as reward/score for ppo, "
            "val/accuracy for reward or val/loss for sft"
        )
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(
        direction="maximize" if ranking.maximizes(ranking.metric) else "minimize",
        storage=asked.storage,
        study_name=asked.study_name,
        load_if_exists=True,
    )
    # A study that goes on would draw again what it drew when it began.
    study.sampler = optuna.samplers.TPESampler(seed=asked.seed + len(study.trials))
    return study


def _run(study: Study, trials: Sequence[Trial], fixed: Sequence[str], launcher: Any, first: int) -> None:
    """Run trials together and tell the study what they came to."""
    from optuna.trial import TrialState

    jobs = [[*fixed, *(f"{key}={_text(value)}" for key, value in trial.params.items())] for trial in trials]
    for trial, job in zip(trials, launcher.launch(jobs, initial_job_idx=first), strict=True):
        if job.return_value is None:
            study.tell(trial, state=TrialState.FAIL)
        else:
            study.tell(trial, job.return_value)


def _completed(study: Study) -> bool:
    from optuna.trial import TrialState

    return bool(study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,)))


def _split(arguments: Sequence[str], loader: Any) -> tuple[list[str], dict[str, BaseDistribution]]:
    """The overrides that all runs have, and what is searched, by key."""
    from hydra.core.override_parser.overrides_parser import OverridesParser

    overrides = OverridesParser.create(config_loader=loader).parse_overrides(list(arguments))
    searched = {item.get_key_element(): _distribution(item) for item in overrides if item.is_sweep_override()}
    fixed = [str(item.input_line) for item in overrides if not item.is_sweep_override()]
    if not searched:
        example = "'algorithm.kl_coef=tag(log,interval(0.001,0.1))' or algorithm.epochs=1,2,4"
        raise ConfigError(f"hydra/sweeper=optuna has nothing to search: give a key several values, such as {example}")
    return fixed, searched


def _distribution(override: Override) -> BaseDistribution:
    """Hydra's sweep of one key as Optuna has it; the tag `log` searches orders of magnitude."""
    from hydra.core.override_parser.types import ChoiceSweep, IntervalSweep, RangeSweep
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    sweep = override.value()
    if isinstance(sweep, IntervalSweep) and sweep.start is not None and sweep.end is not None:
        log = "log" in sweep.tags
        if isinstance(sweep.start, int) and isinstance(sweep.end, int):
            return IntDistribution(sweep.start, sweep.end, log=log)
        return FloatDistribution(float(sweep.start), float(sweep.end), log=log)
    numbers = sweep.range() if isinstance(sweep, RangeSweep) else None
    if isinstance(numbers, range) and numbers.step > 0:
        return IntDistribution(numbers[0], numbers[-1], step=numbers.step)
    if isinstance(sweep, ChoiceSweep | RangeSweep):
        return CategoricalDistribution(list(override.sweep_string_iterator()))
    raise ConfigError(f"{override.input_line}: Optuna can search interval(...), range(...) and values with commas")


def _text(value: object) -> str:
    return value if isinstance(value, str) else repr(value)
