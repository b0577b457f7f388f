"""Rank 0's part in separate engines: their processes, and the weights that it sends to all of them at once."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import asdict, replace
from typing import Any, NamedTuple

import torch

from lightning_hybrid.config import VLLMConfig
from lightning_hybrid.errors import ConfigError, RolloutError, ServerError
from lightning_hybrid.rollout.vllm.transfer import MIB, GroupError, Meeting, WeightGroup, open_store, send
from lightning_hybrid.rollout.vllm.weights import WeightStream
from lightning_hybrid.serving import RunningServer, ServerClient, ServerSpec, start_servers
from lightning_hybrid.serving.addresses import host_of, host_towards
from lightning_hybrid.serving.background import in_background
from lightning_hybrid.serving.process import close_all, devices_are_given

MODULE = "lightning_hybrid.rollout.vllm.engine_server"
ALIVE_SECONDS = 10.0  # to say that it is there


class Address(NamedTuple):
    """Where an engine answers, whom, and what it is."""

    url: str
    token: str
    what: str


class Fleet:
    """Starts engines, sends them weights, and starts anew those that were lost.

    Args:
        specs: of their processes.
        config: of the engines.
        device: of the weights.

    Attributes:
        addresses: of the engines, in their order.
        longest: tokens that prompt and response may have together.
    """

    def __init__(self, specs: Sequence[ServerSpec], config: VLLMConfig, device: torch.device) -> None:
        self._specs, self._config, self._device = list(specs), config, device
        self._servers: list[RunningServer] = []
        self._clients: list[ServerClient] = []
        self._group: WeightGroup | None = None
        self._threads = ThreadPoolExecutor(len(specs), "engines")
        self.addresses: list[Address] = []
        self.longest = 0

    def start(self) -> None:
        """Start all of them.

        Raises:
            ConfigError: if one does not start.
        """
        self._servers = start_servers(self._specs)
        self._meet()

    def close(self) -> None:
        """End them."""
        self._part()
        for client in self._clients:
            client.close()
        close_all(self._servers)
        self._threads.shutdown()

    def pause(self) -> dict[int, str]:
        """Have all hold back what is under way; which are lost, and why."""
        return self._losses(self._ask_all("pause"))

    def resume(self) -> dict[int, str]:
        """Have all go on; which are lost, and why."""
        return self._losses(self._ask_all("resume"))

    def give(self, weights: WeightStream, version: int) -> dict[int, str]:
        """Send weights to all; which are lost, and why. The stream is at its end afterwards.

        Raises:
            RolloutError: for weights that an engine refuses.
        """
        size = self._config.bucket_mib * MIB
        ask = {"version": version, "weights": weights.announced, "bucket_bytes": size}
        try:
            answers = self._ask_all("take_weights", lambda _: ask)
            failed = self._send(weights, size)
        finally:
            weights.drain()
        if any(answer.exception() for answer in wait(answers, return_when=FIRST_EXCEPTION).done):
            self._part()  # so that the others do not wait for the one that failed
        losses = self._losses(answers)
        if failed is not None and not losses:
            raise RolloutError(f"sending weights to the vLLM engines failed, while all of them took them: {failed}")
        return losses

    def _send(self, weights: WeightStream, size: int) -> str | None:
        """Why it failed half-way; None where all went out."""
        assert self._group is not None
        bucket = torch.empty(min(size, weights.bytes), dtype=torch.uint8, device=self._device)
        try:
            send(weights, bucket, self._group.broadcast)
        except GroupError as error:
            self._part()  # so that no engine waits for the rest
            return str(error)
        return None

    def end(self, engines: Collection[int]) -> dict[int, str]:
        """End these, and say of each how its process had ended."""
        self._part()
        ends = {engine: self._servers[engine].exited() for engine in engines}
        close_all([self._servers[engine] for engine in engines])
        return {engine: end or "its process still ran, and was ended" for engine, end in ends.items()}

    def restart(self, engines: Sequence[int]) -> None:
        """Start these anew, and have all meet again; none has weights that can be relied on.

        Raises:
            ConfigError: if one does not start.
        """
        started = start_servers([self._specs[engine] for engine in engines])
        for engine, server in zip(engines, started, strict=True):
            self._servers[engine] = server
        self._meet()

    def _meet(self) -> None:
        self._part()
        for client in self._clients:
            client.close()
        config, size = self._config, self._config.tensor_parallel_size
        self.addresses = [Address(s.url, s.token, p.what) for s, p in zip(self._servers, self._specs, strict=True)]
        self._clients = [ServerClient(*address, config.timeout_seconds) for address in self.addresses]
        host = host_towards([address.url for address in self.addresses])
        store, port = open_store(host, config.timeout_seconds)
        meeting = Meeting(host, port, 1 + len(self._servers) * size, config.timeout_seconds)

        def member(engine: int) -> dict[str, Any]:
            return {"meeting": asdict(meeting), "first": 1 + engine * size, "host": host_of(self.addresses[engine].url)}

        answers = self._ask_all("join", member)
        self._group = _met(in_background(lambda: WeightGroup(meeting, 0, self._device, host, store)), answers, meeting)
        self.longest = min(answer.result()["longest"] for answer in self._ask_all("about"))

    def _part(self) -> None:
        group, self._group = self._group, None
        if group is not None:
            with suppress(RuntimeError):  # of a member that is gone
                group.close()

    def _ask_all(
        self, route: str, values: Callable[[int], dict[str, Any]] = lambda _: {}
    ) -> list[Future[dict[str, Any]]]:
        ask = self._threads.submit
        return [ask(client.call, route, **values(engine)) for engine, client in enumerate(self._clients)]

    def _losses(self, answers: Sequence[Future[dict[str, Any]]]) -> dict[int, str]:
        """Engines that did not do as they were asked, or of these only those that are gone, where some are.

        Where one is gone, the others could not go on with it, and are sound.

        Raises:
            RolloutError: for a refusal.
        """
        errors = {engine: error for engine, answer in enumerate(answers) if (error := answer.exception()) is not None}
        for error in errors.values():
            if not isinstance(error, ServerError):
                raise error
            if error.refused:
                raise RolloutError(str(error)) from error
        gone = {engine: str(error) for engine, error in errors.items() if not self._is_there(engine)}
        return gone or {engine: str(error) for engine, error in errors.items()}

    def _is_there(self, engine: int) -> bool:
        if self._servers[engine].exited() is not None:
            return False
        client = ServerClient(*self.addresses[engine], ALIVE_SECONDS)
        try:
            client.call("about")
        except ServerError:
            return False
        finally:
            client.close()
        return True


def _met(group: Future[WeightGroup], answers: Sequence[Future[Any]], meeting: Meeting) -> WeightGroup:
    """The group when all have joined it.

    Raises:
        ServerError: of an engine that could not, for which the others would wait in vain.
        RolloutError: where one hangs, also inside NCCL, which knows no time limit then.
    """
    members = [*answers, group]
    done = wait(members, meeting.seconds + ALIVE_SECONDS, FIRST_EXCEPTION).done
    if group in done and group.exception() is not None:
        wait(answers, ALIVE_SECONDS, FIRST_EXCEPTION)  # an engine knows better why it is not there
    for member in members:
        if member.done():
            member.result()
    if not all(member.done() for member in members):
        raise RolloutError(f"the vLLM engines did not meet rank 0 within {meeting.seconds:g} seconds to take weights")
    return group.result()


def engine_specs(
    config: VLLMConfig, weights: WeightStream, device: torch.device, dtype: torch.dtype, beside: int
) -> list[ServerSpec]:
    """The processes of the engines, for rank 0 to start.

    Args:
        config: of the engines.
        weights: of the model, of which the configuration is read.
        device: of this rank.
        dtype: of the engines' weights and arithmetic.
        beside: ranks on this machine, which have its first devices.

    Raises:
        ConfigError: if there are too few devices beside the ranks'.
    """
    settings = {
        "vllm": config.model_dump(),
        "model": weights.config.to_json_string(use_diff=False),
        "device": device.type,
        "dtype": str(dtype).removeprefix("torch."),
    }
    spec = ServerSpec("", MODULE, settings, cpus=float(config.tensor_parallel_size))
    shares = _devices(config, device, beside)
    return [replace(spec, what=f"vLLM engine {engine}", devices=share) for engine, share in enumerate(shares)]


def _devices(config: VLLMConfig, device: torch.device, beside: int) -> Sequence[tuple[int, ...] | None]:
    engines, size = config.processes, config.tensor_parallel_size
    if device.type != "cuda":
        return [None] * engines
    if devices_are_given():
        return [tuple(range(size))] * engines
    there = torch.cuda.device_count()
    chosen = config.devices or list(range(beside, beside + engines * size))
    if max(chosen) >= there:
        raise ConfigError(
            f"rollout.vllm: {engines} engines on {size} devices each need the CUDA devices {chosen}, and there are "
            f"{there}, of which the ranks have the first {beside}: lower num_engines, tensor_parallel_size or "
            "trainer.devices, name free ones in rollout.vllm.devices, or set colocate=true"
        )
    return [tuple(chosen[engine * size : (engine + 1) * size]) for engine in range(engines)]
