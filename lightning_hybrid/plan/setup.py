"""What of a run's settings its memory depends on, worked out once."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from lightning_hybrid.config.plan import PlanRun
from lightning_hybrid.config.roots import ranks_of
from lightning_hybrid.engines.build import config_dtype
from lightning_hybrid.engines.config import engine_config
from lightning_hybrid.errors import ConfigError
from lightning_hybrid.plan.networks import Network, networks_of
from lightning_hybrid.strategy import STRATEGIES

FP32 = 4
# DeepSpeed's defaults, in elements.
DEFAULTS = {
    "reduce_bucket_size": 500_000_000,
    "sub_group_size": 1_000_000_000,
    "stage3_param_persistence_threshold": 100_000,
    "stage3_max_live_parameters": 1_000_000_000,
    "stage3_prefetch_bucket_size": 50_000_000,
}


@dataclass(frozen=True)
class Setup:
    """A run as its memory sees it.

    Args:
        run: the configuration.
    """

    run: PlanRun

    @cached_property
    def _arguments(self) -> dict[str, Any]:
        return dict(STRATEGIES[self.run.strategy.name][1])

    @cached_property
    def config(self) -> dict[str, Any]:
        """The DeepSpeed configuration of an engine."""
        return engine_config(
            **self._arguments, precision=self.run.trainer.precision, overrides=dict(self.run.strategy.config)
        )

    @cached_property
    def zero(self) -> dict[str, Any]:
        """Its ``zero_optimization``, DeepSpeed's defaults filled in."""
        zero: dict[str, Any] = self.config["zero_optimization"]
        plain = {name: zero[name.removeprefix("stage3_")] for name in DEFAULTS if name.removeprefix("stage3_") in zero}
        return DEFAULTS | plain | zero

    @property
    def stage(self) -> int:
        """The ZeRO stage."""
        return int(self.zero["stage"])

    @property
    def offloads_optimizer(self) -> bool:
        """Whether optimizer states, master weights and gradients are in host memory."""
        return self.stage > 0 and self.zero.get("offload_optimizer", {}).get("device", "none") != "none"

    @property
    def offloads_parameters(self) -> bool:
        """Whether ZeRO-3's weights are in host memory."""
        return self.stage == 3 and self.zero.get("offload_param", {}).get("device", "none") != "none"

    @cached_property
    def dtype(self) -> torch.dtype:
        """Of weights, gradients and arithmetic."""
        return config_dtype(self.config)

    @cached_property
    def on_cpu(self) -> bool:
        """Whether the device is the host itself."""
        chosen = self.run.trainer.accelerator
        return chosen == "cpu" or (chosen == "auto" and not torch.cuda.is_available())

    @cached_property
    def ranks(self) -> int:
        """Processes of the run."""
        known = ranks_of(self.run.trainer)
        if known is not None:
            return known
        if self.on_cpu:
            return self.run.trainer.num_nodes
        if torch.cuda.is_available():
            return torch.cuda.device_count() * self.run.trainer.num_nodes
        raise ConfigError("trainer.devices='auto' on a machine without GPUs: give the number of devices per node")

    @property
    def ranks_per_node(self) -> int:
        """Processes that share a host."""
        return self.ranks // self.run.trainer.num_nodes

    @cached_property
    def networks(self) -> dict[str, Network]:
        """The models by role."""
        return networks_of(self.run, self.dtype)

    @cached_property
    def tokens(self) -> int:
        """Prompt and response tokens of the longest row.

        Raises:
            ConfigError: if nothing limits prompts, or the limits leave no room for one.
        """
        new, given = self.run.rollout.max_new_tokens, self.run.prompt_tokens
        if given is not None:
            return given + new
        limits = [self.networks["actor"].positions, self.run.data.max_length]
        if self.run.rollout.backend == "native":
            limits.append(self.run.strategy.hybrid_engine.max_out_tokens)
        known = [limit for limit in limits if limit is not None]
        if not known or min(known) <= new:
            raise ConfigError(
                f"no prompt fits beside rollout.max_new_tokens={new} (limits of both: {known or 'none'}): "
                "set prompt_tokens to the length of the longest prompt, in tokens"
            )
        return min(known)

    @property
    def prompt(self) -> int:
        """Tokens of the longest prompt."""
        return self.tokens - self.run.rollout.max_new_tokens

    @property
    def micro_batch(self) -> int:
        """Sequences of one forward pass."""
        return min(self.run.algorithm.micro_batch_size, self.minibatch)

    @property
    def minibatch(self) -> int:
        """Sequences of one optimizer step on this rank."""
        asked = self.run.algorithm.minibatch_size
        return self.run.data.batch_size if asked is None else max(1, asked // self.ranks)

    @property
    def micro_batches(self) -> int:
        """Forward and backward passes between two optimizer steps."""
        return -(-self.minibatch // self.run.algorithm.micro_batch_size)

    @property
    def bucket(self) -> int:
        """Elements of the buffer that gradients are reduced in."""
        return int(self.zero["reduce_bucket_size"])


def device_bytes(setup: Setup) -> int:
    """Memory of one device: what was given, else what this machine has.

    Raises:
        ConfigError: for a GPU that is not here.
    """
    if setup.run.device_memory_gib is not None:
        return int(setup.run.device_memory_gib * 2**30)
    if setup.on_cpu:
        import psutil

        return int(psutil.virtual_memory().total // setup.ranks_per_node)
    if not torch.cuda.is_available():
        raise ConfigError("trainer.accelerator asks for a GPU and this machine has none: set device_memory_gib")
    return int(torch.cuda.get_device_properties(0).total_memory)
