"""Servers of roles as Ray actors, with resources of their own on any node."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any

from lightning_hybrid.clusters.order import secret_variables, shown_variables
from lightning_hybrid.config import LauncherConfig
from lightning_hybrid.errors import ConfigError, LightningHybridError
from lightning_hybrid.serving import RunningServer, ServerSpec, start_local

ANSWER_SECONDS = 10.0  # for an actor that is there to say how its server is
CLOSE_SECONDS = 30.0  # for a server to end in order


class ServerActor:
    """The process of a role on the node where Ray has put it, listening at that node's address.

    Args:
        spec: of the process.
        secrets: variables of its environment that Ray is not to show.
    """

    def __init__(self, spec: ServerSpec, secrets: dict[str, str]) -> None:
        os.environ.update(secrets)
        self._spec = replace(spec, devices=None)  # those that Ray has given to this actor
        self._server: RunningServer | None = None

    def start(self) -> tuple[str, str] | str:
        """Start it, and return its URL and token, or why it did not start."""
        import ray.util

        util: Any = ray.util
        try:
            [self._server] = start_local([self._spec], host=util.get_node_ip_address())
        except LightningHybridError as error:
            return str(error)
        return self._server.url, self._server.token

    def exited(self) -> str | None:
        """How the process ended, and the last that it said; None while it runs."""
        return None if self._server is None else self._server.exited()

    def close(self) -> None:
        """End it."""
        if self._server is not None:
            self._server.close()


class RayServer:
    """A server in an actor, see :class:`~lightning_hybrid.serving.RunningServer`.

    Attributes:
        url: where it answers.
        token: for whom.
    """

    def __init__(self, actor: Any, url: str, token: str, release: Callable[[], None]) -> None:
        self.url, self.token = url, token
        self._actor, self._release = actor, release
        self._closed = False

    def exited(self) -> str | None:
        """How the process, its actor or their node ended; None while nothing is known of it."""
        import ray

        try:
            how: str | None = ray.get(self._actor.exited.remote(), timeout=ANSWER_SECONDS)
        except ray.exceptions.GetTimeoutError:
            return None
        except ray.exceptions.RayActorError as error:
            return f"its Ray actor is gone: {error}"
        return how

    def close(self) -> None:
        """End it, and give its resources back."""
        if self._closed:
            return
        self._closed = True
        _end(self._actor)
        self._release()


class RayStarter:
    """Starts servers as actors in a placement group, see :func:`~lightning_hybrid.serving.use_starter`.

    Actors end with the worker that started them.

    Args:
        launcher: says how many resources each has, and where they are placed.
        on_gpus: whether the run is on GPUs.
    """

    def __init__(self, launcher: LauncherConfig, *, on_gpus: bool) -> None:
        self._launcher, self._on_gpus = launcher, on_gpus

    def __call__(self, specs: Sequence[ServerSpec]) -> list[RunningServer]:
        """Start all of them side by side.

        Raises:
            ConfigError: if the cluster has no room for them, or one does not start; nothing is left of the others.
        """
        import ray

        if not specs:
            return []
        group = self._reserved(specs)
        actors = [self._actor(spec, group, index) for index, spec in enumerate(specs)]
        try:
            answers = _answers(specs, ray.get([actor.start.remote() for actor in actors]))
        except BaseException as error:
            for actor in actors:
                _end(actor)
            ray.util.remove_placement_group(group)
            if isinstance(error, ray.exceptions.RayActorError):
                raise ConfigError(f"{_names(specs)}: a Ray actor ended while it started: {error}") from error
            raise
        release = _after(len(actors), lambda: ray.util.remove_placement_group(group))
        return [RayServer(actor, *answer, release) for actor, answer in zip(actors, answers, strict=True)]

    def _share(self, spec: ServerSpec) -> dict[str, float]:
        gpus = gpus_of_server(self._launcher, self._on_gpus, None if spec.devices is None else len(spec.devices))
        return {"CPU": self._launcher.cpus_per_server} | ({"GPU": gpus} if gpus else {})

    def _reserved(self, specs: Sequence[ServerSpec]) -> Any:
        import ray

        bundles = [self._share(spec) for spec in specs]
        group = ray.util.placement_group(bundles, strategy=self._launcher.placement)
        if group.wait(self._launcher.startup_timeout_seconds):
            return group
        ray.util.remove_placement_group(group)
        raise ConfigError(
            f"{_names(specs)}: the Ray cluster had no room for {bundles} within "
            f"launcher.startup_timeout_seconds={self._launcher.startup_timeout_seconds:g} beside the ranks; free now: "
            f"{_free(ray)}. Add nodes, or lower launcher.cpus_per_server or launcher.cpus_per_rank"
        )

    def _actor(self, spec: ServerSpec, group: Any, index: int) -> Any:
        import ray
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        share = self._share(spec)
        return (
            ray.remote(ServerActor)
            .options(
                num_cpus=share["CPU"],
                num_gpus=share.get("GPU", 0),
                max_restarts=0,
                max_concurrency=2,  # to say how it is while it does something else
                scheduling_strategy=PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=index),
                runtime_env={"env_vars": shown_variables()},
            )
            .remote(spec, secret_variables())
        )


def gpus_of_server(launcher: LauncherConfig, on_gpus: bool, devices: int | None) -> float:
    """GPUs that Ray sets aside for a server.

    Args:
        launcher: may say so.
        on_gpus: whether the run is on GPUs.
        devices: that it asks for; None for one, where there are any.
    """
    if launcher.gpus_per_server is not None:
        return launcher.gpus_per_server
    if not on_gpus:
        return 0.0
    return 1.0 if devices is None else float(devices)


def _answers(specs: Sequence[ServerSpec], answers: Sequence[tuple[str, str] | str]) -> list[tuple[str, str]]:
    failed = [answer for answer in answers if isinstance(answer, str)]
    if failed:
        raise ConfigError("\n".join(failed))
    return [answer for answer in answers if not isinstance(answer, str)]


def _names(specs: Sequence[ServerSpec]) -> str:
    return ", ".join(spec.what for spec in specs)


def _free(ray: Any) -> str:
    free = ray.available_resources()
    return ", ".join(f"{free.get(name, 0.0):g} {name}" for name in ("CPU", "GPU"))


def _end(actor: Any) -> None:
    """End the actor and its process; the process also ends where only the actor is killed, a moment later."""
    import ray

    try:
        with suppress(ray.exceptions.RayActorError, ray.exceptions.GetTimeoutError):
            ray.get(actor.close.remote(), timeout=CLOSE_SECONDS)
    finally:
        ray.kill(actor)


def _after(count: int, act: Callable[[], None]) -> Callable[[], None]:
    """Something to be called ``count`` times, which acts at the last."""
    left = [None] * count

    def release() -> None:
        left.pop()
        if not left:
            act()

    return release
