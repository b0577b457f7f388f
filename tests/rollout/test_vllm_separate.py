"""Ranks and engines in other processes: weights, requests, and what becomes of an engine that is lost.

The engines are doubles, which are told apart by the token that they draw: it is a weight of the policy.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from typing import Any

import psutil
import pytest
import torch

from lightning_hybrid.config import RolloutConfig, VLLMConfig
from lightning_hybrid.engines.agreement import own_rank
from lightning_hybrid.errors import ConfigError, RolloutError
from lightning_hybrid.rollout import PromptRequest, make_backend
from lightning_hybrid.rollout.vllm import SeparateVLLM, crew, fleet
from lightning_hybrid.rollout.vllm.crew import engines_of
from tests.conftest import RunRanks
from tests.helpers import tiny_policy
from tests.rollout import engine_double

TOKENS = 30  # of each response: 1.5 seconds of an engine


class Actor:
    """An engine that trains, as far as a backend looks at it."""

    def __init__(self, token: int) -> None:
        self.causal_lm = tiny_policy().model
        self.global_steps = 0
        self.draws(token)

    def draws(self, token: int) -> None:
        """From now on."""
        self.global_steps += 1
        self.causal_lm.model.norm.weight.data.fill_(token)


def backend(engines: int = 1, tokens: int = TOKENS, **changes: Any) -> SeparateVLLM:
    fleet.MODULE = engine_double.__name__
    vllm = VLLMConfig(**({"colocate": False, "num_engines": engines, "bucket_mib": 1} | changes))
    made = make_backend(RolloutConfig(backend="vllm", max_new_tokens=tokens, vllm=vllm), [2], 0)
    assert isinstance(made, SeparateVLLM)
    return made


@pytest.fixture
def separate() -> Iterator[SeparateVLLM]:
    before = fleet.MODULE
    made = backend()
    yield made
    made.close()
    fleet.MODULE = before


def requests(*keys: int, prompt: int = 5) -> list[PromptRequest]:
    return [PromptRequest(key, [1, prompt], key, 0) for key in keys]


def engine_processes() -> list[psutil.Process]:
    """Of this process, oldest first."""
    children = [child for child in psutil.Process().children() if engine_double.__name__ in child.cmdline()]
    return sorted(children, key=lambda child: child.create_time())


def test_it_generates_with_the_weights_that_it_is_passed_and_is_sent_them_once(separate: SeparateVLLM) -> None:
    actor, sent = Actor(7), []
    separate.config = separate.config.model_copy(update={"max_new_tokens": 3})
    for token in (7, 7, 8):
        if token != 7:
            actor.draws(token)
        rollout = separate.generate(actor, [[1, 5], [1, 5, 6]], seed=0, n=2)
        assert rollout.responses == [[token] * 3] * 4
        assert rollout.prompts == [[1, 5], [1, 5], [1, 5, 6], [1, 5, 6]]
        assert rollout.versions is None
        assert separate.figures.keys() == {"sync_seconds", "generate_seconds"}
        sent.append(separate._held)
    assert sent[0] == sent[1] != sent[2]


def test_responses_in_flight_go_on_with_new_weights_and_each_token_tells_which_drew_it(separate: SeparateVLLM) -> None:
    actor = Actor(7)
    assert separate.update(actor) == 1
    separate.submit(requests(0, 1), n=2)
    time.sleep(10 * engine_double.STEP_SECONDS)
    actor.draws(8)
    assert separate.update(actor) == 2
    separate.submit(requests(2), n=2)
    assert separate.wait([0, 1, 2], 3) == [0, 1, 2]
    rollout = separate.take([2, 0, 1], n=2)
    assert rollout.versions is not None
    versions = rollout.versions[rollout.response_mask].view(6, TOKENS)
    drawn = rollout.tokens[rollout.response_mask].view(6, TOKENS)
    assert torch.equal(drawn, versions + 6)
    assert versions[:2].unique().tolist() == [2]
    for row in versions[2:].tolist():
        assert row == sorted(row)
        assert set(row) == {1, 2}


def test_an_evaluation_with_other_weights_holds_back_what_is_in_flight_and_leaves_no_trace_in_it(
    separate: SeparateVLLM,
) -> None:
    policy, reference = Actor(7), Actor(9)
    separate.update(policy)
    separate.submit(requests(0), n=1)
    for actor in (reference, policy):
        assert set(separate.generate(actor, [[1, 5]], seed=0).responses[0]) == {7 if actor is policy else 9}
    separate.generate(reference, [[1, 5]], seed=0)
    assert separate.wait([0], 1) == [0]
    assert separate.take([0], 1).responses == [[7] * TOKENS]


@pytest.mark.slow
def test_an_engine_that_is_killed_is_started_anew_and_asked_for_what_it_had_not_given(separate: SeparateVLLM) -> None:
    actor = Actor(7)
    separate.update(actor)
    separate.submit(requests(0, 1), n=2)
    first = engine_processes()
    first[0].kill()
    with pytest.warns(UserWarning, match=r"(?s)vLLM engine 0 at http://.* is lost: .*SIGKILL.*started anew, once"):
        assert separate.wait([0, 1], 2) == [0, 1]
    assert separate.take([0, 1], 2).responses == [[7] * TOKENS] * 4
    separate.submit(requests(2), n=1)
    engine_processes()[-1].kill()
    url = separate._crew._addresses[0].url
    with pytest.raises(RolloutError, match=rf"(?s)vLLM engine 0 at {url} is lost.*and before it was started anew"):
        separate.wait([2], 1)


@pytest.mark.slow
def test_an_engine_that_dies_between_two_updates_has_its_requests_back_after_the_second(separate: SeparateVLLM) -> None:
    actor = Actor(7)
    separate.update(actor)
    for round_, token in enumerate((8, 9)):  # each update forgives
        separate.submit(requests(round_), n=1)
        engine_processes()[-1].kill()
        actor.draws(token)
        with pytest.warns(UserWarning, match="started anew, once"):
            separate.update(actor)
        separate.wait([round_], 1)
        assert separate.take([round_], 1).responses == [[token] * TOKENS]


@pytest.mark.slow
def test_an_engine_that_fails_in_a_step_or_hangs_in_one_is_lost_too() -> None:
    before = fleet.MODULE
    for prompt, said in ((engine_double.DEADLY, "a deadly prompt"), (engine_double.STALLING, "made no step for")):
        separate = backend(timeout_seconds=2.0)
        separate.update(Actor(7))
        separate.submit(requests(0, prompt=prompt), n=1)
        with (
            pytest.warns(UserWarning, match="its process still ran, and was ended"),
            pytest.raises(RolloutError, match=f"(?s){said}.*and before it was started anew: .*{said}"),
        ):
            separate.wait([0], 1)
        separate.close()
    fleet.MODULE = before


def test_engines_end_with_the_backend_and_a_new_one_can_be_prepared(separate: SeparateVLLM) -> None:
    separate.update(Actor(7))
    ended, begin = engine_processes(), time.monotonic()
    separate.close()
    assert time.monotonic() - begin < 4  # at once, without parting from the group of weights
    assert engine_processes() == []
    assert not any(process.is_running() for process in ended)
    assert separate.update(Actor(8)) == 1


def test_what_cannot_be_asked_for_is_told_where_the_ranks_meet(separate: SeparateVLLM) -> None:
    actor = Actor(7)
    with pytest.raises(RolloutError, match=r"call update\(\) before"):
        separate.wait([0], 1)
    separate.update(actor)
    separate.submit([PromptRequest(0, [1] * 60, 0, 0)], n=1)
    with pytest.raises(RolloutError, match="64"):
        separate.wait([0], 1)
    with pytest.raises(RolloutError, match="the request 5 was never made"):
        separate.wait([5], 1)
    with pytest.raises(RolloutError, match="another architecture"):
        separate.generate(tiny_policy(intermediate_size=32).model, [[1, 5]], seed=0)
    assert not separate._goes_on  # what is in flight was held back
    separate.submit(requests(1), n=1)
    assert separate.wait([1], 1) == [1]


def test_engines_that_other_machines_do_not_reach_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def start(engines: fleet.Fleet) -> None:
        engines.addresses = [fleet.Address("http://127.0.0.1:1", "token", "vLLM engine 0")]

    def as_on_two(value: Any) -> list[Any]:
        return [value, "another"] if isinstance(value, str) else [value]

    monkeypatch.setattr(fleet.Fleet, "start", start)
    monkeypatch.setattr(crew, "of_all_ranks", as_on_two)
    separate = SeparateVLLM(RolloutConfig(backend="vllm", vllm=VLLMConfig(colocate=False)), [2], 0)
    with pytest.raises(ConfigError, match="only the first of 2 machines reaches: use launcher=ray, or colocate=true"):
        separate.prepare(Actor(7).causal_lm, torch.device("cpu"), torch.float32)
    assert separate.crew is None


def test_an_engine_that_dies_as_all_meet_is_named_at_once(
    separate: SeparateVLLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(engine_double.LAST_ONE, "")
    separate.config = backend(engines=2, timeout_seconds=300.0).config
    begin = time.monotonic()
    with pytest.raises(ConfigError, match="vLLM engine 1 at .* was lost at /join"):
        separate.prepare(Actor(7).causal_lm, torch.device("cpu"), torch.float32)
    assert time.monotonic() - begin < 100
    assert not engine_processes()


def test_engines_are_shared_by_neighbours_or_belong_to_one_rank() -> None:
    assert [engines_of(rank, 4, 2) for rank in range(4)] == [[0], [0], [1], [1]]
    assert [engines_of(rank, 2, 4) for rank in range(2)] == [[0, 2], [1, 3]]
    separate = SeparateVLLM(RolloutConfig(backend="vllm", vllm=VLLMConfig(colocate=False, num_engines=3)), [2], 0)
    assert separate.config.vllm.problem_with(2) is not None


# ---- several ranks ---------------------------------------------------------------------------------------------------


def ranks_at_work(engines: int, killed_by: int | None) -> None:
    """Each rank asks for as many responses as its number and one; one of them kills an engine before it waits."""
    torch.distributed.init_process_group("gloo")
    separate, actor, rank = backend(engines), Actor(7), own_rank()
    separate.prepare(actor.causal_lm, torch.device("cpu"), torch.float32)
    said: list[Any] = []
    for version in (1, 2):
        assert separate.update(actor) == version
        keys = [10 * version + number for number in range(rank + 1)]
        separate.submit(requests(*keys), n=2)
        if version == 2 and rank == 0 and killed_by is not None:
            engine_processes()[killed_by].kill()
        assert sorted(separate.wait(keys, len(keys))) == keys
        said.append(separate.take(keys, 2).responses)
        actor.draws(8)
    rollout = separate.generate(actor, [[1, 5]] * 3, seed=0)
    torch.distributed.barrier()
    separate.close()
    print("SAID " + json.dumps([said, rollout.responses]))


@pytest.mark.slow
@pytest.mark.parametrize(("ranks", "engines", "killed"), [(2, 1, None), (2, 1, 0), (1, 2, 1), (2, 4, 2)])
def test_ranks_get_their_own_responses_from_engines_that_they_share_or_have_alone(
    run_ranks: RunRanks, ranks: int, engines: int, killed: int | None
) -> None:
    outputs = run_ranks(ranks_at_work, ranks, engines, killed, timeout=400)
    for rank, output in enumerate(outputs):
        said = json.loads(output.rpartition("SAID ")[2].splitlines()[0])
        rows = 2 * (rank + 1)
        assert said == [[[[7] * TOKENS] * rows, [[8] * TOKENS] * rows], [[8] * TOKENS] * 3]


def ranks_without_luck() -> None:
    """An engine dies whenever it is asked by the second rank: both ranks end with the same word on it."""
    torch.distributed.init_process_group("gloo")
    separate, actor = backend(), Actor(7)
    separate.update(actor)
    keys = [0] if own_rank() else []
    separate.submit(requests(*keys, prompt=engine_double.DEADLY), n=1)
    with pytest.raises(RolloutError) as raised:
        separate.wait(keys, len(keys))
    assert raised.value.on_every_rank
    print("SAID " + json.dumps(str(raised.value)))
    separate.close()


@pytest.mark.slow
def test_an_engine_that_is_lost_twice_stops_all_ranks_with_one_word(run_ranks: RunRanks) -> None:
    outputs = run_ranks(ranks_without_luck, 2, timeout=400)
    said = [json.loads(output.rpartition("SAID ")[2].splitlines()[0]) for output in outputs]
    assert said[0] == said[1]
    assert "a deadly prompt" in said[0]
    assert "vLLM engine 0 at http://127.0.0.1:" in said[0]


def test_an_engine_that_cannot_be_started_is_an_error_with_its_reason() -> None:
    separate = SeparateVLLM(RolloutConfig(backend="vllm", vllm=VLLMConfig(colocate=False)), [2], 0)
    with pytest.raises(ConfigError, match=r"(?s)vLLM engine 0 did not start: .*"):
        separate.prepare(tiny_policy().model, torch.device("cpu"), torch.float32)
    assert separate.crew is None
