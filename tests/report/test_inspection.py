"""What `lightning-hybrid inspect` shows of each kind of data, on real and on small data."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from lightning_hybrid.config.inspect import InspectRun, with_kind
from lightning_hybrid.config.run import compose_run
from lightning_hybrid.data.encoding import EncodedText
from lightning_hybrid.data.task import build_tokenizer
from lightning_hybrid.errors import ConfigError
from lightning_hybrid.report.inspection import Inspection, inspect_run
from lightning_hybrid.report.inspection_text import render

ROOT = Path(__file__).resolve().parent.parent.parent
WORDS = "mia visits the market ."
ROWS: dict[str, list[dict[str, Any]]] = {
    "instructions": [
        {"prompt": WORDS, "response": "the soup is warm ."},
        {"prompt": WORDS, "response": "the soup is warm ."},
        {"prompt": WORDS, "response": "the garden is bright . the ice is soft ."},
        {"prompt": WORDS, "response": ""},
    ],
    "preferences": [{"prompt": WORDS, "chosen": "the soup is warm .", "rejected": "the ice ."}] * 2,
    "unpaired": [{"prompt": WORDS, "completion": "the soup .", "label": good} for good in (True, False)],
    "prompts": [{"prompt": WORDS, "answer": "4"}],
}


@pytest.fixture
def inspect(tmp_path: Path) -> Any:
    def look(kind: str, rows: list[dict[str, Any]], *overrides: str) -> Inspection:
        build_tokenizer().save_pretrained(tmp_path / "tokenizer")
        (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        given = [f"data={kind}", f"data.path={tmp_path}/rows.jsonl", f"model.tokenizer={tmp_path}/tokenizer"]
        run = compose_run("inspect", InspectRun, [*given, f"output_dir={tmp_path}/out", *overrides])
        return inspect_run(with_kind(run))

    return look


def test_instructions_are_counted_with_what_is_dropped_repeated_and_too_long(inspect: Any) -> None:
    found = inspect("instructions", ROWS["instructions"], "data.max_length=14", "data.batch_size=2")
    assert (found.kept, found.dropped) == (3, {"with an empty response": 1})
    assert found.lengths == {"text": [12, 12, 17], "learned": [6, 6, 11]}
    assert (found.repeated, found.beyond, found.limit) == (1, 1, 14)
    assert found.arrangement.random == found.arrangement.balanced == 0
    assert found.arrangement.packed == pytest.approx(1 - 24 / 28)
    shown = render(found, color=False)
    assert "instructions: 3 rows kept of 4" in shown
    assert "1 rows (33.3%) have more than 14 tokens: dropped in training" in shown
    assert "read as prompt_response, from the columns prompt, response" in shown


def test_of_a_stream_the_same_is_counted(inspect: Any) -> None:
    plain, streamed = (
        inspect("instructions", ROWS["instructions"], f"data.streaming={streaming}") for streaming in ("false", "true")
    )
    assert (streamed.kept, streamed.dropped) == (plain.kept, plain.dropped) == (3, {"with an empty response": 1})


def test_rows_that_training_cuts_are_counted_as_long_as_they_are_then(inspect: Any) -> None:
    cut = inspect("instructions", ROWS["instructions"], "data.max_length=14", "data.too_long=truncate")
    assert cut.arrangement.packed == pytest.approx(1 - (12 + 12 + 14) / (3 * 14))
    assert cut.arrangement.random == pytest.approx(1 - (12 + 12 + 14) / (3 * 14))


def test_control_characters_in_samples_are_shown_and_not_obeyed() -> None:
    from transformers import ByT5Tokenizer

    tokenizer = ByT5Tokenizer()
    ids = tokenizer("a\x1b[2Jb\r\tc\n\x9bd", add_special_tokens=False)["input_ids"]
    text = EncodedText(ids, [False] * len(ids))
    nothing: dict[str, Any] = {"limit": None, "reserve": 0, "too_long": "drop", "beyond": 0, "repeated": 0}
    found = Inspection(
        "prompts",
        tokenizer,
        [],
        {},
        1,
        {},
        {"prompt": [len(ids)]},
        **nothing,
        arrangement=None,
        samples=[{"prompt": text}],
    )
    for color in (True, False):
        shown = render(found, color=color)
        assert r"a\x1b[2Jb\r" + "\tc\n" + r"\x9bd" in shown
        assert "\x1b[2J" not in shown


def test_samples_mark_what_is_learned_in_brackets_or_in_colours(inspect: Any) -> None:
    found = inspect("instructions", ROWS["instructions"][:1])
    assert "{<bos>} mia visits the market .[ the soup is warm .][{ <eos>}]" in render(found, color=False)
    shown = render(found, color=True)
    assert "\033[35m<bos>\033[0m\033[36m mia visits the market .\033[0m\033[32m the soup is warm .\033[0m" in shown
    assert "\033" not in render(found, color=False)
    assert "{<bos>} mia ... 10 more" in render(found, color=False, sample_tokens=2)


def test_pairs_labelled_responses_and_prompts_are_shown_by_what_they_are(inspect: Any) -> None:
    pairs = inspect("preferences", ROWS["preferences"])
    assert pairs.lengths["chosen"] == [12, 12]
    assert pairs.lengths["learned of rejected"] == [4, 4]
    assert "[ the ice .][{ <eos>}]" in render(pairs, color=False)
    labelled = inspect("unpaired", ROWS["unpaired"])
    assert {name for sample in labelled.samples for name in sample} == {"desirable", "undesirable"}
    few = ("data.max_length=20", "max_new_tokens=15", "data.too_long=error")
    prompts = inspect("prompts", ROWS["prompts"], *few)
    assert (prompts.lengths, prompts.beyond, prompts.arrangement) == ({"prompt": [6]}, 1, None)
    assert "more than 20 tokens less 15 new ones: an error in training" in render(prompts, color=False)


def test_wrong_settings_of_the_data_are_named_as_those_of_its_kind(inspect: Any) -> None:
    with pytest.raises(ConfigError, match="data.chosn_key = 'a': unknown key. Did you mean 'chosen_key'?"):
        inspect("preferences", ROWS["preferences"], "data.chosn_key=a")


def test_nothing_to_take_tokens_from_is_refused() -> None:
    with pytest.raises(ConfigError, match="model.path = nothing: give model.path, or model.tokenizer"):
        compose_run("inspect", InspectRun, ["data.path=rows.jsonl"])


def test_the_command_shows_real_conversations_and_draws_their_lengths(shared: Path, tmp_path: Path) -> None:
    command = [sys.executable, "lightning_hybrid_cli.py", "inspect", "data=preferences", "data.template=plain"]
    paths = [f"data.path={shared}/data/llamafactory_dpo_en_demo.json", f"model.path={shared}/models/tinystories-656k"]
    environment = {key: value for key, value in os.environ.items() if key not in ("FORCE_COLOR", "NO_COLOR")}
    ended = subprocess.run(
        [*command, *paths, f"output_dir={tmp_path}"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=110,
        env=environment,
    )
    assert ended.returncode == 0, ended.stderr
    assert "rows kept of 300" in ended.stdout
    assert "read as sharegpt_pairs" in ended.stdout
    assert "Human:" in ended.stdout
    assert "\033" not in ended.stdout
    assert (tmp_path / "lengths.png").read_bytes().startswith(b"\x89PNG")
