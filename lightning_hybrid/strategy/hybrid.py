"""The Lightning strategy: one DeepSpeed engine for each optimizer, on CPU and CUDA, in scripts and notebooks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning.pytorch.core.optimizer import _init_optimizers_and_lr_schedulers
from lightning.pytorch.trainer.states import TrainerFn
from torch import nn
from torch.distributed import default_pg_timeout
from typing_extensions import override

from lightning_hybrid.config import CheckpointConfig, SleepConfig
from lightning_hybrid.engines.guard import StepGuard
from lightning_hybrid.engines.plain import PlainModel
from lightning_hybrid.strategy.building import EngineSettings, build_frozen, build_trained, end_engines, specs_of
from lightning_hybrid.strategy.checkpoint import RunCheckpoints, load_outside_engines, state_outside_engines
from lightning_hybrid.strategy.counting import counted_as_one
from lightning_hybrid.strategy.devices import place_outside
from lightning_hybrid.strategy.evaluation import EvaluationCheckpoints
from lightning_hybrid.strategy.lost_ranks import follow_phases, limit_collectives, names_lost_ranks
from lightning_hybrid.strategy.ownership import EngineSpec, Owner, assign_owners
from lightning_hybrid.strategy.processes import ProcessesStrategy
from lightning_hybrid.strategy.progress import Progress
from lightning_hybrid.strategy.residency import Residency, refuse_without_phases

if TYPE_CHECKING:
    import lightning.pytorch as pl
    from deepspeed import DeepSpeedEngine
    from lightning.fabric.utilities.types import _PATH


@names_lost_ranks
class HybridDeepSpeedStrategy(ProcessesStrategy):
    """Train any LightningModule with one DeepSpeed engine per optimizer; let one of them also generate.

    Each optimizer of ``configure_optimizers`` gets the largest child module that holds its parameters and nobody
    else's. A module may define ``configure_engines() -> dict[str, EngineSpec]`` to make a child's engine hybrid, to
    give it DeepSpeed keys of its own, or to name children that are frozen. Children stay where they are and are called
    as usual (``self.actor(...)``); engines are in :attr:`engines`, by the child's name.

    ``trainer.global_step`` counts optimizer steps, as with Lightning's own strategies, unless the module counts
    otherwise with :meth:`one_global_step`.

    Args:
        stage: ZeRO stage, 0 to 3.
        offload_optimizer: hold optimizer states in host memory (stages 1 to 3).
        offload_parameters: hold parameters in host memory (stage 3).
        hybrid_engine: keys of DeepSpeed's ``hybrid_engine`` section, for the engines that generate.
        config: DeepSpeed keys merged over the ones written here, for every engine.
        process_group_backend: ``gloo`` or ``nccl``; by default what fits the device.
        timeout: how long a collective may take, or a rank may not be heard of, before the run stops. Every rank says
            which rank was lost and why, by :class:`~lightning_hybrid.errors.RankLostError`; a rank whose main thread
            hangs is ended with exit code 75.
        sleep: what leaves the device in phases that do not need it, see :class:`~lightning_hybrid.config.SleepConfig`.
        checkpoint: how checkpoints are written, see :class:`~lightning_hybrid.config.CheckpointConfig`.
        max_nonfinite_steps: optimizer steps in a row that may be skipped because loss or gradients are not finite.
        notebook: start several devices' processes as an interactive session does, also where there is none; see
            :class:`~lightning_hybrid.strategy.notebook.NotebookLauncher`.
    """

    strategy_name = "hybrid_deepspeed"

    run_config: dict[str, Any] | None = None
    """what checkpoints record as the run's configuration"""

    def __init__(
        self,
        stage: int = 2,
        offload_optimizer: bool = False,
        offload_parameters: bool = False,
        hybrid_engine: Mapping[str, Any] | None = None,
        config: Mapping[str, Any] | None = None,
        process_group_backend: str | None = None,
        timeout: timedelta | None = default_pg_timeout,
        sleep: Mapping[str, bool] | None = None,
        checkpoint: Mapping[str, Any] | None = None,
        max_nonfinite_steps: int = 10,
        notebook: bool = False,
    ) -> None:
        super().__init__(process_group_backend, timeout, notebook=notebook)
        self.stage = stage
        self._settings = EngineSettings(
            stage, offload_optimizer, offload_parameters, dict(hybrid_engine or {}), dict(config or {})
        )
        self.sleep = SleepConfig(**(sleep or {}))
        self.checkpoint_config = CheckpointConfig(**(checkpoint or {}))
        self.guard = StepGuard(max_nonfinite_steps)
        self.engines: dict[str, DeepSpeedEngine] = {}
        self.frozen: dict[str, nn.Module] = {}
        self.residency = Residency(self.engines, self.frozen)
        self._plain: PlainModel | None = None
        self._progress: Progress | None = None
        self._checkpoints: RunCheckpoints | EvaluationCheckpoints = EvaluationCheckpoints(self)

    # ---- what Lightning asks about the strategy -------------------------------------------------------------------

    @property
    @override
    def zero_stage_3(self) -> bool:
        return self.stage == 3

    @property
    @override
    def handles_gradient_accumulation(self) -> bool:
        """False: engines accumulate until they are told to step, and Lightning tells them."""
        return False

    @property
    @override
    def restore_checkpoint_after_setup(self) -> bool:
        """Engines load their own shards; without engines, plain modules are loaded before they are sharded."""
        return self._module.trainer.state.fn == TrainerFn.FITTING

    @property
    @override
    def lightning_restore_optimizer(self) -> bool:
        return False

    # ---- engines ---------------------------------------------------------------------------------------------------

    @property
    def max_out_tokens(self) -> int:
        """Prompt and response tokens together that hybrid engines generate at most, DeepSpeed's key and default."""
        return int(self._settings.hybrid_engine.get("max_out_tokens", 512))

    def engine_config(self, spec: EngineSpec | None = None) -> dict[str, Any]:
        """The DeepSpeed config of an engine that asked for ``spec``."""
        trainer = self.lightning_module.trainer if self.lightning_module else None
        return self._settings.config(spec or EngineSpec(), self.precision_plugin.precision, trainer)

    @override
    def setup(self, trainer: pl.Trainer) -> None:
        assert self.accelerator is not None
        assert self.model is not None
        self.accelerator.setup(trainer)
        self.model = self.precision_plugin.convert_module(self.model)
        fitting = trainer.state.fn == TrainerFn.FITTING
        if fitting:
            refuse_without_phases(self.lightning_module, self.sleep)
        else:
            self.beginning.agree_on(None)  # checkpoints to evaluate are loaded before
        if fitting:
            # Before engines are built: a schedule may ask how long an epoch is, for which the data is loaded.
            self._progress = Progress(trainer)
            self._checkpoints = RunCheckpoints(self, self._progress)
        self._build_engines(fitting)
        if self._progress is not None:
            self._progress.engines = self.engines
        self.model_to_device()
        self.setup_precision_plugin()
        # What the first phase does not need sleeps from now on; nothing does where nothing is trained.
        self.residency = Residency(self.engines, self.frozen, self.sleep if fitting else None, self.root_device)
        self.residency.enter(None)
        limit_collectives(self._timeout)
        follow_phases(self)
        self.barrier()

    def _build_engines(self, fitting: bool) -> None:
        module = self._module
        specs = specs_of(module)
        self._plain = PlainModel(module)
        owners: list[Owner] = []
        if fitting:
            optimizers, self.lr_scheduler_configs = _init_optimizers_and_lr_schedulers(module)
            owners = assign_owners(module, optimizers, specs)
        self.frozen = build_frozen(module, specs, self.engine_config, self.root_device, fitting=fitting)
        self.engines, trained = build_trained(owners, self.engine_config, self.root_device)
        if fitting:
            self.optimizers = list(trained)

    @contextmanager
    @override
    def model_sharded_context(self) -> Iterator[None]:
        import deepspeed

        with deepspeed.zero.Init(enabled=self.zero_stage_3, config_dict_or_path=self.engine_config()):
            yield

    @override
    def model_to_device(self) -> None:
        """Move what is outside all engines; engines place their own modules, after casting and sharding them."""
        place_outside(self._module, [*self.engines, *self.frozen], self.root_device)

    # ---- steps -----------------------------------------------------------------------------------------------------

    @contextmanager
    def one_global_step(self) -> Iterator[None]:
        """Count all optimizer steps inside as one ``trainer.global_step``, also when there are none.

        For modules that take several optimizer steps in one ``training_step``, whose users think in iterations:
        ``max_steps``, ``every_n_train_steps`` and progress then count iterations.
        """
        with counted_as_one(self._lightning_optimizers):
            yield

    @override
    def on_train_start(self) -> None:
        super().on_train_start()
        if self._progress is not None:
            self._progress.begin_training()

    @override
    def on_train_end(self) -> None:
        super().on_train_end()
        self.guard.stop_if_hopeless()

    @override
    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        self.guard.stop_if_hopeless()
        if self._progress is not None:
            self._progress.begin_batch()

    @override
    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        with self.precision_plugin.train_step_context():
            return self._step("training_step", *args, **kwargs)

    @override
    def validation_step(self, *args: Any, **kwargs: Any) -> Any:
        with self.precision_plugin.val_step_context():
            return self._step("validation_step", *args, **kwargs)

    @override
    def test_step(self, *args: Any, **kwargs: Any) -> Any:
        with self.precision_plugin.test_step_context():
            return self._step("test_step", *args, **kwargs)

    @override
    def predict_step(self, *args: Any, **kwargs: Any) -> Any:
        with self.precision_plugin.predict_step_context():
            return self._step("predict_step", *args, **kwargs)

    def _step(self, name: str, *args: Any, **kwargs: Any) -> Any:
        """Call a step of the module; through its ``forward``, where hooks live, if the module itself is an engine."""
        module = self._module
        if "" in self.engines or "" in self.frozen:
            return self._forward_redirection(module, module, name, *args, **kwargs)
        return getattr(module, name)(*args, **kwargs)

    # ---- checkpoints -----------------------------------------------------------------------------------------------

    @override
    def lightning_module_state_dict(self) -> dict[str, Any]:
        """What no engine saves: the module's state less the engines' and the frozen models' parameters."""
        return state_outside_engines(self._module, [*self.engines, *self.frozen])

    @override
    def optimizer_state(self, optimizer: Any) -> dict[str, Any]:
        return {}

    @override
    def process_dataloader(self, dataloader: object) -> object:
        """Let training loaders know their position, to go on in the middle of an epoch."""
        training = self.lightning_module is not None and self.lightning_module.trainer.training
        return self._progress.resumable(dataloader) if self._progress is not None and training else dataloader

    @override
    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: _PATH, storage_options: Any | None = None) -> None:
        """Write a folder that holds the whole run; see :mod:`lightning_hybrid.checkpoint`."""
        self._checkpoints.save(filepath, checkpoint)

    @override
    def load_checkpoint(self, checkpoint_path: _PATH, weights_only: bool | None = None) -> dict[str, Any]:
        self.beginning.agree_on(str(checkpoint_path))
        return self._checkpoints.load(str(checkpoint_path), weights_only=weights_only is not False)

    def finish_checkpoints(self) -> None:
        """Wait until a checkpoint that is written beside training is complete; all ranks call it.

        Raises:
            CheckpointError: on every rank where it could not be written.
        """
        self._checkpoints.writer.wait()

    def when_checkpoint_complete(self, act: Callable[[], None]) -> None:
        """Do something on this rank, but not before the checkpoint that is being written is complete."""
        self._checkpoints.writer.when_complete(act)

    @override
    def remove_checkpoint(self, filepath: _PATH) -> None:
        """Remove a checkpoint, once the one being written is complete."""
        if self.is_global_zero:
            self._checkpoints.writer.remove(Path(filepath))

    @override
    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        load_outside_engines(self._module, checkpoint["state_dict"], self._checkpoints.owned, strict=strict)

    @override
    def teardown(self) -> None:
        """End what belongs to a run, each part also where another one fails: the process may go on."""
        with ExitStack() as last_first:
            last_first.callback(super().teardown)
            last_first.callback(self._end_engines)
            last_first.callback(self._checkpoints.close)
            last_first.callback(self.residency.close)

    def _end_engines(self) -> None:
        engines, plain = (*self.engines.values(), *self.frozen.values()), self._plain
        self.engines, self.frozen, self._plain = {}, {}, None
        self._progress, self._checkpoints = None, EvaluationCheckpoints(self)
        end_engines(engines)
        if plain is not None:
            plain.restore()

    def __getstate__(self) -> dict[str, Any]:
        """For copies to ranks that a notebook starts: without what writes checkpoints, which has a thread."""
        return {name: value for name, value in self.__dict__.items() if name != "_checkpoints"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _checkpoints=EvaluationCheckpoints(self))
