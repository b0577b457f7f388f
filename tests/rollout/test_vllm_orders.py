"""What a rank has asked its engines for, around one of them that is lost; engines are doubles that answer when told."""

from __future__ import annotations

import queue
import threading
from typing import Any, cast

from lightning_hybrid.errors import ServerError
from lightning_hybrid.generation import SamplingParams
from lightning_hybrid.rollout import PromptRequest
from lightning_hybrid.rollout.vllm.orders import Lines, Orders
from lightning_hybrid.serving import ServerClient

POLLS = 20  # without news, after which nobody would wait for any more


class Line:
    """Answers a poll with the next of ``news``; with an error where that is None."""

    def __init__(self) -> None:
        self.news: queue.SimpleQueue[list[int] | None] = queue.SimpleQueue()
        self.submitted: list[int] = []
        self.polled = threading.Semaphore(0)
        self.idle = self.closed = 0

    def call(self, route: str, **values: Any) -> dict[str, Any]:
        if route == "submit":
            self.submitted += [request["key"] for request in values["requests"]]
            return {}
        self.polled.release()
        try:
            keys = self.news.get(timeout=0.2)
        except queue.Empty:
            self.idle += 1
            assert self.idle < POLLS, "it is asked for news that were told to nobody"
            keys = []
        if keys is None:
            raise ServerError("its process has ended")
        told = {"sample": 0, "tokens": [3], "logprobs": [-1.0], "versions": [1], "ended": "length"}
        return {"finished": [{"key": key, **told} for key in keys], "silent": 0.0}

    def close(self) -> None:
        self.closed += 1


def lines_to(*lines: Line) -> Lines:
    return Lines({number: cast(ServerClient, line) for number, line in enumerate(lines)}, 60.0)


def requests(*keys: int) -> list[PromptRequest]:
    return [PromptRequest(key, [1], key, 0) for key in keys]


def test_a_sound_engine_asked_again_may_answer_the_poll_of_before() -> None:
    lost, sound, renewed = Line(), Line(), Line()
    lines, orders = lines_to(lost, sound), Orders("0 1", urgent=True)
    orders.add(requests(0, 1), SamplingParams(1), lines)
    lost.news.put(None)
    orders.gather([0, 1], 2, lines)
    assert lines.lost == {0: "its process has ended"}
    lines.renew({0: cast(ServerClient, renewed), 1: cast(ServerClient, sound)})
    assert (lines.lost, lost.closed, sound.closed) == ({}, 1, 0)
    orders.add_again([0, 1], lines)  # what is urgent was forgotten by both
    sound.news.put([1])  # to the poll that it was asked while the other was lost
    renewed.news.put([0])
    orders.gather([0, 1], 2, lines)
    assert (renewed.submitted, sound.submitted) == ([0], [1, 1])
    assert [response.tokens for response in orders.take([0, 1])[1]] == [[3], [3]]
    orders.close()


def test_the_end_of_a_lost_engine_does_not_count_for_the_one_in_its_place() -> None:
    lost, renewed = Line(), Line()
    lines = lines_to(lost)
    poll = threading.Thread(target=lines.call, args=(0, "collect"))
    poll.start()
    assert lost.polled.acquire(timeout=5)
    lines.renew({0: cast(ServerClient, renewed)})
    lost.news.put(None)
    poll.join(5)
    assert lines.lost == {}
