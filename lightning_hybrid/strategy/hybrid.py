"""The Lightning strategy: one DeepSpeed engine for each optimizer, on CPU and CUDA, in scripts and notebooks."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from lightning.fabric.utilities.distributed import _init_dist_connection
from lightning.fabric.utilities.seed import reset_seed
from lightning.pytorch.core.optimizer import _init_optimizers_and_lr_schedulers
from lightning.pytorch.strategies.ddp import DDPStrategy
from lightning.pytorch.strategies.deepspeed import DeepSpeedStrategy
from lightning.pytorch.strategies.strategy import Strategy
from lightning.pytorch.trainer.states import TrainerFn
from torch import nn
from torch.distributed import default_pg_timeout
from typing_extensions import override

from lightning_hybrid.config import CheckpointConfig, SleepConfig
from lightning_hybrid.engines import engine_config
from lightning_hybrid.engines.config import merged
from lightning_hybrid.engines.environment import forget_process_groups, prepare_deepspeed
from lightning_hybrid.engines.guard import StepGuard
from lightning_hybrid.errors import StrategyError
from lightning_hybrid.strategy.building import build_frozen, build_trained, specs_of
from lightning_hybrid.strategy.checkpoint import RunCheckpoints, load_modules, state_outside_engines
from lightning_hybrid.strategy.counting import counted_as_one
from lightning_hybrid.strategy.devices import place_outside, refuse_unsuitable_device
from lightning_hybrid.strategy.launcher import WatchedLauncher
from lightning_hybrid.strategy.liveness import Liveness
from lightning_hybrid.strategy.lost_ranks import (
    begin_liveness,
    end_liveness,
    follow_phases,
    limit_collectives,
    names_lost_ranks,
)
from lightning_hybrid.strategy.ownership import EngineSpec, Owner, assign_owners
from lightning_hybrid.strategy.precision import HybridPrecision
from lightning_hybrid.strategy.progress import Progress
from lightning_hybrid.strategy.residency import Residency, refuse_without_phases

if TYPE_CHECKING:
    import lightning.pytorch as pl
    from deepspeed import DeepSpeedEngine
    from lightning.fabric.utilities.types import _PATH
    from lightning.pytorch.plugins.precision import Precision


@names_lost_ranks
class HybridDeepSpeedStrategy(DeepSpeedStrategy):
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
    ) -> None:
        if stage not in (0, 1, 2, 3):
            raise StrategyError(f"ZeRO stage must be 0, 1, 2 or 3; got {stage!r}")
        # DeepSpeedStrategy.__init__ imports DeepSpeed before the accelerator is known, and holds one config.
        DDPStrategy.__init__(self, process_group_backend=process_group_backend, timeout=timeout)
        self.stage = stage
        self.offload_optimizer = offload_optimizer
        self.offload_parameters = offload_parameters
        self.hybrid_engine = dict(hybrid_engine or {})
        self.config_overrides = dict(config or {})
        self.sleep = SleepConfig(**(sleep or {}))
        self.checkpoint_config = CheckpointConfig(**(checkpoint or {}))
        self.guard = StepGuard(max_nonfinite_steps)
        self.liveness: Liveness | None = None
        self.engines: dict[str, DeepSpeedEngine] = {}
        self.frozen: dict[str, nn.Module] = {}
        self.residency = Residency(self.engines, self.frozen)
        self._progress: Progress | None = None
        self._checkpoints: RunCheckpoints | None = None
        self._set_local_rank = False

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
        assert self.lightning_module is not None
        return self.lightning_module.trainer.state.fn == TrainerFn.FITTING

    @property
    @override
    def lightning_restore_optimizer(self) -> bool:
        return False

    @property
    @override
    def precision_plugin(self) -> Precision:
        return Strategy.precision_plugin.fget(self)  # type: ignore[attr-defined, no-any-return]

    @precision_plugin.setter
    def precision_plugin(self, plugin: Precision | None) -> None:
        if plugin is not None and not isinstance(plugin, HybridPrecision):
            plugin = HybridPrecision(plugin.precision)  # type: ignore[arg-type]
        self._precision_plugin = plugin

    # ---- processes -------------------------------------------------------------------------------------------------

    @override
    def _configure_launcher(self) -> None:
        assert self.cluster_environment is not None
        # Before any process is started.
        refuse_unsuitable_device(self.root_device, self.precision_plugin.precision, self.num_processes)
        alone = self.num_processes * self.num_nodes == 1 and not self.cluster_environment.creates_processes_externally
        if alone:
            self._launcher = None  # stays in this process, which is what a notebook needs
        else:
            self._launcher = WatchedLauncher(self.cluster_environment, self.num_processes, self.num_nodes)

    @override
    def setup_environment(self) -> None:
        assert self.accelerator is not None
        prepare_deepspeed(self.root_device.type)
        self.accelerator.setup_device(self.root_device)
        self.setup_distributed()
        # DeepSpeed reads it throughout a run. Left behind, it would tell Lightning that a launcher had set it.
        self._set_local_rank = "LOCAL_RANK" not in os.environ
        os.environ.setdefault("LOCAL_RANK", str(self.local_rank))
        # Deterministic mode has torch fill new memory, also DeepSpeed's buckets of gigabytes that are written before
        # they are read: at every backward pass.
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
        self.liveness = begin_liveness(self)

    @override
    def setup_distributed(self) -> None:
        import deepspeed

        assert self.cluster_environment is not None
        reset_seed()
        self.set_world_ranks()
        self._process_group_backend = self._get_process_group_backend()
        if not torch.distributed.is_initialized():
            forget_process_groups()
            _init_dist_connection(self.cluster_environment, self._process_group_backend, timeout=self._timeout)
        deepspeed.init_distributed(self._process_group_backend, auto_mpi_discovery=False, verbose=False)

    # ---- engines ---------------------------------------------------------------------------------------------------

    @property
    def max_out_tokens(self) -> int:
        """Prompt and response tokens together that hybrid engines generate at most, DeepSpeed's key and default."""
        return int(self.hybrid_engine.get("max_out_tokens", 512))

    def engine_config(self, spec: EngineSpec | None = None) -> dict[str, Any]:
        """The DeepSpeed config of an engine that asked for ``spec``."""
        spec = spec or EngineSpec()
        clipping = self._clipping()
        return engine_config(
            stage=self.stage,
            precision=self.precision_plugin.precision,
            gradient_clipping=clipping,
            offload_optimizer=self.offload_optimizer,
            offload_parameters=self.offload_parameters,
            hybrid_engine=self.hybrid_engine if spec.kind == "hybrid" else None,
            overrides=merged(self.config_overrides, dict(spec.config)),
        )

    def _clipping(self) -> float:
        trainer = self.lightning_module.trainer if self.lightning_module else None
        if trainer is None or not trainer.gradient_clip_val:
            return 0.0
        if trainer.gradient_clip_algorithm == "value":
            raise StrategyError("DeepSpeed clips by norm only: leave gradient_clip_algorithm out")
        return float(trainer.gradient_clip_val)

    @override
    def setup(self, trainer: pl.Trainer) -> None:
        assert self.accelerator is not None
        assert self.model is not None
        self.accelerator.setup(trainer)
        self.model = self.precision_plugin.convert_module(self.model)
        fitting = trainer.state.fn == TrainerFn.FITTING
        if fitting:
            refuse_without_phases(self.lightning_module, self.sleep)
        self._build_engines(fitting)
        if fitting:
            self._progress = Progress(trainer, self.engines)
            self._checkpoints = RunCheckpoints(self, self._progress)
        self.model_to_device()
        self.setup_precision_plugin()
        self._share_device(fitting)
        limit_collectives(self._timeout)
        follow_phases(self)
        self.barrier()

    def _share_device(self, fitting: bool) -> None:
        """What the first phase does not need sleeps from now on; nothing does where nothing is trained."""
        settings = self.sleep if fitting else None
        self.residency = Residency(self.engines, self.frozen, settings, self.root_device)
        self.residency.enter(None)

    def _build_engines(self, fitting: bool) -> None:
        module = self.lightning_module
        assert module is not None
        specs = specs_of(module)
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
        assert self.lightning_module is not None
        place_outside(self.lightning_module, [*self.engines, *self.frozen], self.root_device)

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
        module = self.lightning_module
        assert module is not None
        if "" in self.engines or "" in self.frozen:
            return self._forward_redirection(module, module, name, *args, **kwargs)
        return getattr(module, name)(*args, **kwargs)

    # ---- checkpoints -----------------------------------------------------------------------------------------------

    @override
    def lightning_module_state_dict(self) -> dict[str, Any]:
        """What no engine saves: the module's state less the engines' and the frozen models' parameters."""
        assert self.lightning_module is not None
        return state_outside_engines(self.lightning_module, [*self.engines, *self.frozen])

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
        if self._checkpoints is None:
            raise StrategyError(
                "there is nothing to save: engines exist only during fit; use ModelCheckpoint, or HFExport"
            )
        state = checkpoint | {"hybrid_deepspeed": {"guard": self.guard.state_dict()}}
        self._checkpoints.save(str(self.broadcast(filepath)), state)

    @override
    def load_checkpoint(self, checkpoint_path: _PATH, weights_only: bool | None = None) -> dict[str, Any]:
        assert self.lightning_module is not None
        plain = weights_only is not False
        if self._checkpoints is None:
            return load_modules(str(checkpoint_path), self.lightning_module).lightning_state(plain)
        state = self._checkpoints.load(str(checkpoint_path), plain)
        self.guard.load_state_dict(state["hybrid_deepspeed"]["guard"])
        return state

    def finish_checkpoints(self) -> None:
        """Wait until a checkpoint that is written beside training is complete; all ranks call it.

        Raises:
            CheckpointError: on every rank where it could not be written.
        """
        if self._checkpoints is not None:
            self._checkpoints.writer.wait()

    def when_checkpoint_complete(self, act: Callable[[], None]) -> None:
        """Do something on this rank, but not before the checkpoint that is being written is complete."""
        if self._checkpoints is None:
            act()
        else:
            self._checkpoints.writer.when_complete(act)

    @override
    def remove_checkpoint(self, filepath: _PATH) -> None:
        """Remove a checkpoint, once the one being written is complete."""
        if self._checkpoints is None:
            super().remove_checkpoint(filepath)
        elif self.is_global_zero:
            self._checkpoints.writer.remove(Path(filepath))

    @override
    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        assert self.lightning_module is not None
        self.lightning_module.load_state_dict(checkpoint["state_dict"], strict=False)

    @override
    def teardown(self) -> None:
        """End what belongs to a run, each part also where another one fails: the process may go on."""
        with ExitStack() as last_first:
            last_first.callback(super().teardown)
            last_first.callback(end_liveness, self)
            last_first.callback(setattr, torch.utils.deterministic, "fill_uninitialized_memory", True)
            if self._set_local_rank:
                last_first.callback(os.environ.pop, "LOCAL_RANK", None)
            last_first.callback(self._end_engines)
            if self._checkpoints is not None:
                last_first.callback(self._checkpoints.close)
            last_first.callback(self.residency.close)

    def _end_engines(self) -> None:
        engines = (*self.engines.values(), *self.frozen.values())
        self.engines, self.frozen = {}, {}
        self._progress = self._checkpoints = None
        for engine in engines:
            if hasattr(engine, "destroy"):
                engine.module_forward_pre_hook.remove()
                engine.module_forward_post_hook.remove()
                engine.destroy()

    @override
    def on_exception(self, exception: BaseException) -> None:
        if self.liveness is not None:
            lost = self.liveness.lost_rank_behind(exception)
            self.liveness.last_words(lost or exception)
            if lost is not None:  # of a collective outside the methods that are watched
                exception.add_note(str(lost))
        super().on_exception(exception)
