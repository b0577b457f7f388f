"""What a rank has asked its engines for, and what has come of it."""

from __future__ import annotations

import threading
from collections.abc import Collection, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass
from typing import Any

from lightning_hybrid.errors import RolloutError, ServerError
from lightning_hybrid.generation import SamplingParams
from lightning_hybrid.rollout import PromptRequest
from lightning_hybrid.rollout.vllm.requests import Response
from lightning_hybrid.serving import ServerClient

POLL_SECONDS = 5.0  # that an engine is asked to wait for news before it says that there are none


@dataclass
class Entry:
    """A request on its way.

    Attributes:
        request: as it was made.
        sampling: how its responses are drawn.
        engine: that was asked.
        responses: to it, those that have not come yet None.
    """

    request: PromptRequest
    sampling: SamplingParams
    engine: int
    responses: list[Response | None]

    @property
    def open(self) -> int:
        """Responses that have not come."""
        return self.responses.count(None)


class Lines:
    """This rank's connections to its engines.

    Args:
        clients: by the engine's number.
        silence: seconds without a step after which an engine with work counts as lost.

    Attributes:
        lost: engines that could not be asked, or did not answer: why.
    """

    def __init__(self, clients: dict[int, ServerClient], silence: float) -> None:
        self.clients, self.silence = clients, silence
        self.lost: dict[int, str] = {}
        self._lock = threading.Lock()

    def call(self, engine: int, route: str, **values: Any) -> dict[str, Any] | None:
        """An engine's answer; None where it gave none, which then is in :attr:`lost`.

        Raises:
            RolloutError: for what it refuses, and would again.
        """
        client = self.clients[engine]
        try:
            return client.call(route, **values)
        except ServerError as error:
            if error.refused:
                raise RolloutError(str(error)) from error
            with self._lock:
                if self.clients.get(engine) is client:  # not the one that was started in its place meanwhile
                    self.lost[engine] = str(error)
            return None

    def renew(self, clients: dict[int, ServerClient]) -> None:
        """Go on with these, of which none is lost, and give back those that are not among them."""
        with self._lock:
            before, self.clients = self.clients, clients
            self.lost.clear()
        for client in before.values():
            if client not in clients.values():
                client.close()

    def close(self) -> None:
        """Give them back."""
        for client in self.clients.values():
            client.close()


class Orders:
    """Requests of one owner, dealt to the engines that have least to do.

    Args:
        owner: who collects, unique among the engines' callers.
        urgent: they go on while others are held back.
    """

    def __init__(self, owner: str, urgent: bool) -> None:
        self.owner, self.urgent = owner, urgent
        self.finished: list[int] = []
        self._entries: dict[int, Entry] = {}
        self._polls: dict[ServerClient, Future[dict[str, Any] | None]] = {}
        self._threads = ThreadPoolExecutor(thread_name_prefix=owner)

    def add(self, requests: Sequence[PromptRequest], sampling: SamplingParams, lines: Lines) -> None:
        """Ask for the responses to these."""
        busy = {engine: sum(e.open for e in self._entries.values() if e.engine == engine) for engine in lines.clients}
        for request in requests:
            if request.key in self._entries:
                raise RolloutError(f"the request {request.key} was made before: give each a key of its own")
            engine = min(busy, key=lambda engine: busy[engine])
            busy[engine] += sampling.n
            self._entries[request.key] = Entry(request, sampling, engine, [None] * sampling.n)
        self._send({request.key for request in requests}, lines)

    def add_again(self, engines: Collection[int], lines: Lines) -> None:
        """Ask these engines once more for what they have not given."""
        # One that was not started anew may answer what it was asked before with what it is asked for now.
        self._polls = {client: poll for client, poll in self._polls.items() if client in lines.clients.values()}
        self._send({key for key, e in self._entries.items() if e.engine in engines and e.open}, lines)

    def gather(self, keys: Collection[int], count: int, lines: Lines) -> None:
        """Wait until ``count`` of the requests ``keys`` have all responses, or an engine that they need is lost."""
        while sum(not self._entry(key).open for key in keys) < count:
            needed = {self._entry(key).engine for key in keys if self._entry(key).open}
            if not needed or needed & lines.lost.keys():
                return
            self._poll(needed, lines)

    def take(self, keys: Sequence[int]) -> tuple[list[list[int]], list[Response]]:
        """Prompts, each as often as it has responses, and these; they are forgotten here.

        Raises:
            RolloutError: for a request that was never made, or is not finished.
        """
        entries = [self._entry(key) for key in keys]
        for key, entry in zip(keys, entries, strict=True):
            if entry.open:
                raise RolloutError(f"the request {key} lacks {entry.open} of {len(entry.responses)} responses: wait")
        self._entries = {key: entry for key, entry in self._entries.items() if key not in set(keys)}
        self.finished = [key for key in self.finished if key in self._entries]
        prompts = [entry.request.prompt for entry in entries for _ in entry.responses]
        return prompts, [response for entry in entries for response in entry.responses if response is not None]

    def close(self) -> None:
        """Wait for nothing any more."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    def _entry(self, key: int) -> Entry:
        if key not in self._entries:
            raise RolloutError(f"the request {key} was never made, or its responses were taken")
        return self._entries[key]

    def _send(self, keys: Collection[int], lines: Lines) -> None:
        bundles: dict[tuple[int, SamplingParams], list[PromptRequest]] = {}
        for key in sorted(keys):
            entry = self._entries[key]
            bundles.setdefault((entry.engine, entry.sampling), []).append(entry.request)
        for (engine, sampling), requests in bundles.items():
            given = {"owner": self.owner, "urgent": self.urgent, "sampling": asdict(sampling)}
            lines.call(engine, "submit", **given, requests=[asdict(request) for request in requests])

    def _poll(self, engines: Collection[int], lines: Lines) -> None:
        """Take what the first of these engines that has news has finished."""
        seconds = min(POLL_SECONDS, lines.silence / 2)
        for engine in engines:
            if lines.clients[engine] not in self._polls:
                ask = {"owner": self.owner, "seconds": seconds}
                self._polls[lines.clients[engine]] = self._threads.submit(lines.call, engine, "collect", **ask)
        asked = {self._polls[lines.clients[engine]]: engine for engine in engines}
        for answer in wait(asked, return_when=FIRST_COMPLETED).done:
            engine = asked[answer]
            del self._polls[lines.clients[engine]]
            told = answer.result()
            if told is not None:
                self._note(told["finished"])
                if told["silent"] > lines.silence:
                    lines.lost[engine] = f"it has work, and made no step for {told['silent']:.0f} seconds"

    def _note(self, finished: Sequence[dict[str, Any]]) -> None:
        for told in finished:
            entry = self._entries.get(told["key"])
            if entry is None or not entry.open:
                continue  # drawn twice, around a restart
            response = Response(told["tokens"], told["logprobs"], told["versions"], told["ended"])
            entry.responses[told["sample"]] = response
            if not entry.open:
                self.finished.append(told["key"])
