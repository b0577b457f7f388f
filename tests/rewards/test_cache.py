from __future__ import annotations

import datetime
import multiprocessing
import sqlite3
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_hybrid.config import RewardSourceConfig
from lightning_hybrid.errors import ConfigError, RewardError
from lightning_hybrid.rewards import (
    CachedReward,
    FormatReward,
    GSM8KReward,
    MathReward,
    RepetitionPenalty,
    RewardFunction,
    WeightedRewards,
    load_reward_function,
    reward_from,
)
from lightning_hybrid.rewards.cache import FileStore, MemoryStore

ASKED: list[str] = []


def third(prompts: list[str], responses: list[str], answer: list[Any]) -> list[float]:
    ASKED.extend(responses)
    return [len(response) / 3 + len(str(gold)) / 7 for response, gold in zip(responses, answer, strict=True)]


@pytest.fixture(params=["memory", "file"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> MemoryStore | FileStore:
    ASKED.clear()
    return MemoryStore() if request.param == "memory" else FileStore(tmp_path / "folder" / "scores.db")


def test_a_cached_reward_gives_the_same_numbers_and_asks_once(store: Any) -> None:
    plain, cached = RewardFunction(third), CachedReward(RewardFunction(third), store)
    assert cached.needed_fields == {"answer"}
    first = ["p"] * 4, ["a", "bb", "a", "bb"], {"answer": ["1", "1", "1", "22"]}
    expected = plain(*first)
    ASKED.clear()
    assert torch.equal(cached(*first), expected)
    assert ASKED == ["a", "bb", "bb"]
    assert cached.figures["cache_hits"].tolist() == [0.0, 0.0, 1.0, 0.0]
    assert torch.equal(cached(*first), expected)
    assert len(ASKED) == 3
    assert cached.figures["cache_hits"].tolist() == [1.0] * 4
    second = ["p", "q"], ["a", "a"], {"answer": ["1", "1"]}
    assert torch.equal(cached(*second), plain(*second))
    assert cached.figures["cache_hits"].tolist() == [1.0, 0.0]
    assert cached([], [], {"answer": []}).shape == (0,)


def test_columns_that_are_not_read_do_not_matter(store: Any) -> None:
    cached = CachedReward(RewardFunction(third), store)
    cached(["p"], ["a"], {"answer": ["1"], "id": [7]})
    cached(["p"], ["a"], {"answer": ["1"], "id": [object()]})
    assert ASKED == ["a"]


def test_what_could_not_be_verified_is_asked_again(store: Any) -> None:
    cached = CachedReward(GSM8KReward(), store)
    for _ in range(2):
        assert cached(["", ""], ["5", "5"], {"answer": ["none", "5"]}).tolist() == [0.0, 1.0]
        assert cached.figures["unverified"].tolist() == [1.0, 0.0]
    assert cached.figures["cache_hits"].tolist() == [0.0, 1.0]


def test_figures_have_the_same_names_when_nothing_was_asked(store: Any) -> None:
    CachedReward(GSM8KReward(), store)(["", ""], ["5", "6"], {"answer": ["5", "5"]})
    fresh = CachedReward(GSM8KReward(), store)
    assert fresh(["", ""], ["5", "6"], {"answer": ["5", "5"]}).tolist() == [1.0, 0.0]
    assert {name: values.tolist() for name, values in fresh.figures.items()} == {
        "unverified": [0.0, 0.0],
        "cache_hits": [1.0, 1.0],
    }


def nothing(prompts: list[str], responses: list[str], answer: list[Any]) -> list[float]:
    return [0.0] * len(responses)


def test_rewards_do_not_see_each_others_scores(store: Any) -> None:
    long = CachedReward(RewardFunction(third), store)
    short = CachedReward(RewardFunction(nothing), store)
    assert long(["p"], ["a"], {"answer": ["1"]}).item() != 0
    assert short(["p"], ["a"], {"answer": ["1"]}).item() == 0
    forms = [CachedReward(FormatReward(pattern), store) for pattern in ("a", "b")]
    assert [form(["p"], ["a"]).item() for form in forms] == [1.0, 0.0]
    loops = [CachedReward(RepetitionPenalty(ngram), store) for ngram in (1, 2)]
    assert [loop(["p"], ["a a"]).item() for loop in loops] == [-0.5, 0.0]


# Functions that hold values of their own, as a user's module may; their names are those of one another.
HOLDING_VALUES = """
from functools import partial

def always(number):
    def score(prompts, responses):
        return [number] * len(responses)
    return score

class Always:
    def __init__(self, number):
        self.number = number
    def __call__(self, prompts, responses):
        return [self.number] * len(responses)

def of(number, prompts, responses):
    return [number] * len(responses)

closure_1, closure_2 = always(1.0), always(2.0)
object_1, object_2 = Always(1.0), Always(2.0)
method_1, method_2 = Always(1.0).__call__, Always(2.0).__call__
partial_1, partial_2 = partial(of, 1.0), partial(of, 2.0)
lambda_1, lambda_2 = (lambda p, r: [1.0] * len(r)), (lambda p, r: [2.0] * len(r))
"""


@pytest.mark.parametrize("kind", ["closure", "object", "method", "partial", "lambda"])
def test_functions_that_hold_values_share_no_scores_and_are_not_known_again_in_a_file(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "holding_values.py").write_text(HOLDING_VALUES)
    monkeypatch.syspath_prepend(str(tmp_path))
    terms = {f"term_{n}": {"function": f"holding_values:{kind}_{n}"} for n in (1, 2)}
    reward = reward_from(RewardSourceConfig(terms=terms, cache=True))
    for _ in range(2):
        assert reward(["p"], ["r"]).tolist() == [3.0]
    assert reward.figures["term_1/cache_hits"].tolist() == [1.0]
    store = MemoryStore()
    functions = [load_reward_function(f"holding_values:{kind}_{n}") for n in (1, 2)]
    assert [CachedReward(RewardFunction(f), store)(["p"], ["r"]).item() for f in functions] == [1.0, 2.0]
    with pytest.raises(ConfigError, match=r"terms.term_1: reward.cache = .* write it as def at the top level"):
        reward_from(RewardSourceConfig(terms=terms, cache=str(tmp_path / "scores.db")))
    together = WeightedRewards({"a": (1.0, RewardFunction(third)), "b": (1.0, RewardFunction(functions[0]))})
    with pytest.raises(ConfigError, match="cannot know reward 'terms' again in another run"):
        CachedReward(together, FileStore(tmp_path / "scores.db"))


def test_a_function_whose_file_changed_is_asked_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    identities = []
    for number in (1, 2):
        folder = tmp_path / str(number)
        folder.mkdir()
        (folder / "edited_score.py").write_text(f"def score(prompts, responses):\n    return [{number}.0]\n")
        monkeypatch.syspath_prepend(str(folder))
        import sys

        sys.modules.pop("edited_score", None)
        config = RewardSourceConfig(function="edited_score:score", cache=str(tmp_path / "scores.db"))
        reward = reward_from(config)
        assert reward(["p"], ["r"]).tolist() == [float(number)]
        identities.append(reward.identity())
    assert identities[0] != identities[1]


def test_memory_forgets_what_was_not_asked_for_the_longest() -> None:
    store = MemoryStore(most=2)
    store.put({"a": 1.0, "b": 2.0})
    assert store.get(["a"]) == {"a": 1.0}
    store.put({"c": 3.0})
    assert store.get(["a", "b", "c"]) == {"a": 1.0, "c": 3.0}


def test_more_scores_than_one_query_takes(tmp_path: Path) -> None:
    store, scores = FileStore(tmp_path / "scores.db"), {f"key {i}": i / 3 for i in range(2000)}
    store.put(scores)
    assert store.get(scores) == scores


def test_a_column_that_cannot_be_told_apart_is_refused(store: Any) -> None:
    with pytest.raises(RewardError, match="cannot be told apart by a cache .*datetime.* not JSON serializable"):
        CachedReward(RewardFunction(third), store)(["p"], ["a"], {"answer": [datetime.datetime(2020, 1, 1)]})


def test_a_file_that_is_no_cache_is_left_alone(tmp_path: Path) -> None:
    notes = tmp_path / "notes.txt"
    notes.write_text("not a database, and rather longer than the header of one " * 20)
    with pytest.raises(ConfigError, match=r"reward.cache = '.*notes.txt' cannot be used as a cache \(file is not a"):
        reward_from(RewardSourceConfig(verify="math", cache=str(notes)))
    assert notes.read_text().startswith("not a database")
    other = tmp_path / "other.db"
    with sqlite3.connect(other) as connection:
        connection.execute("CREATE TABLE scores (name TEXT)")
    with pytest.raises(ConfigError, match="cannot be used as a cache .*no such column: key"):
        FileStore(other)


def test_a_file_that_is_spoilt_later_stops_the_run_with_its_name(tmp_path: Path) -> None:
    store = FileStore(tmp_path / "scores.db")
    store.path.write_bytes(b"spoilt" * 1000)
    with pytest.raises(RewardError, match="the reward cache .*scores.db failed .*: check the disk"):
        store.get(["a"])


def test_what_is_slower_than_the_cache_is_cached_and_models_in_engines_are_not(tmp_path: Path) -> None:
    terms = {"a": {"verify": "math"}, "b": {"verify": "gsm8k"}, "c": {"penalty": "repetition"}}
    reward = reward_from(RewardSourceConfig(terms=terms, cache=True))
    assert isinstance(reward, WeightedRewards)
    assert isinstance(reward.terms["a"], CachedReward)
    assert isinstance(reward.terms["a"].reward, MathReward)
    assert not isinstance(reward.terms["b"], CachedReward)
    assert list(reward.figures) == ["a", "b", "c", "a/unverified", "a/cache_hits", "b/unverified"]


def write_and_read(path: str, rank: int) -> None:
    """One of several processes that write the same keys and some of their own, at the same time."""
    for turn in range(10):
        store = FileStore(path)
        store.put({f"{turn} {i}": i / 3 for i in range(20)} | {f"rank {rank} {turn}": 1.0})
        assert store.get([f"{turn} {i}" for i in range(20)]) == {f"{turn} {i}": i / 3 for i in range(20)}


def test_processes_share_a_file(tmp_path: Path) -> None:
    path = str(tmp_path / "scores.db")
    processes = [multiprocessing.get_context("fork").Process(target=write_and_read, args=(path, n)) for n in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert len(FileStore(path).get([f"rank {rank} {turn}" for rank in range(3) for turn in range(10)])) == 30
