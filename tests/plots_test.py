"""The summary figure shows what the rows say."""

import matplotlib.image
import pytest

from issgd_jax import plots


def row(step, loss=1.0, seconds=0.0):
    variances = {f"variance/{kind}": 1.0 for kind in ("uniform", "actual", "ideal")}
    return {"step": step, "step_seconds": seconds, "train/loss": loss, "test/error": 0.1, **variances}


def test_lines_are_medians_and_bands_reach_over_seeds(tmp_path):
    seeds = [[row(0, 2.0), row(10, loss)] for loss in (0.1, 0.2, 0.9)]
    runs = {"importance sampling": seeds, "uniform (SGD)": [[row(0, 2.0), row(10, 0.5)]]}
    figure = plots.summary_figure(runs, title="digits")
    by_step, by_second, error, noise = figure.axes
    assert [list(line.get_ydata()) for line in by_step.lines] == [[2.0, 0.2], [2.0, 0.5]]
    assert not by_second.lines  # red if two rows, between which all is compiled, tell the time of a step
    (band,) = by_step.collections
    assert band.get_paths()[0].get_extents().intervaly.tolist() == [0.1, 2.0]
    assert [text.get_text() for text in by_step.get_legend().get_texts()] == list(runs)
    assert len(error.lines) == 2 and len(noise.lines) == 3
    plots.save(figure, tmp_path / "summary.png")
    assert matplotlib.image.imread(tmp_path / "summary.png").shape[1] > 1000


def test_the_time_axis_leaves_compilation_out():
    """Red if the first interval, in which everything is compiled, stretches the axis."""
    rows = [row(step, seconds=seconds) for step, seconds in ((0, 0.0), (10, 30.0), (20, 31.0), (30, 32.0), (40, 33.0))]
    figure = plots.summary_figure({"a": [rows]}, title="")
    assert list(figure.axes[0].lines[0].get_ydata()) == list(figure.axes[1].lines[0].get_ydata())
    assert list(figure.axes[1].lines[0].get_xdata()) == pytest.approx([0, 1, 2, 3, 4])


def test_values_that_were_not_measured_are_left_out():
    rows = [row(0), row(5) | {"train/loss": None}, row(10)]
    figure = plots.summary_figure({"a": [rows]}, title="")
    assert list(figure.axes[0].lines[0].get_xdata()) == [0, 10]


@pytest.mark.parametrize("runs", [{}, {"a": []}, {"a": [[]]}])
def test_a_figure_of_nothing(runs):
    with pytest.raises(ValueError, match="at least one row"):
        plots.summary_figure(runs, title="")
