"""The process behind a `Judge`: reads questions, one JSON object a line, and answers each with another.

It is run as a file, so that it imports nothing of the package: what it reads was written by a model that is rewarded
for finding its weak spots, and it may be ended at any time. Nothing that it reads is executed: math-verify cuts
expressions out of the text and reads them as LaTeX with a grammar, or as sums, where they hold nothing but digits and
operators.
"""

from __future__ import annotations

import json
import logging
import re
import resource
import signal
import sys
from collections.abc import Callable
from functools import lru_cache
from typing import Any

MEMORY = 4 * 2**30  # bytes of address space, beyond which an expression has failed
GRACE = 1.0  # seconds after which this process ends itself where nobody has ended it
GOLDS = 4096  # right answers that are kept parsed
# A right answer that says itself where its mathematics is; any other is mathematics as a whole.
_DELIMITED = re.compile(r"\$|\\boxed|\\\(|\\\[")
_PLAIN_NUMBER = re.compile(r"-?[$€£]?-?[0-9][0-9,]*(\.[0-9]+)?%?|-?[0-9]+/[0-9]+")


def main(kind: str) -> None:
    """Answer until the questions end."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the keyboard is for the run
    signal.signal(signal.SIGALRM, signal.SIG_DFL)  # ends the process, whatever keeps the interpreter
    logging.disable()
    answers, sys.stdout = sys.stdout, sys.stderr  # whatever prints must not print between the answers
    judge = _prepared_math() if kind == "math" else _matches
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    print(json.dumps({"ready": True}), file=answers, flush=True)
    for line in sys.stdin:
        question = json.loads(line)
        # Whoever asks ends this process when time is up, unless he was ended himself.
        signal.setitimer(signal.ITIMER_REAL, question["seconds"] + GRACE)
        answer = _answer(judge, question)
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        print(json.dumps(answer), file=answers, flush=True)


def _answer(judge: Callable[[dict[str, Any]], bool | None], question: dict[str, Any]) -> dict[str, Any]:
    try:
        return {"right": judge(question)}
    except BaseException as error:  # of math-verify also time-outs, which are no Exception
        return {"failed": f"{type(error).__name__}: {str(error)[:100]}"}


def _matches(question: dict[str, Any]) -> bool:
    """Whether a pattern matches a text from end to end."""
    return re.fullmatch(question["pattern"], question["response"], re.DOTALL) is not None


def _prepared_math() -> Callable[[dict[str, Any]], bool | None]:
    from math_verify import parse, verify

    # Its own limits are signals, which cannot end a power that is being computed: whoever asks ends this process.
    read = {"parsing_timeout": None}
    parse("1", **read)  # its tables, before the first question

    gold_of = lru_cache(GOLDS)(lambda gold: parse(_delimited(gold), **read))

    def judge(question: dict[str, Any]) -> bool | None:
        gold = gold_of(question["gold"])
        if not gold:
            return None
        found = parse(_said(question["response"]), raise_on_error=True, **read)
        return bool(verify(gold, found, timeout_seconds=None, raise_on_error=True))

    return judge


def _delimited(gold: str) -> str:
    """A right answer such that math-verify finds it: behind ``####`` where it has that, and between dollars."""
    answer = gold.rpartition("####")[2].strip()
    return answer if _DELIMITED.search(answer) or _PLAIN_NUMBER.fullmatch(answer) else f"${answer}$"


def _said(response: str) -> str:
    """A response, or the number that it ends with behind ``####``, beside which other sums would be found first."""
    _, marker, rest = response.rpartition("####")
    return rest.strip() if marker and _PLAIN_NUMBER.fullmatch(rest.strip()) else response


if __name__ == "__main__":
    main(sys.argv[1])
