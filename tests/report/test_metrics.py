from __future__ import annotations

import math

import pytest
from lightning.pytorch.loggers import CSVLogger

from lightning_hybrid.errors import DataError
from lightning_hybrid.report import read_metrics


def test_sparse_rows_become_one_series_for_each_metric(tmp_path):
    path = tmp_path / "metrics.csv"
    path.write_text("epoch,loss,step,val/loss\n0,1.5,0,\n,,0,\n0,1.25,1,\n0,,1,2.0\n")
    assert read_metrics(path) == {"loss": ([0, 1], [1.5, 1.25]), "val/loss": ([1], [2.0])}


def test_what_the_csv_logger_writes_is_read_back(tmp_path):
    logger = CSVLogger(tmp_path, name="", version="")
    logger.log_metrics({"loss": 0.5, "epoch": 0}, step=3)
    logger.save()
    logger.log_metrics({"loss": math.nan, "val/a, b": 1e-7}, step=7)  # a new column, and one that must be quoted
    logger.save()
    metrics = read_metrics(tmp_path / "metrics.csv")
    assert metrics["val/a, b"] == ([7], [1e-7])
    assert metrics["loss"][0] == [3, 7]
    assert metrics["loss"][1] == [0.5, pytest.approx(math.nan, nan_ok=True)]
    assert "epoch" not in metrics


def test_a_row_that_was_cut_off_gives_what_it_holds(tmp_path):
    path = tmp_path / "metrics.csv"
    path.write_text("step,loss,val/loss\n0,1.0\n")
    assert read_metrics(path) == {"loss": ([0], [1.0])}


@pytest.mark.parametrize("cut", ["1", "1,0.", "1,0.5", "1,0.5,0.", "1,0.5,0.25"])
def test_a_last_row_that_was_not_finished_is_left_out(tmp_path, cut):
    path = tmp_path / "metrics.csv"
    path.write_bytes(f"step,loss,val/loss\r\n0,1.0,\r\n{cut}".encode())
    assert read_metrics(path) == {"loss": ([0], [1.0])}


def test_a_missing_file_is_named_with_the_fix(tmp_path):
    with pytest.raises(DataError, match=r"no metrics at .*nowhere\.csv.*logger=csv"):
        read_metrics(tmp_path / "nowhere.csv")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", r"metrics\.csv:1: expected a header with a column 'step', got None"),
        ("a,b\n1,2\n", r"metrics\.csv:1: expected a header with a column 'step', got \['a', 'b'\]"),
        ("step,loss\n0,1.0\n1,much\n", r"metrics\.csv:3: not a row of metrics: .*'much'"),
        ("step,loss\n,1.0\n", r"metrics\.csv:2: not a row of metrics"),
        ("step,loss\n0,1.0,2.0\n", r"metrics\.csv:2: not a row of metrics"),
    ],
)
def test_what_is_not_a_table_of_metrics_is_refused_with_its_line(tmp_path, content, message):
    path = tmp_path / "metrics.csv"
    path.write_text(content)
    with pytest.raises(DataError, match=message):
        read_metrics(path)
