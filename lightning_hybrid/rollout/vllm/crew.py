"""Separate engines as all ranks see them together: given weights by all, and started anew by all."""

from __future__ import annotations

import socket
from collections.abc import Callable
from typing import Any

import torch
from lightning_utilities.core.rank_zero import rank_zero_warn

from lightning_hybrid.config import VLLMConfig
from lightning_hybrid.engines.agreement import number_of_ranks, of_all_ranks, on_every_rank, own_rank
from lightning_hybrid.errors import ConfigError, RolloutError
from lightning_hybrid.rollout.vllm.fleet import Address, Fleet, engine_specs
from lightning_hybrid.rollout.vllm.orders import Lines
from lightning_hybrid.rollout.vllm.weights import WeightStream, refuse_others
from lightning_hybrid.serving import ServerClient
from lightning_hybrid.serving.addresses import is_local

Losses = dict[int, str]
"""why engines are lost, by their number; equal on all ranks where a method of the crew returns it"""


class Crew:
    """The engines, their weights, and what becomes of one that dies or hangs.

    A rank that finds an engine lost cannot start it anew by itself: processes are rank 0's, and the weights that it
    needs may lie in shards on all ranks. So a rank only notes it, wherever that is, and goes on to the next place where
    all ranks meet (:meth:`meet`): at the end of waiting for responses, and when weights are given. There each learns
    of all losses, and all do the same: rank 0 starts new processes, and all ranks give weights again, to all engines.

    Nobody can hang in it. All ranks call the same methods in the same order, decide by what all were told, and bring
    exceptions to the next meeting instead of leaving. Between meetings a rank waits for engines only, each time for
    no longer than ``timeout_seconds``; and who sends weights, or receives them, parts from the group when it fails, so
    that the others' connections end.

    Args:
        config: of the engines.

    Attributes:
        lines: this rank's to its engines.
        longest: tokens that prompt and response may have together.
    """

    def __init__(self, config: VLLMConfig) -> None:
        self._config = config
        self._fleet: Fleet | None = None
        self._addresses: list[Address] = []
        self._restarted: dict[int, str] = {}
        self._shapes: dict[str, tuple[int, ...]] = {}
        self.lines = Lines({}, config.timeout_seconds)
        self.longest = 0

    def start(self, model: Any, device: torch.device, dtype: torch.dtype) -> None:
        """Start the engines, without weights; all ranks call it.

        Raises:
            ConfigError: on every rank, if one does not start, or would not be reached from other machines.
        """
        weights = WeightStream(model)
        self._shapes = weights.shapes
        hosts = of_all_ranks(socket.gethostname())
        beside = hosts.count(hosts[0])

        def fleet() -> Fleet | None:
            if own_rank() > 0:
                return None
            return Fleet(engine_specs(self._config, weights, device, dtype, beside), self._config, device)

        self._fleet = on_every_rank(fleet, "vLLM", ConfigError)
        self._by_the_first(Fleet.start, "starting vLLM", ConfigError)
        self._connect()
        if len(set(hosts)) > 1 and any(is_local(address.url) for address in self._addresses):
            raise ConfigError(
                f"rollout.vllm.colocate=false starts engines that only the first of {len(set(hosts))} machines "
                "reaches: use launcher=ray, or colocate=true"
            )

    def close(self) -> None:
        """End the engines, on rank 0, and let go of them."""
        self.lines.close()
        fleet, self._fleet = self._fleet, None
        if fleet is not None:
            fleet.close()

    def meet(self, own: Callable[[], None] = lambda: None) -> Losses:
        """Do what is this rank's own, and learn which engines any rank has lost; all ranks call it.

        Raises:
            RolloutError: on every rank, where it failed on one.
        """
        on_every_rank(own, "vLLM", RolloutError)
        return {engine: why for lost in of_all_ranks(self.lines.lost) for engine, why in lost.items()}

    def give(self, engine: Any, version: int, lost: Losses, needed: bool = True) -> set[int]:
        """Hold back what is under way, and give weights to all engines; all ranks call it.

        Args:
            engine: that trains, or a bare model.
            version: of its weights.
            lost: engines to start anew before.
            needed: give weights also where no engine was started anew.

        Returns:
            Engines that were started anew, and know of no requests.

        Raises:
            RolloutError: on every rank, for an engine that is lost a second time since :meth:`forgive`, or weights
                that do not fit.
        """
        renewed: set[int] = set()
        while True:
            lost = lost or self.meet() or self._by_the_first(Fleet.pause, "holding vLLM back")
            if not lost and (needed or renewed):
                lost = self._given(engine, version)
            if not lost:
                return renewed
            self._restart(lost)
            renewed |= lost.keys()
            lost = {}

    def resume(self) -> None:
        """Go on with what is held back; engines that do not are found to be lost at the next meeting."""
        if self._fleet is not None:
            self.lines.lost |= self._fleet.resume()

    def forgive(self) -> None:
        """Engines that were started anew until now may be once more."""
        self._restarted.clear()

    def _given(self, engine: Any, version: int) -> Losses:
        weights = WeightStream(getattr(engine, "causal_lm", engine))
        refuse_others(weights.shapes, self._shapes)
        # The first rank waits for the others' shards.
        return self._by_the_first(lambda fleet: fleet.give(weights, version), "giving weights", others=weights.drain)

    def _restart(self, lost: Losses) -> None:
        ends = self._by_the_first(lambda fleet: fleet.end(lost), "ending vLLM")
        for engine, why in lost.items():
            what = f"{self._addresses[engine].what} at {self._addresses[engine].url}"
            story = f"{what} is lost: {why}; {ends[engine]}"
            if engine in self._restarted:
                error = RolloutError(f"{story}\nand before it was started anew: {self._restarted[engine]}")
                error.on_every_rank = True
                raise error
            self._restarted[engine] = story
            rank_zero_warn(f"{story}\nIt is started anew, once.")
        self._by_the_first(lambda fleet: fleet.restart(sorted(lost)), "starting vLLM anew")
        self._connect()

    def _connect(self) -> None:
        """Lines to this rank's engines; those to engines that are where they were stay open."""
        fleet = self._fleet
        told = of_all_ranks(None if fleet is None else (fleet.addresses, fleet.longest))[0]
        assert told is not None
        before, (self._addresses, self.longest) = self._addresses, told
        own = engines_of(own_rank(), number_of_ranks(), len(self._addresses))
        there = self.lines.clients
        clients = {engine: there[engine] for engine in own if before and before[engine] == self._addresses[engine]}
        for engine in own:
            if engine not in clients:
                clients[engine] = ServerClient(*self._addresses[engine], self._config.timeout_seconds)
        self.lines.renew(clients)

    def _by_the_first(
        self,
        step: Callable[[Fleet], Losses | None],
        what: str,
        error: type[Any] = RolloutError,
        others: Callable[[], None] = lambda: None,
    ) -> Losses:
        """What rank 0's step gives, on all ranks; meanwhile the others do theirs."""
        fleet = self._fleet
        given = on_every_rank(lambda: others() if fleet is None else step(fleet), f"vLLM, {what},", error)
        return of_all_ranks(given)[0] or {}


def engines_of(rank: int, ranks: int, engines: int) -> list[int]:
    """The engines that answer a rank: one that it may share with others, or several of its own."""
    if engines <= ranks:
        return [rank * engines // ranks]
    return list(range(rank, engines, ranks))
