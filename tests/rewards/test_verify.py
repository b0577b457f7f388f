"""Verifiable rewards, against hand-worked cases, real rows, and responses that attack the one who reads them."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from lightning_hybrid.errors import ConfigError, RewardError
from lightning_hybrid.rewards import ExactReward, FormatReward, GSM8KReward, MathReward, RepetitionPenalty
from lightning_hybrid.rewards.gsm8k import last_number, marked_number
from tests.conftest import ROOT


def gsm8k_answers(shared: Path) -> list[str]:
    with (shared / "data" / "gsm8k_train.jsonl").open() as rows:
        return [json.loads(row)["answer"] for row in rows]


@pytest.fixture(scope="module")
def math() -> MathReward:
    """One process for all tests; it starts anew where a test makes it end."""
    return MathReward()


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("so it is 72", "72"),
        ("$1,234.50.", "1234.5"),
        ("1,234,567 apples", "1234567"),
        ("it costs -$5", "-5"),
        ("it costs $-5", "-5"),
        ("a loss of -3.50", "-3.5"),
        ("48-24=24 and 10-7", "7"),
        ("3,4", "4"),
        (".5", "0.5"),
        ("2.", "2"),
        ("no number", None),
        ("", None),
        ("٣", None),
        ("9" * 2000, None),
    ],
)
def test_the_last_number_of_a_text(text: str, number: str | None) -> None:
    found = last_number(text)
    assert (None if number is None else float(number)) == (None if found is None else float(found))


def test_the_marked_number_is_the_last_behind_a_marker() -> None:
    assert marked_number("#### 5\nno, wait\n#### 1,024 apples, 3 pears") == 1024
    assert marked_number("#### Step 2: add 3") is None


@pytest.mark.parametrize(
    ("response", "score"),
    [
        ("48 + 24\n#### 72", 1.0),
        ("the answer is 72.", 1.0),
        ("72.0", 1.0),
        ("#### 72\nI also like 7", 1.0),
        ("#### Step 1: 48 + 24\n72", 1.0),
        ("#### 71", 0.0),
        ("-72", 0.0),
        ("72 or 73", 0.0),
        ("seventy-two", 0.0),
        ("", 0.0),
    ],
)
def test_gsm8k_compares_numbers(response: str, score: float) -> None:
    assert GSM8KReward()(["q"], [response], {"answer": ["48 + 24 = <<48+24=72>>72\n#### 72"]}).tolist() == [score]


@pytest.mark.parametrize("gold", ["1,234", 1234, 1234.0, "#### $1,234.00"])
def test_gsm8k_reads_right_answers_of_several_kinds(gold: object) -> None:
    assert GSM8KReward("n")(["q"], ["1234"], {"n": [gold]}).tolist() == [1.0]


def test_every_gsm8k_answer_is_right_by_itself_and_wrong_by_its_successor(shared: Path) -> None:
    golds = gsm8k_answers(shared)
    assert len(golds) == 7473
    assert GSM8KReward()([""] * 7473, golds, {"answer": golds}).tolist() == [1.0] * 7473
    others = [f"#### {marked_number(gold) + 1}" for gold in golds]  # type: ignore[operator]
    assert GSM8KReward()([""] * 7473, others, {"answer": golds}).sum() == 0


def test_math_finds_gsm8k_answers_right_and_their_successors_wrong(shared: Path, math: MathReward) -> None:
    golds = gsm8k_answers(shared)[:500]
    assert math([""] * 500, golds, {"answer": golds}).tolist() == [1.0] * 500
    assert math.figures["unverified"].sum() == 0
    others = [f"so #### {marked_number(gold) + 1}" for gold in golds]  # type: ignore[operator]
    assert math([""] * 500, others, {"answer": golds}).sum() == 0


@pytest.mark.parametrize(
    ("gold", "response", "score"),
    [
        ("1/2", "The answer is $0.5$", 1.0),
        (r"\frac{1}{2}", r"so \boxed{\frac{2}{4}}", 1.0),
        ("x^2+1", "$1+x^2$", 1.0),
        ("x^2+1", "$x^2+2$", 0.0),
        (r"$\{1,2\}$", r"\boxed{\{2, 1\}}", 1.0),
        (72, "it is 72", 1.0),
        ("5", "nothing to see", 0.0),
        ("5", "", 0.0),
    ],
)
def test_math_compares_meanings(gold: object, response: str, score: float, math: MathReward) -> None:
    assert math(["q"], [response], {"answer": [gold]}).tolist() == [score]
    assert math.figures["unverified"].tolist() == [0.0]


def test_math_works_in_a_thread(math: MathReward) -> None:
    scores: list[list[float]] = []
    thread = threading.Thread(target=lambda: scores.append(math(["q"], ["5"], {"answer": ["5"]}).tolist()))
    thread.start()
    thread.join(60)
    assert scores == [[1.0]]


def test_what_cannot_be_verified_in_time_scores_0_is_counted_and_said(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, math: MathReward
) -> None:
    monkeypatch.setattr("lightning_hybrid.rewards.verify.SECONDS_EACH", 1.0)
    monkeypatch.setattr(logging.getLogger("lightning_hybrid"), "propagate", True)
    responses = ["5", "9**9**9**9", r"$9^{9^{9^{9}}}$", "$99999999!$", "5"]
    began = time.monotonic()
    assert math([""] * 5, responses, {"answer": ["5"] * 5}).tolist() == [1.0, 0.0, 0.0, 0.0, 1.0]
    assert math.figures["unverified"].tolist() == [0.0, 1.0, 1.0, 1.0, 0.0]
    assert time.monotonic() - began < 40
    assert "3 of 5 responses could not be verified and score 0; the first, sample 1 ('9**9**9**9')" in caplog.text
    assert "no answer within 1 seconds" in caplog.text


def test_nothing_in_a_response_is_executed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightning_hybrid.rewards.verify.SECONDS_EACH", 2.0)
    trap = tmp_path / "sprung"
    code = f"__import__('pathlib').Path({str(trap)!r}).touch()"
    hostile = [code, f"${code}$", rf"\boxed{{{code}}}", f"answer: {code}", f"$\\text{{{code}}}$", f"#### {code}"]
    deep = ["(" * 4000 + "5" + ")" * 4000, "$" + "{" * 4000 + "6" + "}" * 4000 + "$", "1+" * 4000 + "1", "\ud800\x00"]
    responses = hostile + deep
    scores = MathReward()([""] * len(responses), responses, {"answer": ["7"] * len(responses)})
    assert scores.sum() == 0
    assert not trap.exists()


def test_the_batchs_time_limit_leaves_the_rest_unverified(monkeypatch: pytest.MonkeyPatch) -> None:
    reward = MathReward(timeout_seconds=60.0)
    reward([""], ["5"], {"answer": ["5"]})  # the process has started
    reward.timeout_seconds = 2.0
    assert reward([""] * 3, ["5", "9**9**9**9", "5"], {"answer": ["5"] * 3}).tolist() == [1.0, 0.0, 0.0]
    assert reward.figures["unverified"].tolist() == [0.0, 1.0, 1.0]


def test_one_unreadable_right_answer_is_counted_and_a_column_of_them_refused() -> None:
    reward = GSM8KReward()
    assert reward(["", ""], ["5", "5"], {"answer": ["none", "5"]}).tolist() == [0.0, 1.0]
    assert reward.figures["unverified"].tolist() == [1.0, 0.0]
    assert reward(["", ""], ["5", "5"], {"answer": ["none", "nothing"]}).tolist() == [0.0, 0.0]
    of_one_prompt = {"answer": ["none", "none"]}
    assert GSM8KReward()(["", ""], ["5", "5"], of_one_prompt).tolist() == [0.0, 0.0]
    with pytest.raises(RewardError, match="no right answer in the column 'q' can be read, such as 'how many[?]'"):
        GSM8KReward("q")(["", ""], ["5", "5"], {"q": ["how many?", None]})
    with pytest.raises(RewardError, match="such as ' ' and '': set answer_key to the column that holds them"):
        MathReward()(["", ""], ["5", "5"], {"answer": [" ", True]})


def test_a_missing_column_is_named() -> None:
    with pytest.raises(
        RewardError, match="reward 'math' asks for the column 'answer', .*: columns are 'anwser'; did you"
    ):
        MathReward()(["q"], ["r"], {"anwser": ["5"]})


def test_exact_ignores_white_space_around() -> None:
    scores = ExactReward("label")([""] * 3, [" yes\n", "Yes", "yes no"], {"label": ["yes", "yes", "yes"]})
    assert scores.tolist() == [1.0, 0.0, 0.0]


def test_a_format_must_match_from_end_to_end() -> None:
    responses = ["<think>a\nb</think> 5", " <think>a</think> 5", "<think>a</think>", "5"]
    assert FormatReward(r"<think>.*</think>.*")([""] * 4, responses).tolist() == [1.0, 0.0, 1.0, 0.0]


def test_a_long_response_is_judged_as_a_whole_and_searched_at_its_end() -> None:
    thought = f"<think>{'so it goes. ' * 2000}</think> 5"
    assert FormatReward(r"<think>.*</think>.*")([""] * 2, [thought, f"x{thought}"]).tolist() == [1.0, 0.0]
    assert ExactReward()([""] * 2, [thought, thought[1:]], {"answer": [thought] * 2}).tolist() == [1.0, 0.0]
    assert GSM8KReward()([""] * 2, [thought, f"5 {'or so ' * 2000}"], {"answer": ["5"] * 2}).tolist() == [1.0, 0.0]


ASKING = """
from lightning_hybrid.rewards.judge import Judge
judge = Judge("format")
judge.ask({"pattern": "a", "response": "a"}, 60.0)
print(judge._process.pid, flush=True)
judge.ask({"pattern": "(a+)+b", "response": "a" * 60}, 2.0)
"""


def test_the_process_that_judges_ends_soon_after_one_that_was_killed() -> None:
    with subprocess.Popen([sys.executable, "-c", ASKING], stdout=subprocess.PIPE, cwd=ROOT) as asking:
        assert asking.stdout is not None
        judge = int(asking.stdout.readline())
        time.sleep(0.5)  # it is at the question that it would never end
        asking.kill()
    assert is_running(judge)
    deadline = time.monotonic() + 15
    while is_running(judge) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not is_running(judge)


def is_running(process: int) -> bool:
    """Whether there is such a process that is more than the record of its end."""
    try:
        state = Path(f"/proc/{process}/stat").read_text().rpartition(") ")[2][0]
    except FileNotFoundError:
        return False
    return state != "Z"


def test_a_pattern_that_a_response_makes_explode_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightning_hybrid.rewards.verify.SECONDS_EACH", 1.0)
    reward = FormatReward(r"(a+)+b")
    began = time.monotonic()
    assert reward([""] * 3, ["aab", "a" * 60, "ab"]).tolist() == [1.0, 0.0, 1.0]
    assert reward.figures["unverified"].tolist() == [0.0, 1.0, 0.0]
    assert time.monotonic() - began < 20


def test_a_pattern_that_is_none_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"reward.format = '\(' is no regular expression of Python"):
        FormatReward("(")


def test_the_repetition_penalty_is_minus_the_share_of_repeated_ngrams() -> None:
    # bigrams of "the cat the cat the cat": 5, of which 2 different; trigrams: 4, of which 2
    text = "the cat The cat\nthe cat"
    assert RepetitionPenalty(2)([""], [text]).tolist() == pytest.approx([-0.6])
    assert RepetitionPenalty(3)([""], [text]).tolist() == pytest.approx([-0.5])
    assert RepetitionPenalty(3)([""] * 3, ["", "two words", "all of these differ"]).tolist() == [0.0, 0.0, 0.0]
