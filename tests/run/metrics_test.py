"""Files that a crash cut off, values that JSON has no word for, and figures that must not lie."""

import json

import matplotlib.image
import pytest

from issgd_jax import InputError, plots
from issgd_jax.run import metrics


def row(step, loss=1.0):
    names = (
        "train/error",
        "test/loss",
        "test/error",
        "variance/uniform",
        "variance/actual",
        "variance/ideal",
        "variance/gain",
    )
    return {"step": step, "train/loss": loss} | dict.fromkeys(names, 0.5)


def test_rows_are_on_disk_as_soon_as_they_are_written(tmp_path):
    with metrics.MetricsWriter(tmp_path, tensorboard=False) as writer:
        writer.write(row(0))
        writer.write(row(5))
        assert metrics.read_metrics(tmp_path / "metrics.jsonl") == [row(0), row(5)]


def test_a_value_that_is_not_finite_is_null(tmp_path):
    with metrics.MetricsWriter(tmp_path, tensorboard=True) as writer:
        writer.write({"step": 0, "variance/gain": float("nan"), "train/loss": float("inf")})
    assert json.loads((tmp_path / "metrics.jsonl").read_text()) == {
        "step": 0,
        "variance/gain": None,
        "train/loss": None,
    }


def test_a_last_line_cut_off_is_left_out_aloud(tmp_path):
    file = tmp_path / "metrics.jsonl"
    file.write_text(json.dumps(row(0)) + "\n" + json.dumps(row(1))[:17])
    with pytest.warns(UserWarning, match="last line 2 is cut off"):
        assert metrics.read_metrics(file) == [row(0)]


def test_a_broken_line_in_the_middle_is_an_error(tmp_path):
    file = tmp_path / "metrics.jsonl"
    file.write_text("{broken\n" + json.dumps(row(1)) + "\n")
    with pytest.raises(InputError, match="line 1 is not a row of metrics"):
        metrics.read_metrics(file)


def test_summary_figure_shows_what_the_rows_say(tmp_path):
    runs = {"importance sampling": [row(0, 2.0), row(10, 0.1)], "uniform (SGD)": [row(0, 2.0), row(10, 0.5)]}
    figure = plots.summary_figure(runs, title="digits")
    loss, error, noise = figure.axes
    assert [list(line.get_ydata()) for line in loss.lines] == [[2.0, 0.1], [2.0, 0.5]]
    assert [text.get_text() for text in loss.get_legend().get_texts()] == list(runs)
    assert len(error.lines) == 4 and len(noise.lines) == 3
    plots.save(figure, tmp_path / "summary.png")
    assert matplotlib.image.imread(tmp_path / "summary.png").shape[1] > 1000


def test_values_that_were_not_measured_are_left_out():
    rows = [row(0), row(5) | {"train/loss": None}, row(10)]
    figure = plots.summary_figure({"a": rows}, title="")
    assert list(figure.axes[0].lines[0].get_xdata()) == [0, 10]


@pytest.mark.parametrize("runs", [{}, {"a": []}])
def test_a_figure_of_nothing(runs):
    with pytest.raises(ValueError, match="at least one row"):
        plots.summary_figure(runs, title="")
