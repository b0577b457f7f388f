"""The Lightning strategy: one DeepSpeed engine for each optimizer, on CPU and CUDA, in scripts and notebooks."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
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
from torch.optim import Optimizer
from typing_extensions import override

from lightning_hybrid.config import CheckpointConfig, SleepConfig
from lightning_hybrid.engines import EngineOptimizer, build_engine, build_evaluation_engine, engine_config
from lightning_hybrid.engines.config import merged
from lightning_hybrid.engines.environment import forget_process_groups, prepare_deepspeed
from lightning_hybrid.errors import StrategyError
from lightning_hybrid.strategy import checkpoint
from lightning_hybrid.strategy.counting import counted_as_one
from lightning_hybrid.strategy.devices import place_outside, refuse_unsuitable_device
from lightning_hybrid.strategy.ownership import EngineSpec, Owner, assign_owners
from lightning_hybrid.strategy.precision import HybridPrecision

if TYPE_CHECKING:
    import lightning.pytorch as pl
    from deepspeed import DeepSpeedEngine
    from lightning.fabric.utilities.types import _PATH
    from lightning.pytorch.plugins.precision import Precision


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
        timeout: how long a collective may take before the run stops.
        sleep: what leaves the device in phases that do not need it, see :class:`~lightning_hybrid.config.SleepConfig`.
        checkpoint: how checkpoints are written, see :class:`~lightning_hybrid.config.CheckpointConfig`.
        max_nonfinite_steps: optimizer steps in a row that may be skipped because loss or gradients are not finite.
    """

    strategy_name = "hybrid_deepspeed"

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
        self.max_nonfinite_steps = max_nonfinite_steps
        self.engines: dict[str, DeepSpeedEngine] = {}
        self.frozen: dict[str, nn.Module] = {}
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
            super()._configure_launcher()

    @override
    def setup_environment(self) -> None:
        assert self.accelerator is not None
        prepare_deepspeed(self.root_device.type)
        self.accelerator.setup_device(self.root_device)
        self.setup_distributed()
        # DeepSpeed reads it throughout a run. Left behind, it would tell Lightning that a launcher had set it.
        self._set_local_rank = "LOCAL_RANK" not in os.environ
        os.environ.setdefault("LOCAL_RANK", str(self.local_rank))

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
        self._build_engines(fitting)
        self.model_to_device()
        self.setup_precision_plugin()
        self.barrier()

    def _build_engines(self, fitting: bool) -> None:
        specs = self._specs()
        for name, spec in specs.items():
            if spec.kind == "frozen":
                self._submodule(name).requires_grad_(False).eval()
        owners = self._owners(specs) if fitting else []
        frozen = {name: self._submodule(name) for name, spec in specs.items() if spec.kind == "frozen" or not fitting}
        if not fitting and not specs:
            frozen = {"": self._submodule("")}
        for name, module in frozen.items():
            config = self.engine_config(specs.get(name))
            config.pop("hybrid_engine", None)
            self.frozen[name] = build_evaluation_engine(module, config, self.root_device)
        optimizers: list[Optimizer] = [self._build_engine(owner) for owner in owners]
        if fitting:
            self.optimizers = optimizers

    def _build_engine(self, owner: Owner) -> EngineOptimizer:
        params = [list(group["params"]) for group in owner.optimizer.param_groups]
        hybrid = owner.spec.kind == "hybrid"
        config = self.engine_config(owner.spec)
        engine = build_engine(owner.module, owner.optimizer, config, hybrid=hybrid, device=self.root_device)
        self.engines[owner.name] = engine
        return EngineOptimizer(engine, params)

    def _specs(self) -> dict[str, EngineSpec]:
        configure = getattr(self.lightning_module, "configure_engines", None)
        return dict(configure()) if configure is not None else {}

    def _submodule(self, name: str) -> nn.Module:
        assert self.lightning_module is not None
        return self.lightning_module.get_submodule(name)

    def _owners(self, specs: dict[str, EngineSpec]) -> list[Owner]:
        assert self.lightning_module is not None
        optimizers, self.lr_scheduler_configs = _init_optimizers_and_lr_schedulers(self.lightning_module)
        return assign_owners(self.lightning_module, optimizers, specs)

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
        return checkpoint.state_outside_engines(self.lightning_module, [*self.engines, *self.frozen])

    @override
    def optimizer_state(self, optimizer: Any) -> dict[str, Any]:
        return {}

    @override
    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: _PATH, storage_options: Any | None = None) -> None:
        _save_run(self, checkpoint, filepath)

    @override
    def load_checkpoint(self, checkpoint_path: _PATH, weights_only: bool | None = None) -> dict[str, Any]:
        assert self.lightning_module is not None
        if self.lightning_module.trainer.state.fn == TrainerFn.FITTING:
            checkpoint.load_engines(checkpoint_path, self.engines)
        else:
            checkpoint.load_modules(checkpoint_path, self.lightning_module)
        return checkpoint.load_state(checkpoint_path, weights_only is not False)

    @override
    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        assert self.lightning_module is not None
        self.lightning_module.load_state_dict(checkpoint["state_dict"], strict=False)

    @override
    def teardown(self) -> None:
        for engine in (*self.engines.values(), *self.frozen.values()):
            if hasattr(engine, "destroy"):
                engine.module_forward_pre_hook.remove()
                engine.module_forward_post_hook.remove()
                engine.destroy()
        self.engines, self.frozen = {}, {}
        if self._set_local_rank:
            os.environ.pop("LOCAL_RANK", None)
        super().teardown()


def _save_run(strategy: HybridDeepSpeedStrategy, state: dict[str, Any], filepath: _PATH) -> None:
    folder = strategy.broadcast(filepath)
    checkpoint.save_run(folder, state, strategy.engines, is_writer=strategy.is_global_zero)
    strategy.barrier()
