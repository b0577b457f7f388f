from __future__ import annotations

import json
import re

import pytest

from lightning_hybrid.errors import DataError
from lightning_hybrid.report import report_run
from lightning_hybrid.report.runs import read_run
from tests.report.runs import PPO_METRICS, write_run
from tests.report.test_page import HOSTILE, Page

SAMPLES = [(1, "one", "early", 0.25), (1, "two", "early too", 0.5), (20, "three", "late", 1.75)]


def headings(page):
    return re.findall(r"<h2>(.*?)</h2>|<summary>(.*?)</summary>", page)


def titles(path):
    return ["".join(pair) for pair in headings(path.read_text(encoding="utf-8"))]


def test_a_page_shows_all_that_a_run_has_left(tmp_path):
    folder = write_run(
        tmp_path / "ppo",
        samples=SAMPLES,
        status="finished",
        steps=20,
        planned_steps=20,
        seconds=80.0,
        device="2 × CPU",
        versions={"torch": "2.13.0"},
        config={"seed": 7, "algorithm": {"kl_coef": 0.05}},
    )
    (folder / "rollouts.json").write_text(
        json.dumps({"first": {"steps": [1, 2], "length": [3, 4]}, "last": {"steps": [19, 20], "length": [9, 9]}})
    )
    path = report_run(folder)
    assert path == folder / "report.html"
    assert titles(path) == [
        "Curves",
        "Where the time went",
        "Responses, at the beginning and at the end",
        "Samples",
        "All other metrics",
        "Configuration",
        "Versions",
    ]
    shown = ["finished · 2 × CPU · seed 7", "20 of 20", "1 min 20 s", "0.550 → 2.35", "25%, 20.0 s", "steps 19 to 20"]
    shown += ["early too", "last, after step 20", "score 1.750", '"kl_coef": 0.05', "2.13.0", "lr"]
    text = Page(path).text
    assert [item for item in shown if item not in text] == []


def test_parts_that_a_run_does_not_have_are_not_on_its_page(tmp_path):
    folder = write_run(tmp_path / "sft", {"loss": [3.0, 2.0], "val/loss": [3.5, 2.5]}, stage="1/3 sft")
    assert titles(report_run(folder)) == ["Curves"]
    text = Page(folder / "report.html").text
    assert "SFT · " in text
    assert "nats per token" in text
    assert "validation 2.50" in text


def test_a_run_that_logged_nowhere_says_so(tmp_path):
    folder = write_run(tmp_path / "ppo")
    (folder / "metrics.csv").unlink()
    assert "There are no curves: it logged to no table (logger=none)" in Page(report_run(folder)).text


def test_responses_to_the_same_prompts_stand_beside_each_other(tmp_path):
    samples = [(1, "one", "early", 0.25), (20, "one", "late", 1.75)]
    text = Page(report_run(write_run(tmp_path / "ppo", samples=samples))).text
    assert "▲ +1.500" in text


def test_held_out_responses_stand_beside_those_of_the_reference(tmp_path):
    folder = write_run(tmp_path / "ppo")
    rows = [
        {"step": step, "prompt": "p", "response": f"at {step}", "score": float(step)} | reference
        for step, reference in [(5, {}), (10, {"reference_response": "as it was", "reference_score": -1.0})]
    ]
    (folder / "evaluation.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    text = Page(report_run(folder)).text
    assert "Held-out prompts: before, the reference; after, step 10" in text
    assert "▲ +11.000" in text
    assert "at 5" not in text


def test_a_page_requests_nothing_and_runs_nothing(tmp_path):
    folder = write_run(
        tmp_path / "ppo", samples=[(1, HOSTILE, HOSTILE, 0.0)], status=HOSTILE, config={HOSTILE: HOSTILE}
    )
    path = report_run(folder)
    page = Page(path)
    assert page.names().isdisjoint({"script", "link", "iframe", "img"})
    assert page.open == []
    assert not re.search(r"https?:|url\(|@import", path.read_text(encoding="utf-8").replace(HOSTILE, ""))


def test_the_page_of_a_long_run_stays_small(tmp_path):
    metrics = {name: [(step * 7 % 13) / 3 for step in range(5000)] for name in [*PPO_METRICS, "policy/entropy"]}
    assert report_run(write_run(tmp_path / "ppo", metrics)).stat().st_size < 200_000


def test_a_folder_that_is_no_run_is_named_with_what_is_in_it(tmp_path):
    write_run(tmp_path / "outputs" / "ppo")
    with pytest.raises(DataError, match=r"outputs' is not the folder of a run: .*but ppo; runs in it: .*outputs/ppo"):
        read_run(tmp_path / "outputs")
    with pytest.raises(DataError, match="no run at '.*gone': there is no such folder"):
        read_run(tmp_path / "gone")


def test_a_damaged_file_is_named_with_its_line(tmp_path):
    folder = write_run(tmp_path / "ppo", samples=SAMPLES)
    with (folder / "samples.jsonl").open("a") as file:
        file.write('{"step": 3}\n{"cut of')
    with pytest.raises(
        DataError, match=r"samples\.jsonl:4: not a sample with step, prompt, response and score: KeyError"
    ):
        read_run(folder)
    (folder / "run.json").write_text("[]")
    with pytest.raises(DataError, match=r"run\.json holds no JSON object, but list"):
        read_run(folder)


def test_a_last_line_that_was_cut_off_is_no_damage(tmp_path):
    folder = write_run(tmp_path / "ppo", samples=SAMPLES)
    with (folder / "samples.jsonl").open("a") as file:
        file.write('{"step": 3, "pro')
    assert [sample.step for sample in read_run(folder).samples] == [1, 1, 20]
