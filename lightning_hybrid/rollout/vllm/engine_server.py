"""The process of a vLLM engine: ``python -m lightning_hybrid.rollout.vllm.engine_server``, started by rank 0."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any

import torch

from lightning_hybrid.config import VLLMConfig
from lightning_hybrid.generation import SamplingParams
from lightning_hybrid.rollout.vllm.loop import EngineLoop, Job
from lightning_hybrid.rollout.vllm.machine import start_machine
from lightning_hybrid.rollout.vllm.requests import Draw
from lightning_hybrid.rollout.vllm.transfer import Meeting
from lightning_hybrid.serving import Route, main_of
from lightning_hybrid.serving.server import end_children


def make(settings: dict[str, Any]) -> Mapping[str, Route]:
    """Start the engine.

    Args:
        settings: ``vllm``: of the engine; ``model``: text of its ``config.json``; ``device``: type; ``dtype``.
    """
    config = VLLMConfig(**settings["vllm"])
    machine = start_machine(config, settings["model"], torch.device(settings["device"]), settings["dtype"])
    return Routes(EngineLoop(machine), machine.longest).by_name()


class Routes:
    """The engine's loop as routes: JSON objects in and out.

    Args:
        loop: of the engine.
        longest: tokens that prompt and response may have together.
    """

    def __init__(self, loop: EngineLoop, longest: int) -> None:
        self._loop, self._longest = loop, longest

    def by_name(self) -> dict[str, Route]:
        """All of them."""
        routes = (self.about, self.submit, self.collect, self.pause, self.resume, self.join, self.take_weights)
        return {route.__name__: route for route in routes}

    def about(self, _: dict[str, Any]) -> dict[str, Any]:
        """What it is; an error where the engine has failed."""
        self._loop.check()
        return {"longest": self._longest, "version": self._loop.version}

    def submit(self, request: dict[str, Any]) -> dict[str, Any]:
        """Begin ``n`` responses to each of ``requests`` (``key``, ``prompt``, ``index``, ``seed``) of an ``owner``."""
        sampling, owner, urgent = SamplingParams(**request["sampling"]), request["owner"], request["urgent"]
        jobs = [
            Job(owner, given["key"], given["prompt"], Draw(sampling, given["seed"], given["index"], sample), urgent)
            for given in request["requests"]
            for sample in range(sampling.n)
        ]
        self._loop.submit(jobs)
        return {}

    def collect(self, request: dict[str, Any]) -> dict[str, Any]:
        """What an ``owner``'s requests have got since the last time, within ``seconds``."""
        jobs, silent = self._loop.collect(request["owner"], request["seconds"])
        finished = [{"key": job.key, "sample": job.draw.sample, **asdict(job.response)} for job in jobs]
        return {"finished": finished, "silent": silent}

    def pause(self, _: dict[str, Any]) -> dict[str, Any]:
        """Hold back what is under way."""
        return {"held": self._loop.pause()}

    def resume(self, _: dict[str, Any]) -> dict[str, Any]:
        """Go on with it."""
        self._loop.resume()
        return {}

    def join(self, request: dict[str, Any]) -> dict[str, Any]:
        """Meet rank 0 at ``meeting``, as its members from number ``first`` on, reached at ``host``."""
        self._loop.join(Meeting(**request["meeting"]), request["first"], request["host"])
        return {}

    def take_weights(self, request: dict[str, Any]) -> dict[str, Any]:
        """Load the ``weights`` that rank 0 sends (name, dtype, shape), in buckets of ``bucket_bytes``."""
        self._loop.take(request["version"], request["weights"], request["bucket_bytes"])
        return {}


def main(make: Callable[[dict[str, Any]], Mapping[str, Route]]) -> None:
    """The body of an engine's process, see :func:`~lightning_hybrid.serving.main_of`."""
    try:
        main_of(make)
    except SystemExit as end:
        # It has nothing to bring to an end, and would take seconds to part from the group of weights and unload vLLM.
        end_children()  # its workers
        os._exit(end.code if isinstance(end.code, int) else 1)


if __name__ == "__main__":
    main(make)
