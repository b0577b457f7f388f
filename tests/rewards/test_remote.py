"""A reward behind a real HTTP server that behaves, misbehaves, recovers or never does."""

from __future__ import annotations

import re
import socket
import threading
import time
import tracemalloc
from collections.abc import Iterator

import pytest
import torch

from lightning_hybrid.errors import ConfigError, RewardError
from lightning_hybrid.rewards import RemoteReward, remote
from lightning_hybrid.rewards.endpoint import seconds_asked
from tests.rewards import endpoints
from tests.rewards.endpoints import Reply, body, lengths, serving

PROMPTS, RESPONSES = ["first", "second"], ["a", "abc"]
SCORES = torch.tensor([1.0, 3.0])


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "FIRST_PAUSE", 0.01)
    monkeypatch.setattr(remote, "LONGEST_PAUSE", 0.2)


@pytest.fixture
def slept(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[float]]:
    seconds: list[float] = []
    monkeypatch.setattr(remote.time, "sleep", seconds.append)
    return seconds


def refused(*replies: Reply, tries: int = 3, **arguments: object) -> str:
    """What is said when the endpoint gives no scores in so many tries."""
    with serving(*replies) as server:
        reward = RemoteReward(server.url, **({"timeout_seconds": 5.0, "retries": 2} | arguments))
        with pytest.raises(RewardError) as caught:
            reward(PROMPTS, RESPONSES)
        assert len(server.requests) == tries
    message = str(caught.value)
    named = "try" if tries == 1 else "tries"
    assert re.match(
        rf"reward endpoint {re.escape(server.url)} gave no scores in {tries} {named} over \d\.\d s", message
    )
    return message


def test_scores_come_back_in_order_as_float32_on_the_cpu() -> None:
    with serving(lengths) as server:
        scores = RemoteReward(server.url)(PROMPTS, RESPONSES)
    assert torch.equal(scores, SCORES)
    assert scores.dtype == torch.float32
    texts, headers = server.requests[0]
    assert texts == {"prompts": PROMPTS, "responses": RESPONSES}
    assert "Authorization" not in headers


def test_texts_of_any_characters_arrive_as_they_are() -> None:
    texts = ['"\\\n\0', "日本 \U0001f600", "half \ud800 pair"]
    with serving(lengths) as server:
        RemoteReward(server.url)(texts, texts)
    assert server.requests[0][0]["responses"] == texts


@pytest.mark.parametrize(
    "trouble",
    [
        body("busy", 500),
        body("busy", 429),
        body("<html>"),
        body('{"scores": [1]}'),
        body('{"scores": [1, NaN]}'),
        endpoints.dies_midway,
        lambda handler: None,
    ],
    ids=["500", "429", "no JSON", "one too few", "NaN", "dies midway", "closes at once"],
)
def test_trouble_that_passes_costs_a_try_and_no_more(trouble: Reply, caplog: pytest.LogCaptureFixture) -> None:
    with serving(trouble, trouble, lengths) as server:
        assert torch.equal(RemoteReward(server.url, retries=2)(PROMPTS, RESPONSES), SCORES)
    assert len(server.requests) == 3
    assert "try 1 of 3 failed with" in caplog.records[0].getMessage()


def test_an_endpoint_that_stays_broken_is_named_with_its_status_and_answer() -> None:
    message = refused(body("out of memory", 503))
    assert message.endswith("the last one: status 503; the answer begins 'out of memory': see the endpoint's own log")


@pytest.mark.parametrize("reply", [endpoints.silent, endpoints.dripping_body, endpoints.dripping_headers])
def test_a_slow_answer_is_given_up_in_time_however_it_trickles(reply: Reply) -> None:
    began = time.monotonic()
    message = refused(reply, timeout_seconds=0.4, retries=1, tries=2)
    assert time.monotonic() - began < 3
    assert "the last one: no whole answer within 0.4 seconds: raise timeout_seconds" in message
    time.sleep(0.3)
    assert [thread for thread in threading.enumerate() if thread.name == "lightning-hybrid-reward"] == []


