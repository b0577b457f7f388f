"""Frozen models in processes of their own: started with a run, asked by all ranks, started again once, and ended."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from lightning.pytorch.callbacks import Callback
from torch.distributed import default_pg_timeout
from typing_extensions import override

from lightning_hybrid.engines import config_dtype
from lightning_hybrid.engines.agreement import agree, of_all_ranks, on_every_rank, own_rank
from lightning_hybrid.errors import CheckpointError, ConfigError, LightningHybridError, RewardError, ServerError
from lightning_hybrid.modules.reference import ServedReference
from lightning_hybrid.rewards import ServedReward
from lightning_hybrid.serving import RunningServer, ServerClient, ServerSpec, end_servers, start_servers
from lightning_hybrid.serving.addresses import is_local
from lightning_hybrid.strategy import HybridDeepSpeedStrategy

if TYPE_CHECKING:
    import lightning as L

    from lightning_hybrid.modules.ppo import PPOModule

LOGGER = logging.getLogger("lightning_hybrid")
T = TypeVar("T")
Address = tuple[str, str, str]  # url, token, and what answers there
PATIENCE = 5.0  # seconds in which a process that closed its connections ends
# Of the time after which the other ranks give up on one that waits for its answer.
SHARE_OF_TIMEOUT = 0.9


class SeparateRoles:
    """The processes of a module's frozen models, which the first rank starts.

    Attributes:
        weights: a digest of each model's, by its role.
    """

    def __init__(self) -> None:
        self._parts: list[ServedReward | ServedReference] = []
        self._specs: list[ServerSpec] = []
        self._running: list[RunningServer] = []  # on the first rank
        self._clients: list[ServerClient] = []
        self._again: set[int] = set()
        self._timeout = 0.0
        self.weights: dict[str, str] = {}

    def start(self, module: PPOModule) -> None:
        """Start them, if there are any, and wait until they have loaded; all ranks call it.

        Raises:
            ConfigError: on every rank, if one does not start, or would not be reached from other machines.
        """
        self.close()
        self._specs, self.weights = [], {}
        served = [module.reference] if isinstance(module.reference, ServedReference) else []
        self._parts = [*module.reward.served, *served]
        if not self._parts:
            return
        strategy = module.trainer.strategy
        self._refuse_cpu_beside(strategy.root_device)
        dtype = torch.float32
        if isinstance(strategy, HybridDeepSpeedStrategy):
            dtype = config_dtype(strategy.engine_config())
        self._timeout = SHARE_OF_TIMEOUT * (getattr(strategy, "_timeout", None) or default_pg_timeout).total_seconds()
        self._specs = [
            part.spec(dtype) if isinstance(part, ServedReward) else part.spec(module, dtype) for part in self._parts
        ]
        self._connect(on_every_rank(self._started, "starting the processes of frozen models", ConfigError))
        self._refuse_unreachable(module.trainer.num_nodes)
        self.weights = on_every_rank(self._digests, "asking frozen models for their weights", ConfigError)

    def refuse_other_weights(self, saved: Mapping[str, str]) -> None:
        """Raise where a model is not the one that a checkpoint was written with.

        Args:
            saved: :attr:`weights` of then; a model that was in the ranks then is not among them.

        Raises:
            CheckpointError: naming it.
        """
        for role, spec in zip(self.weights, self._specs, strict=True):
            if self.weights[role] != saved.get(role, self.weights[role]):
                raise CheckpointError(
                    f"the weights of {spec.what} are not those that the checkpoint was written with as its {role}: "
                    "give the same model and precision"
                )

    def close(self) -> None:
        """End them."""
        for part in self._parts:
            part.connect(None)
        for client in self._clients:
            client.close()
        for server in self._running:
            server.close()
        self._parts, self._clients, self._running = [], [], []
        self._again.clear()

    def on_every_rank(
        self, compute: Callable[[], T], what: str = "the reward", error: type[LightningHybridError] = RewardError
    ) -> T:
        """What ``compute`` returns, as :func:`~lightning_hybrid.engines.agreement.on_every_rank` does.

        Where a process has ended meanwhile, it is started again, once in a run, and all ranks compute again.

        Args:
            compute: asks one of the processes, perhaps on some ranks only.
            what: fails, for the message.
            error: raised where a rank failed.
        """
        outcome = _outcome(compute)
        while any(of_all_ranks(_was_lost(outcome))):  # another one may have ended at the same time
            ended = self._ended()
            if not self._started_again(ended):
                told = " and ".join(f"{self._specs[number].what}: {how}" for number, how in ended.items())
                return agree(ServerError(told) if ended else outcome, what, error)
            outcome = _outcome(compute)
        return agree(outcome, what, error)

    def _refuse_cpu_beside(self, device: torch.device) -> None:
        for part in self._parts if device.type == "cuda" else ():
            if part.device is None:
                role = "reward" if isinstance(part, ServedReward) else "reference"
                self.close()
                raise ConfigError(
                    f"roles.{role}.device is the CPU, beside ranks on {device}: give the process a CUDA index; it may "
                    "be one of theirs that has the room"
                )

    def _digests(self) -> dict[str, str]:
        roles = [f"reward {n}" if isinstance(part, ServedReward) else "reference" for n, part in enumerate(self._parts)]
        return {role: client.call("about")["weights"] for role, client in zip(roles, self._clients, strict=True)}

    def _started(self) -> list[Address]:
        if own_rank() == 0:
            self._running = start_servers(self._specs)
        return self._addresses()

    def _addresses(self) -> list[Address]:
        """Empty on other ranks than the first."""
        return [(server.url, server.token, spec.what) for server, spec in zip(self._running, self._specs, strict=False)]

    def _connect(self, addresses: list[Address]) -> None:
        for client in self._clients:
            client.close()
        of_first = of_all_ranks(addresses)[0]
        self._clients = [ServerClient(*address, self._timeout) for address in of_first]
        for part, client in zip(self._parts, self._clients, strict=True):
            part.connect(client)

    def _refuse_unreachable(self, nodes: int) -> None:
        if nodes > 1 and any(is_local(client.url) for client in self._clients):
            self.close()
            raise ConfigError(
                "roles.reference.separate and roles.reward.separate start processes that only the first of "
                f"{nodes} machines reaches: use launcher=ray, or leave them in the ranks"
            )

    def _ended(self) -> dict[int, str]:
        """How processes ended, by their number; empty on other ranks than the first."""
        deadline, ended = time.monotonic() + PATIENCE, dict[int, str]()
        while self._running and not ended and time.monotonic() < deadline:
            time.sleep(0.05)  # connections close before the process has ended
            states = {number: server.exited() for number, server in enumerate(self._running)}
            ended = {number: how for number, how in states.items() if how is not None}
        return ended

    def _started_again(self, ended: dict[int, str]) -> bool:
        """Start what has ended again, unless some of it was before; all ranks call it, and hear the same."""
        renew = bool(ended) and not self._again & ended.keys()
        if not any(of_all_ranks(renew)):
            return False
        self._connect(on_every_rank(lambda: self._renewed(ended), "starting a frozen model again", ServerError))
        return True

    def _renewed(self, ended: dict[int, str]) -> list[Address]:
        for number, how in ended.items():
            LOGGER.warning(f"{self._specs[number].what} is started again: {how}")
            self._running[number].close()
        renewed = start_servers([self._specs[number] for number in ended])
        for number, server in zip(ended, renewed, strict=True):
            self._running[number] = server
        self._again |= ended.keys()
        return self._addresses()


class EndServers(Callback):
    """Ends the processes that this one has started for a run which an error or an interrupt ends."""

    @override
    def on_exception(self, trainer: L.Trainer, pl_module: Any, exception: BaseException) -> None:
        pl_module.separate.close()
        end_servers()


def _outcome(compute: Callable[[], T]) -> T | Exception:
    try:
        return compute()
    except Exception as error:
        return error


def _was_lost(outcome: object) -> bool:
    return isinstance(outcome, ServerError) and outcome.status is None
