"""The processes of a run: how they are started and meet, what each has set while it lasts, and how it ends."""

from __future__ import annotations

import os
from contextlib import ExitStack
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch
from lightning.fabric.utilities.distributed import _init_dist_connection
from lightning.fabric.utilities.seed import reset_seed
from lightning.pytorch.strategies.ddp import DDPStrategy
from lightning.pytorch.strategies.deepspeed import DeepSpeedStrategy
from lightning.pytorch.strategies.strategy import Strategy
from typing_extensions import override

from lightning_hybrid.engines.environment import forget_process_groups, prepare_deepspeed
from lightning_hybrid.strategy.beginning import Beginning
from lightning_hybrid.strategy.devices import refuse_unsuitable_device
from lightning_hybrid.strategy.hosts import interface_to_others, refuse_other_launch
from lightning_hybrid.strategy.liveness import Liveness
from lightning_hybrid.strategy.lost_ranks import begin_liveness, end_liveness, tell_of
from lightning_hybrid.strategy.meeting import store_of_this_start
from lightning_hybrid.strategy.notebook import launcher_of, stay_interactive
from lightning_hybrid.strategy.precision import HybridPrecision

if TYPE_CHECKING:
    import lightning.pytorch as pl
    from lightning.pytorch.plugins.precision import Precision


class ProcessesStrategy(DeepSpeedStrategy):
    """Lightning's strategy as far as it is about processes, on CPU and CUDA; it knows no engine.

    Args:
        process_group_backend: ``gloo`` or ``nccl``; by default what fits the device.
        timeout: how long a collective may take, or a rank may not be heard of.
        notebook: whether to start ranks from a notebook, also outside of one.
    """

    def __init__(self, process_group_backend: str | None, timeout: timedelta | None, *, notebook: bool = False) -> None:
        # DeepSpeedStrategy.__init__ imports DeepSpeed before the accelerator is known, and holds one config.
        DDPStrategy.__init__(self, process_group_backend=process_group_backend, timeout=timeout)
        self.liveness: Liveness | None = None
        self.beginning = Beginning()
        self._process = ProcessSettings()
        self._notebook = notebook

    @property
    def _module(self) -> pl.LightningModule:
        assert self.lightning_module is not None
        return self.lightning_module

    @property
    @override
    def precision_plugin(self) -> Precision:
        return Strategy.precision_plugin.fget(self)  # type: ignore[attr-defined, no-any-return]

    @precision_plugin.setter
    def precision_plugin(self, plugin: Precision | None) -> None:
        if plugin is not None and not isinstance(plugin, HybridPrecision):
            plugin = HybridPrecision(plugin.precision)  # type: ignore[arg-type]
        self._precision_plugin = plugin

    @override
    def _configure_launcher(self) -> None:
        assert self.cluster_environment is not None
        # Before any process is started.
        refuse_unsuitable_device(self.root_device, self.precision_plugin.precision, self.num_processes)
        refuse_other_launch(self.cluster_environment, self.num_processes, self.num_nodes)
        self._launcher = launcher_of(
            self.cluster_environment, self.num_processes, self.num_nodes, notebook=self._notebook
        )

    @property
    @override
    def distributed_sampler_kwargs(self) -> dict[str, Any]:
        """By the number of all ranks: nodes need not have as many each."""
        return {"num_replicas": self.world_size, "rank": self.global_rank}

    @override
    def setup_environment(self) -> None:
        assert self.accelerator is not None
        prepare_deepspeed(self.root_device.type)
        self.accelerator.setup_device(self.root_device)
        self.setup_distributed()
        self._process.begin(self.local_rank)
        self.liveness = begin_liveness(self)
        self.beginning = Beginning()

    @override
    def setup_distributed(self) -> None:
        import deepspeed

        assert self.cluster_environment is not None
        reset_seed()
        self.set_world_ranks()
        self._process_group_backend = self._get_process_group_backend()
        if self.num_nodes > 1 and "gloo" in self._process_group_backend and "GLOO_SOCKET_IFNAME" not in os.environ:
            self._process.set("GLOO_SOCKET_IFNAME", interface_to_others(self.cluster_environment.main_address))
        if not torch.distributed.is_initialized():
            forget_process_groups()
            store = store_of_this_start(self.cluster_environment, self._timeout)
            arguments: dict[str, Any] = {"timeout": self._timeout} | ({} if store is None else {"store": store})
            _init_dist_connection(self.cluster_environment, self._process_group_backend, **arguments)
        deepspeed.init_distributed(self._process_group_backend, auto_mpi_discovery=False, verbose=False)

    @override
    def barrier(self, *args: Any, **kwargs: Any) -> None:
        if Beginning.KNOWN_AT in args:
            self.beginning.agree_on(None)
        super().barrier(*args, **kwargs)

    @override
    def teardown(self) -> None:
        with ExitStack() as last_first:
            last_first.callback(super().teardown)
            last_first.callback(end_liveness, self)
            last_first.callback(self._process.end)

    @override
    def on_exception(self, exception: BaseException) -> None:
        tell_of(self, exception)
        super().on_exception(exception)
        if isinstance(exception, KeyboardInterrupt):
            stay_interactive(self._module.trainer)


class ProcessSettings:
    """What a run sets in its process, and takes back when it ends."""

    def __init__(self) -> None:
        self._variables: list[str] = []

    def set(self, name: str, value: str | None) -> None:
        """Set an environment variable that is not set yet; None leaves it so."""
        if name not in os.environ and value is not None:
            os.environ[name] = value
            self._variables.append(name)

    def begin(self, local_rank: int) -> None:
        """Set it."""
        # DeepSpeed reads it throughout a run. Left behind, it would tell Lightning that a launcher had set it.
        self.set("LOCAL_RANK", str(local_rank))
        # Deterministic mode has torch fill new memory, also DeepSpeed's buckets of gigabytes that are written before
        # they are read: at every backward pass.
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]

    def end(self) -> None:
        """Take it back."""
        while self._variables:
            os.environ.pop(self._variables.pop(), None)
        torch.utils.deterministic.fill_uninitialized_memory = True  # type: ignore[attr-defined]