@pytest.mark.parametrize(
    ("answer", "problem"),
    [
        (b"", "the answer is not valid JSON (Expecting value: line 1 column 1 (char 0)); the answer is empty"),
        (b"<html>busy</html>", "the answer is not valid JSON"),
        (b"\xff\xfe\x00", "the answer is not valid JSON"),
        (b"[" * 100_000, "the answer is not valid JSON"),
        (b"[1, 2]", "the answer is of type list, not {"),
        (b"{}", "the answer is an object with no scores, not {"),
        (b'{"scores": "1, 2"}', "the answer is an object with str scores"),
        (b'{"scores": {"0": 1, "1": 2}}', "the answer is an object with dict scores"),
        (b'{"scores": [1, 2, 3]}', "the answer has 3 scores for 2 responses"),
        (b'{"scores": []}', "the answer has 0 scores for 2 responses"),
        (b'{"scores": [1, NaN]}', "score 1 is nan, not a finite number"),
        (b'{"scores": [-Infinity, 1]}', "score 0 is -inf, not a finite number"),
        (b'{"scores": [1e39, 1]}', "score 0 is 1e+39, not a finite number that float32 can hold"),
        (b'{"scores": [1' + b"0" * 400 + b", 1]}", "score 0 is 10000000"),
        (b'{"scores": ["1", 2]}', "score 0 is a str"),
        (b'{"scores": [true, 2]}', "score 0 is True"),
        (b'{"scores": [1, null]}', "score 1 is None"),
        (b'{"scores": [1, [2]]}', "score 1 is a list"),
    ],
)
def test_an_answer_without_one_finite_number_per_response_is_refused(answer: bytes, problem: str) -> None:
    message = refused(body(answer), retries=1, tries=2)
    assert f"the last one: {problem}" in message
    assert message.endswith('it must answer {"scores": [one finite number per response]}')
    assert len(message) < 1500


@pytest.mark.parametrize(
    ("status", "fix"),
    [
        (400, "check url, and what the endpoint expects"),
        (401, "check whether it needs token_variable"),
        (403, "check whether it needs token_variable"),
        (404, "check url, and what the endpoint expects"),
    ],
)
def test_a_refusal_is_final(status: int, fix: str) -> None:
    assert refused(body("no", status), tries=1).endswith(f"status {status}; the answer begins 'no': {fix}")


def test_a_redirect_is_not_followed() -> None:
    with serving(lengths) as elsewhere:
        message = refused(body("", 307, Location=elsewhere.url), tries=1)
    assert "status 307; the answer is empty: redirects are not followed: set url to where it leads" in message
    assert elsewhere.requests == []


def test_an_endless_answer_fills_no_memory() -> None:
    tracemalloc.start()
    message = refused(endpoints.endless, retries=0, tries=1, timeout_seconds=20.0)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert "the last one: an answer of more than 16777216 bytes; the answer begins '[[[" in message
    assert peak < 5 * 2**24


def test_nobody_listening_is_told_apart() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{probe.getsockname()[1]}"
    with pytest.raises(RewardError, match="in 2 tries .* ConnectError: .*refused: check that the endpoint runs"):
        RemoteReward(url, retries=1)(PROMPTS, RESPONSES)


def test_pauses_grow_up_to_a_limit(slept: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "FIRST_PAUSE", 1.0)
    monkeypatch.setattr(remote, "LONGEST_PAUSE", 60.0)
    refused(body("", 500), retries=9, tries=10)
    for pause, longest in zip(slept, [1, 2, 4, 8, 16, 32, 60, 60, 60], strict=True):
        assert longest / 2 <= pause <= longest


def test_an_endpoint_may_ask_for_a_pause_within_bounds(slept: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "LONGEST_PAUSE", 60.0)
    replies = [body("", 429, Retry_After=asked) for asked in ("7", "86400", "soon", "Fri, 01 Jan 2100 00:00:00 GMT")]
    with serving(*replies, lengths) as server:
        RemoteReward(server.url, retries=4)(PROMPTS, RESPONSES)
    assert slept == [7.0, 60.0, pytest.approx(0.03, abs=0.02), 60.0]


@pytest.mark.parametrize(
    ("header", "seconds"),
    [("", 0), ("3", 3), ("-3", 0), ("1.5", 0), ("Sun, 06 Nov 1994 08:49:37 GMT", 0), ("9" * 400, 999_999_999)],
)
def test_what_a_header_asks_for_is_never_negative_nor_without_end(header: str, seconds: float) -> None:
    assert seconds_asked(header) == seconds


def test_pauses_leave_the_global_random_numbers_alone(slept: list[float]) -> None:
    import random

    random.seed(3)
    before = random.getstate()
    refused(body("", 500))
    assert len(slept) == 2
    assert random.getstate() == before


# ---- the token -------------------------------------------------------------------------------------------------------

TOKEN = "sk-Very/Secret.0123456789"


def test_a_token_travels_in_its_header_and_is_never_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SCORES_TOKEN", f"{TOKEN}\n")
    with serving(lengths) as server:
        RemoteReward(server.url, "SCORES_TOKEN")(PROMPTS, RESPONSES)
    assert server.requests[0][1]["Authorization"] == f"Bearer {TOKEN}"
    escaped = TOKEN.replace("/", r"\/")  # as some write JSON
    for reply in (endpoints.repeats_what_it_was_sent, body(escaped, 400)):
        message = refused(reply, tries=1, token_variable="SCORES_TOKEN")
        assert "the answer repeats the token and is not shown" in message
        assert "Secret" not in message
    assert "check the token in SCORES_TOKEN" in refused(body("", 401), tries=1, token_variable="SCORES_TOKEN")
    assert "Secret" not in refused(body(f'{{"scores": [1, "{TOKEN}"]}}'), token_variable="SCORES_TOKEN")


