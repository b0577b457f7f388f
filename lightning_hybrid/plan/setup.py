"""What of a run's settings its memory depends on, worked out once."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from lightning_hybrid.algorithms import GroupConfig
from lightning_hybrid.config.plan import PlanRun
from lightning_hybrid.config.roles import FrozenRoleConfig
from lightning_hybrid.config.roots import ranks_of
from lightning_hybrid.engines.build import config_dtype
from lightning_hybrid.engines.config import engine_config, merged
from lightning_hybrid.errors import ConfigError
from lightning_hybrid.plan.engine import Engine
from lightning_hybrid.plan.networks import ROLES, Network
from lightning_hybrid.plan.roles import networks_of
from lightning_hybrid.strategy import STRATEGIES

FP32 = 4


@dataclass(frozen=True)
class Setup:
    """A run as its memory sees it.

    Args:
        run: the configuration.
    """

    run: PlanRun

    @cached_property
    def engines(self) -> dict[str, Engine]:
        """The engine of each role, which may have a ZeRO stage of its own."""
        stages = {role: getattr(self.run.roles, role).zero_stage for role in ROLES}
        own = {role: {} if stage is None else {"zero_optimization": {"stage": stage}} for role, stage in stages.items()}
        return {role: self._engine(over) for role, over in own.items()}

    @cached_property
    def general(self) -> Engine:
        """An engine as the strategy configures it, whose role says nothing else."""
        return self._engine({})

    def _engine(self, own: Mapping[str, Any]) -> Engine:
        over = merged(dict(self.run.strategy.config), dict(own))
        arguments = dict(STRATEGIES[self.run.strategy.name][1])
        return Engine(engine_config(**arguments, precision=self.run.trainer.precision, overrides=over))

    def engine(self, network: Network) -> Engine:
        """What runs a model."""
        return self.engines[network.role]

    @property
    def stage(self) -> int:
        """The ZeRO stage of the actor, which trains and generates."""
        return self.engines["actor"].stage

    @cached_property
    def dtype(self) -> torch.dtype:
        """Of weights, gradients and arithmetic."""
        return config_dtype(self.general.config)

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
    def _all(self) -> dict[str, Network]:
        return networks_of(self.run, self.dtype)

    @cached_property
    def networks(self) -> dict[str, Network]:
        """The models of the ranks by name; a role may have several, such as reward models of several terms."""
        return {name: network for name, network in self._all.items() if not self._is_separate(network)}

    @cached_property
    def separate(self) -> dict[str, Network]:
        """The frozen models that live in processes of their own."""
        return {name: network for name, network in self._all.items() if self._is_separate(network)}

    def _is_separate(self, network: Network) -> bool:
        """What is trained never is."""
        role = getattr(self.run.roles, network.role)
        return isinstance(role, FrozenRoleConfig) and role.separate

    @cached_property
    def reference_is_actor(self) -> bool:
        """Whether the reference is the actor with its adapters off."""
        return self.run.algorithm.reference and "reference" not in self._all

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
    def rows(self) -> int:
        """Responses of one rank that an iteration learns from, which are also sampled and scored at once.

        With dynamic sampling, prompts are taken in turn, at most as many as groups are missing.
        """
        algorithm, prompts = self.run.algorithm, self.run.data.batch_size
        groups = algorithm.groups if isinstance(algorithm, GroupConfig) else None
        return (groups or prompts) * algorithm.group_size

    @property
    def drawn(self) -> int:
        """Responses of one rank that an iteration samples at most."""
        return self.run.data.batch_size * self.run.algorithm.group_size

    @property
    def micro_batch(self) -> int:
        """Sequences of one forward pass."""
        return min(self.run.algorithm.micro_batch_size, self.minibatch)

    @property
    def minibatch(self) -> int:
        """Sequences of one optimizer step on this rank."""
        asked = self.run.algorithm.minibatch_size
        return self.rows if asked is None else max(1, asked // self.ranks)

    @property
    def micro_batches(self) -> int:
        """Forward and backward passes of rollouts between two optimizer steps."""
        return -(-self.minibatch // self.run.algorithm.micro_batch_size)

    @property
    def ptx_tokens(self) -> int:
        """Tokens of the longest text of the PTX loss.

        Raises:
            ConfigError: if nothing limits them.
        """
        limit = self.run.ptx.max_length or self.networks["actor"].positions
        if limit is None:
            raise ConfigError("nothing limits the texts of the PTX loss: set ptx.max_length, in tokens")
        return limit


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
