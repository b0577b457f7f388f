"""The one thread that owns a vLLM engine: it draws tokens, and between two steps does what it is asked."""

from __future__ import annotations

import queue
import threading
import time
import traceback
from collections import defaultdict
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

from lightning_hybrid.errors import RolloutError
from lightning_hybrid.rollout.vllm.machine import Drawn
from lightning_hybrid.rollout.vllm.requests import Draw, Response
from lightning_hybrid.rollout.vllm.transfer import Announced, Meeting

T = TypeVar("T")


class Steps(Protocol):
    """What the loop needs of :class:`~lightning_hybrid.rollout.vllm.machine.Machine`."""

    def add(self, name: str, prompt: Sequence[int], draw: Draw, drawn: int) -> None:
        """Begin a response, or go on with one."""

    def step(self) -> list[Drawn]:
        """Draw tokens."""

    def stop(self, names: Sequence[str]) -> None:
        """Forget all requests, which have these names."""

    def join(self, meeting: Meeting, first: int, host: str) -> None:
        """Let the workers meet rank 0."""

    def take(self, announced: Announced, bucket_bytes: int) -> None:
        """Load weights, and forget what was cached with the old ones."""


@dataclass
class Job:
    """A response that is asked for, and what there is of it.

    Attributes:
        owner: who asked, and collects it.
        key: of the request, the owner's own.
        prompt: token ids.
        draw: how it is drawn.
        urgent: goes on while others are held back.
        response: so far.
    """

    owner: str
    key: int
    prompt: list[int]
    draw: Draw
    urgent: bool
    response: Response = field(default_factory=Response)


class EngineLoop:
    """Continuous batching of what several ranks ask for, through changes of weights.

    Held back, a response keeps its tokens, and later goes on after them with the weights that the engine then has. So
    each token is of one version of the weights, that it is told with, and no step is under way while these change.
    It begins held back, for it has no weights.

    Args:
        machine: the engine.

    Attributes:
        version: of its weights.
    """

    def __init__(self, machine: Steps) -> None:
        self.version = 0
        self._machine = machine
        self._orders: queue.SimpleQueue[tuple[Callable[[], Any], Future[Any]]] = queue.SimpleQueue()
        self._running: dict[str, Job] = {}
        self._held: list[Job] = []
        self._holding = True  # until it has weights
        self._begun = 0
        self._finished: dict[str, list[Job]] = defaultdict(list)
        self._news = threading.Condition()
        self._failure: str | None = None
        self._last_step = time.monotonic()
        threading.Thread(target=self._run, daemon=True, name="engine").start()

    # ---- asked from other threads --------------------------------------------------------------------------------

    def check(self) -> None:
        """Raise where the engine failed.

        Raises:
            RuntimeError: with what it failed by.
        """
        if self._failure is not None:
            raise RuntimeError(self._failure)

    def submit(self, jobs: Sequence[Job]) -> None:
        """Begin responses; those that are not urgent wait while others are held back."""
        self._order(lambda: self._accept(jobs))

    def collect(self, owner: str, seconds: float) -> tuple[list[Job], float]:
        """What has been finished for an owner since the last time; waits for something at most ``seconds``.

        Returns:
            It, and the seconds since the last step of an engine that has work.

        Raises:
            RuntimeError: if the engine failed.
        """
        with self._news:
            self._news.wait_for(lambda: self._finished[owner] or self._failure is not None, seconds)
            self.check()
            silent = time.monotonic() - self._last_step if self._running or self._held else 0.0
            return self._finished.pop(owner), silent

    def pause(self) -> int:
        """Hold back what is under way, and forget urgent requests, which nobody waits for; how many are held back."""
        return self._order(self._hold)

    def resume(self) -> None:
        """Go on with what was held back."""
        self._order(self._release)

    def join(self, meeting: Meeting, first: int, host: str) -> None:
        """Let the engine's workers meet rank 0."""
        self._order(lambda: self._machine.join(meeting, first, host))

    def take(self, version: int, announced: Announced, bucket_bytes: int) -> None:
        """Load the weights that rank 0 sends.

        Raises:
            RolloutError: if it was not paused before, or for weights that are missing.
        """
        self._order(lambda: self._take(version, announced, bucket_bytes))

    def _order(self, what: Callable[[], T]) -> T:
        """Have something done between two steps, and wait until it is."""
        done: Future[T] = Future()
        with self._news:  # so that none comes after the last that is answered
            self.check()
            self._orders.put((what, done))
        return done.result()

    # ---- in the engine's own thread ------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            while True:
                self._obey()
                if self._running:
                    self._note(self._machine.step())
        except Exception as error:
            self._fail(error)

    def _obey(self) -> None:
        """Do what was ordered; without requests, wait until something is."""
        while not (self._running and self._orders.empty()):
            what, done = self._orders.get()
            self._last_step = time.monotonic()  # before what begins now is looked at
            try:
                done.set_result(what())
            except Exception as error:
                done.set_exception(error)
            self._last_step = time.monotonic()

    def _fail(self, error: Exception) -> None:
        traceback.print_exc()
        with self._news:
            self._failure = f"the engine failed in a step: {type(error).__name__}: {error}"
            self._news.notify_all()
        while not self._orders.empty():
            self._orders.get()[1].set_exception(RuntimeError(self._failure))

    def _accept(self, jobs: Sequence[Job]) -> None:
        for job in jobs:
            if self._holding and not job.urgent:
                self._held.append(job)
            else:
                self._begin(job)

    def _begin(self, job: Job) -> None:
        drawn = job.response.tokens
        self._begun += 1
        name = str(self._begun)  # never that of one that was stopped
        self._machine.add(name, [*job.prompt, *drawn], job.draw, len(drawn))
        self._running[name] = job

    def _hold(self) -> int:
        self._holding = True
        if self._running:
            self._machine.stop(list(self._running))
        self._held += [job for job in self._running.values() if not job.urgent]
        self._running.clear()
        return len(self._held)

    def _release(self) -> None:
        self._holding = False
        held, self._held = self._held, []
        self._accept(held)

    def _take(self, version: int, announced: Announced, bucket_bytes: int) -> None:
        if self._running or not self._holding:
            raise RolloutError("weights came while requests are under way: pause the engine before")
        self._machine.take(announced, bucket_bytes)
        self.version = version

    def _note(self, drawn: Sequence[Drawn]) -> None:
        """Keep what a step drew, and hand on what it finished."""
        self._last_step = time.monotonic()
        ended: list[Job] = []
        for name, tokens, logprobs, reason in drawn:
            job = self._running[name]
            response = job.response
            response.tokens += tokens
            response.logprobs += logprobs
            response.versions += [self.version] * len(tokens)
            response.ended = reason
            if reason is not None:
                ended.append(self._running.pop(name))
        if ended:
            self._hand_on(ended)

    def _hand_on(self, ended: Sequence[Job]) -> None:
        with self._news:
            for job in ended:
                self._finished[job.owner].append(job)
            self._news.notify_all()