def test_no_object_holds_the_token(monkeypatch: pytest.MonkeyPatch) -> None:
    import pickle

    monkeypatch.setenv("SCORES_TOKEN", TOKEN)
    reward = RemoteReward("https://scores.example", "SCORES_TOKEN")
    assert b"Secret" not in pickle.dumps(reward)


def test_no_proxy_stands_before_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
    with serving(lengths) as server:
        assert torch.equal(RemoteReward(server.url)(PROMPTS, RESPONSES), SCORES)


@pytest.mark.parametrize(
    ("value", "problem"),
    [
        (None, r"token_variable is 'SCORES_TOKEN', but the environment has no such variable: export SCORES_TOKEN="),
        ("  ", "no such variable"),
        ("two words", "holds a character that a bearer token cannot have"),
        ('a"b', "holds a character"),
        ("tökén", "holds a character"),
    ],
)
def test_a_token_that_cannot_be_sent_is_refused_at_once(
    value: str | None, problem: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("SCORES_TOKEN", raising=False)
    if value is not None:
        monkeypatch.setenv("SCORES_TOKEN", value)
    with pytest.raises(ConfigError, match=problem):
        RemoteReward("https://scores.example", "SCORES_TOKEN")


def test_a_token_in_place_of_its_variable_is_refused_without_being_shown() -> None:
    with pytest.raises(ConfigError, match="the name of an environment variable, not the token itself") as caught:
        RemoteReward("https://scores.example", TOKEN)
    assert "Secret" not in str(caught.value)


def test_a_token_goes_unencrypted_to_this_machine_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SCORES_TOKEN", TOKEN)
    for host in ("scores.example", "10.0.0.7", "localhost.example", "127.0.0.1.example"):
        with pytest.raises(ConfigError, match="plain http would show to everyone on the way: use https"):
            RemoteReward(f"http://{host}:8000/score", "SCORES_TOKEN")
    for url in ("https://scores.example", "http://localhost:1", "http://127.0.0.1:1", "http://[::1]:1"):
        RemoteReward(url, "SCORES_TOKEN")
    RemoteReward("http://scores.example")


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        ({"url": "ftp://scores.example"}, "write http:// or https:// and a host"),
        ({"url": "http://"}, "write http:// or https:// and a host"),
        ({"url": "http://scores.example:port"}, "the reward's url is not one"),
        ({"url": "http://me:pass@scores.example"}, "holds a user or a password: take it out"),
        ({"timeout_seconds": 0}, "timeout_seconds is 0: must be above 0 and at most"),
        ({"timeout_seconds": float("nan")}, "timeout_seconds is nan"),
        ({"timeout_seconds": float("inf")}, "timeout_seconds is inf"),
        ({"retries": -1}, "retries is -1: must be 0 or more"),
    ],
)
def test_misuse_is_refused(arguments: dict[str, object], problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        RemoteReward(**({"url": "https://scores.example"} | arguments))


def test_a_key_in_the_query_is_sent_but_not_shown() -> None:
    with serving(body("", 404)) as server, pytest.raises(RewardError, match=r"/score\?… gave no scores") as caught:
        RemoteReward(f"{server.url}?key=hidden")(PROMPTS, RESPONSES)
    assert "hidden" not in str(caught.value)


def test_as_many_prompts_as_responses_are_asked_for() -> None:
    with pytest.raises(RewardError, match="was given 2 prompts and 1 responses"):
        RemoteReward("https://scores.example")(PROMPTS, ["one"])


# ---- columns of the data -------------------------------------------------------------------------------------------


def test_columns_are_sent_where_they_are_asked_for() -> None:
    fields = {"answer": ["2", None], "level": [1, 2], "id": [7, 8]}
    with serving(lengths) as server:
        reward = RemoteReward(server.url, send_fields=["level", "answer"])
        assert reward.needed_fields == {"answer", "level"}
        assert reward(["p", "q"], ["a", "bb"], fields).tolist() == [1.0, 2.0]
        RemoteReward(server.url)(["p"], ["a"], {"answer": ["2"]})
    sent = {"prompts": ["p", "q"], "responses": ["a", "bb"], "fields": {"answer": ["2", None], "level": [1, 2]}}
    assert [texts for texts, _ in server.requests] == [sent, {"prompts": ["p"], "responses": ["a"]}]


def test_columns_that_are_missing_or_cannot_be_sent_are_named() -> None:
    reward = RemoteReward("https://scores.example", send_fields=["answer"])
    with pytest.raises(RewardError, match="reward 'https://scores.example.*' asks for the column 'answer'"):
        reward(["p"], ["a"], {"gold": ["2"]})
    for value in (object(), float("nan")):
        with pytest.raises(RewardError, match=r"a value of the columns \['answer'\] cannot be sent as JSON"):
            reward(["p"], ["a"], {"answer": [value]})
