"""How a separate engine keeps requests going through changes of weights, by a double that draws what it is told."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import pytest

from lightning_hybrid.errors import RolloutError
from lightning_hybrid.generation import SamplingParams
from lightning_hybrid.rollout.vllm.engine_server import Routes
from lightning_hybrid.rollout.vllm.loop import EngineLoop, Job
from lightning_hybrid.rollout.vllm.machine import Drawn, Machine
from lightning_hybrid.rollout.vllm.requests import Draw, how_to_draw
from lightning_hybrid.rollout.vllm.transfer import Meeting
from lightning_hybrid.rollout.vllm.workers import receive_weights

WEIGHTS = [("a.weight", "float32", [2])]


class Stepper:
    """Draws a token for each request when it is let; tokens count on from the length of what it was given."""

    def __init__(self) -> None:
        self.calls: list[Any] = []
        self.let = threading.Semaphore(0)
        self.entered = self.released = 0
        self.fails: str | None = None
        self._running: dict[str, tuple[int, int]] = {}  # the next token, and how many are missing

    def add(self, name: str, prompt: Sequence[int], draw: Draw, drawn: int) -> None:
        self.calls.append(("add", list(prompt), drawn))
        self._running[name] = (100 + len(prompt), draw.sampling.max_new_tokens - drawn)

    def step(self) -> list[Drawn]:
        self.entered += 1
        self.let.acquire()
        if self.fails is not None:
            raise ValueError(self.fails)
        drawn = []
        for name, (token, left) in list(self._running.items()):
            drawn.append(Drawn(name, [token], [-float(token)], "length" if left == 1 else None))
            self._running[name] = (token + 1, left - 1)
            if left == 1:
                del self._running[name]
        return drawn

    def stop(self, names: Sequence[str]) -> None:
        assert set(names) == self._running.keys()
        self.calls.append(("stop", len(names)))
        self._running.clear()

    def join(self, meeting: Meeting, first: int, host: str) -> None:
        self.calls.append(("join", meeting, first, host))

    def take(self, announced: Any, bucket_bytes: int) -> None:
        self.calls.append(("take", announced, bucket_bytes))


@pytest.fixture
def stepper() -> Stepper:
    return Stepper()


def begun(stepper: Stepper) -> EngineLoop:
    loop = EngineLoop(stepper)
    loop.take(1, WEIGHTS, 64)
    loop.resume()
    stepper.calls.clear()
    return loop


def job(key: int, tokens: int, owner: str = "0", urgent: bool = False) -> Job:
    return Job(owner, key, [1, 2], Draw(SamplingParams(tokens), 3, key, 0), urgent)


def steps(stepper: Stepper, count: int) -> None:
    """Let it draw, and wait until it would draw once more, having noted that."""
    for _ in range(count):
        stepper.let.release()
        stepper.released += 1
    deadline = time.monotonic() + 10
    while stepper.entered <= stepper.released:
        assert time.monotonic() < deadline
        time.sleep(0.001)


def between_steps(stepper: Stepper, order: Callable[[], Any]) -> None:
    """An order is seen to after the step that is under way."""
    thread = threading.Thread(target=order)
    thread.start()
    while thread.is_alive():
        if not stepper.let._value:
            stepper.let.release()
        thread.join(0.02)


def test_requests_are_held_back_while_weights_change_and_go_on_after_what_they_have(stepper: Stepper) -> None:
    loop = begun(stepper)
    loop.submit([job(0, 6)])
    steps(stepper, 2)
    between_steps(stepper, loop.pause)
    had = len(loop._held[0].response.tokens)
    loop.take(2, WEIGHTS, 64)
    loop.resume()
    for _ in range(6):
        stepper.let.release()
    (done,), _ = loop.collect("0", 10)
    first = [102 + place for place in range(6)]
    assert stepper.calls == [
        ("add", [1, 2], 0),
        ("stop", 1),
        ("take", WEIGHTS, 64),
        ("add", [1, 2, *first[:had]], had),
    ]
    assert done.response.tokens == first
    assert done.response.logprobs == [-float(token) for token in first]
    assert done.response.versions == [1] * had + [2] * (6 - had)
    assert 2 <= had < 6


def test_an_engine_that_has_no_weights_yet_begins_nothing(stepper: Stepper) -> None:
    loop = EngineLoop(stepper)
    loop.submit([job(0, 1)])
    assert stepper.calls == []
    loop.take(1, WEIGHTS, 64)
    loop.resume()
    stepper.let.release()
    assert [done.key for done in loop.collect("0", 10)[0]] == [0]


def test_weights_do_not_come_under_requests_that_run(stepper: Stepper) -> None:
    loop = begun(stepper)
    with pytest.raises(RolloutError, match="weights came while requests are under way: pause the engine before"):
        loop.take(2, WEIGHTS, 64)
    assert loop.version == 1


def test_urgent_requests_run_while_others_are_held_back_and_are_forgotten_by_the_next_pause(stepper: Stepper) -> None:
    loop = begun(stepper)
    loop.pause()
    loop.submit([job(0, 1), job(0, 1, "0 1", urgent=True)])
    stepper.let.release()
    assert [done.owner for done in loop.collect("0 1", 10)[0]] == ["0 1"]
    loop.submit([job(1, 5, "0 2", urgent=True)])
    between_steps(stepper, loop.pause)
    loop.resume()
    stepper.let.release()
    assert [done.key for done in loop.collect("0", 10)[0]] == [0]
    assert loop.collect("0 2", 0.1)[0] == []


def test_each_owner_collects_what_is_its_own_and_waits_no_longer_than_it_said(stepper: Stepper) -> None:
    loop = begun(stepper)
    loop.submit([job(0, 1, "0"), job(0, 1, "1"), job(7, 3, "1")])
    assert loop.collect("0", 0.01) == ([], pytest.approx(0, abs=5))
    stepper.let.release()
    assert [done.key for done in loop.collect("1", 10)[0]] == [0]
    assert [done.key for done in loop.collect("0", 10)[0]] == [0]


def test_who_asks_learns_how_long_an_engine_with_work_is_silent(stepper: Stepper) -> None:
    loop = begun(stepper)
    loop.submit([job(0, 2)])
    assert loop.collect("0", 0.3)[1] >= 0.3
    steps(stepper, 1)
    assert loop.collect("0", 0.01)[1] < 0.3
    stepper.let.release()
    loop.collect("0", 10)
    assert loop.collect("0", 0.4) == ([], 0.0)  # without work it has nothing to say


def test_an_engine_that_is_not_told_to_go_on_is_silent_too(stepper: Stepper) -> None:
    loop = begun(stepper)
    loop.pause()
    loop.submit([job(0, 2)])
    assert loop.collect("0", 0.2)[1] >= 0.2


def test_a_step_that_fails_is_told_to_everybody_who_asks_then_or_later(stepper: Stepper) -> None:
    loop = begun(stepper)
    loop.submit([job(0, 2)])
    stepper.fails = "no more memory"
    stepper.let.release()
    for ask in (lambda: loop.collect("0", 10), lambda: loop.submit([job(1, 1)]), loop.pause, loop.check):
        with pytest.raises(RuntimeError, match="the engine failed in a step: ValueError: no more memory"):
            ask()


def test_its_routes_take_and_give_json(stepper: Stepper) -> None:
    routes = Routes(EngineLoop(stepper), 64).by_name()
    meeting = {"host": "127.0.0.1", "port": 1, "size": 3, "seconds": 2.0}
    assert routes["about"]({}) == {"longest": 64, "version": 0}
    routes["join"]({"meeting": meeting, "first": 1, "host": "127.0.0.1"})
    routes["take_weights"]({"version": 4, "weights": WEIGHTS, "bucket_bytes": 8})
    sampling = {"max_new_tokens": 1, "n": 2, "eos_ids": [2]}
    request = {"key": 5, "prompt": [7], "index": 3, "seed": 1}
    routes["submit"]({"owner": "1", "urgent": False, "sampling": sampling, "requests": [request]})
    routes["resume"]({})
    stepper.let.release()
    told = routes["collect"]({"owner": "1", "seconds": 10})["finished"]
    assert [(row["key"], row["sample"], row["tokens"], row["versions"]) for row in told] == [
        (5, 0, [101], [4]),
        (5, 1, [101], [4]),
    ]
    assert routes["pause"]({}) == {"held": 0}
    assert stepper.calls[0] == ("join", Meeting(**meeting), 1, "127.0.0.1")


def test_what_goes_on_has_a_random_stream_of_its_own_that_follows_from_where_it_stands() -> None:
    draw = Draw(SamplingParams(9), seed=3, index=4, sample=1)
    streams = [draw.stream(drawn) for drawn in range(9)]
    assert len(set(streams)) == 9
    assert streams == [Draw(SamplingParams(9), 3, 4, 1).stream(drawn) for drawn in range(9)]
    assert draw.stream() != Draw(SamplingParams(9), 3, 4, 0).stream()


def test_a_response_that_goes_on_has_the_tokens_that_it_lacks_and_ends_as_it_would_have() -> None:
    sampling = SamplingParams(9, min_new_tokens=4, top_k=5, repetition_penalty=1.5, eos_ids=(2, 3))
    vllm, draw = SimpleNamespace(SamplingParams=SimpleNamespace), Draw(sampling, 3, 4, 1)
    whole, rest, last = (how_to_draw(vllm, draw, drawn) for drawn in (0, 3, 8))
    assert [(how.max_tokens, how.min_tokens) for how in (whole, rest, last)] == [(9, 4), (6, 1), (1, 0)]
    for how in (whole, rest, last):
        assert (how.stop_token_ids, how.ignore_eos, how.top_k, how.repetition_penalty) == ([2, 3], True, 5, 1.5)
    assert [how.seed for how in (whole, rest, last)] == [draw.stream(), draw.stream(3), draw.stream(8)]


# ---- what it asks of vLLM --------------------------------------------------------------------------------------------


class RecordedLLM:
    """Remembers what vLLM was asked, and answers what it is told to."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.missing: list[list[str]] = [[], []]
        self.kept = False
        self.queued = 2
        self.llm_engine = SimpleNamespace(
            model_config=SimpleNamespace(max_model_len=64),
            engine_core=SimpleNamespace(engine_core=self),
            abort_request=lambda names: self.calls.append(f"abort {','.join(names)}"),
            step=self._step,
        )
        self.scheduler = SimpleNamespace(has_requests=lambda: False)

    @property
    def batch_queue(self) -> list[int]:
        return [0] * self.queued

    def _step(self) -> list[Any]:
        self.calls.append("step")
        self.queued -= 1
        return []

    def collective_rpc(self, method: Any, args: tuple[Any, ...]) -> list[list[str]]:
        assert method is receive_weights
        self.calls.append("receive")
        return self.missing

    def reset_prefix_cache(self) -> bool:
        self.calls.append("reset_prefix_cache")
        return not self.kept


def test_what_was_cached_is_forgotten_once_all_workers_have_the_weights() -> None:
    llm = RecordedLLM()
    Machine(None, llm).take(WEIGHTS, 64)
    assert llm.calls == ["receive", "reset_prefix_cache"]


def test_weights_that_a_worker_lacks_and_a_cache_that_is_kept_are_errors() -> None:
    llm = RecordedLLM()
    llm.missing = [[], ["b.weight"]]
    with pytest.raises(RolloutError, match=r"vLLM left 1 of its weights as they were, such as 'b\.weight'"):
        Machine(None, llm).take(WEIGHTS, 64)
    llm.missing, llm.kept = [[], []], True
    with pytest.raises(RolloutError, match="kept what it had cached with the weights of before"):
        Machine(None, llm).take(WEIGHTS, 64)


def test_no_step_is_under_way_when_requests_have_been_stopped() -> None:
    llm = RecordedLLM()
    Machine(None, llm).stop(["1", "2"])
    assert llm.calls == ["abort 1,2", "step", "step"]
