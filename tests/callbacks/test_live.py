"""Curves while it trains: a line of text outside notebooks, a small picture in them."""

from __future__ import annotations

from pathlib import Path

import pytest

from lightning_hybrid.callbacks.live import LiveCurves, draw
from lightning_hybrid.errors import ConfigError
from tests.helpers import Regression, quiet_trainer, random_batches


def test_outside_a_notebook_each_point_is_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    curves = LiveCurves(["loss", "never logged"], every=2, seconds=0)
    trainer = quiet_trainer("auto", max_steps=6, callbacks=[curves])
    trainer.fit(Regression(), random_batches())
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("step ")]
    assert [line.split(",")[0] for line in lines] == ["step 2 of 6", "step 4 of 6", "step 6 of 6", "step 6 of 6"]
    steps, values = curves.curves["loss"]
    assert steps == [2, 4, 6]
    assert values[-1] == pytest.approx(float(trainer.callback_metrics["loss"]))
    assert list(curves.curves) == ["loss"]


def test_pictures_are_not_drawn_more_often_than_asked_but_the_last_point_is_shown(
    capsys: pytest.CaptureFixture[str],
) -> None:
    quiet_trainer("auto", max_steps=6, callbacks=[LiveCurves(["loss"], seconds=60)]).fit(Regression(), random_batches())
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("step ")]
    assert [line.split(",")[0] for line in lines] == ["step 1 of 6", "step 6 of 6"]


def test_a_picture_of_long_curves_is_small_and_has_a_panel_for_each_metric() -> None:
    points = list(range(1000))
    curve = (points, [float(i % 37) for i in points])
    one, six = (draw("step 1000", {f"metric {i}": curve for i in range(count)}) for count in (1, 6))
    assert one.startswith(b"\x89PNG")
    assert len(one) < len(six) < 60_000
    width, height = (int.from_bytes(six[i : i + 4], "big") for i in (16, 20))
    assert width == pytest.approx(3 * 3.1 * 80, abs=1)
    assert height == pytest.approx((2 * 2.2 + 0.3) * 80, abs=1)


@pytest.mark.parametrize("arguments", [{"metrics": []}, {"metrics": "loss"}, {"every": 0}])
def test_nothing_to_show_is_refused(arguments: dict[str, object], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="names of metrics and every >= 1"):
        LiveCurves(**arguments)  # type: ignore[arg-type]
