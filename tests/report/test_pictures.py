from __future__ import annotations

import math

import pytest
from matplotlib.image import imread

from lightning_hybrid.errors import DataError
from lightning_hybrid.report import draw_comparison, draw_curves
from lightning_hybrid.report.curves import choose_panels, smooth

STEPS = list(range(60))
LINE = (STEPS, [math.sin(step) for step in STEPS])
POINT = ([59], [0.5])
EVERYTHING = {
    "sft": {"loss": LINE, "val/loss": POINT},
    "reward": {"loss": LINE, "accuracy": LINE, "val/accuracy": POINT},
    "ppo": {
        "reward/score": LINE,
        "policy/kl": LINE,
        "policy/entropy": LINE,
        "policy/clip_fraction": LINE,
        "value/explained_variance": LINE,
        "rollout/response_length": LINE,
        "rollout/eos_rate": LINE,
        "seconds/update": LINE,
        "seconds/rollout": LINE,
        "seconds/later": POINT,
        "optimizer_steps": LINE,
    },
}


def titles(metrics_by_stage):
    return [(stage, panel.title) for stage, panel in choose_panels(metrics_by_stage)]


def ink(picture):
    """Share of the pixels that are not white."""
    return float((picture[..., :3].min(-1) < 0.98).mean())


def test_each_part_of_the_picture_holds_a_panel(tmp_path):
    path = tmp_path / "new" / "curves.png"
    draw_curves(EVERYTHING, path)
    assert path.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    picture = imread(path)
    assert len(titles(EVERYTHING)) == 11
    height, width = picture.shape[0] // 4, picture.shape[1] // 3
    cells = [picture[r * height : (r + 1) * height, c * width : (c + 1) * width] for r in range(4) for c in range(3)]
    assert all(ink(cell) > 0.01 for cell in cells[:11])
    assert ink(cells[11]) < 0.001  # nothing where no metric is left


def test_metrics_that_were_not_logged_are_left_out():
    assert titles({"ppo": {"policy/kl": LINE, "lr": LINE}, "sft": {"val/loss": POINT}}) == [
        ("sft", "loss"),
        ("ppo", "KL to the reference"),
    ]


@pytest.mark.parametrize("value", [0.0, 1.0, math.nan, math.inf])
def test_one_point_is_enough_for_a_picture_whatever_it_is(tmp_path, value):
    point = ([5], [value])
    draw_curves({"ppo": {"policy/kl": point, "seconds/rollout": ([5], [0.0])}}, tmp_path / "curves.png")
    assert ink(imread(tmp_path / "curves.png")) > 0.005


def test_drawing_leaves_the_users_pyplot_alone(tmp_path):
    from matplotlib import pyplot, rcParams

    mine = pyplot.figure()
    settings = dict(rcParams)
    draw_curves({"sft": {"loss": LINE}}, tmp_path / "curves.png")
    draw_comparison([0.0, 1.0], [1.0, 2.0], tmp_path / "scores.png")
    assert pyplot.gcf() is mine
    assert pyplot.get_fignums() == [mine.number]
    assert dict(rcParams) == settings
    pyplot.close(mine)


def test_nothing_to_draw_says_what_was_logged(tmp_path):
    with pytest.raises(DataError, match=r"no curve to draw in .*curves\.png.*\{'sft': \['lr'\]\}"):
        draw_curves({"sft": {"lr": LINE}}, tmp_path / "curves.png")


def test_a_stage_without_curves_is_named(tmp_path):
    with pytest.raises(
        DataError, match=r"unknown stages \['grpo'\]: there are curves for \['sft', 'reward', 'dpo', 'kto'"
    ):
        draw_curves({"grpo": {"loss": LINE}}, tmp_path / "curves.png")


def test_smoothing_keeps_a_straight_line_straight_and_bridges_holes():
    line = [float(step) for step in range(80)]
    assert smooth(line)[2:-2] == pytest.approx(line[2:-2])
    assert smooth([1.0] * 30 + [math.nan] + [1.0] * 30) == pytest.approx([1.0] * 61)


def test_scores_of_both_policies_are_drawn(tmp_path):
    path = tmp_path / "new" / "scores.png"
    draw_comparison([0.0, 0.5, math.nan], [1.0, 1.0, 1.5], path)
    assert ink(imread(path)) > 0.05


def test_scores_that_are_all_the_same_are_drawn(tmp_path):
    draw_comparison([1.0], [1.0], tmp_path / "scores.png")
    assert ink(imread(tmp_path / "scores.png")) > 0.05


def test_no_score_to_compare_is_an_error(tmp_path):
    with pytest.raises(DataError, match="no finite score after training among 1"):
        draw_comparison([1.0], [math.nan], tmp_path / "scores.png")
