"""Figures and tables of a study, from results written by hand."""

import subprocess
import sys
import warnings

import pytest

from experiments.paper import figures, results, table
from issgd_jax.errors import InputError
from tests.experiments.helpers import summarize, write_run


def test_the_table_counts_steps_and_time_against_the_baseline(tmp_path):
    write_run(tmp_path, "uniform", 0.1, 0, [1.0, 0.5, 0.1])
    write_run(tmp_path, "calibrated", 0.1, 0, [1.0, 0.1, 0.001])
    summary = summarize(tmp_path)
    _, row = table.make_rows(summary, {"uniform": 1.0, "calibrated": 4 / 3})
    assert (row["steps"], row["cost"], row["time"], row["ratio"]) == ("0.50", "1.33", "0.67", "0.01")
    assert row["loss at equal time"] == "0.1"  # after 15 steps, 0.01
    assert "| calibrated, a worker and refresh | 1 | 0.1 |" in table.markdown([row])
    row, same = table.make_rows(summary, {"uniform": 1.0, "calibrated": 2.0}, "calibrated")
    assert (row["steps"], row["cost"], row["ratio"], same["cost"]) == ("never", "0.50", "100", "1.00")
    with pytest.raises(InputError, match="no arm 'calibratd' to compare with"):
        table.make_rows(summary, {}, "calibratd")


def test_figures_show_every_arm(tmp_path):
    write_run(tmp_path, "uniform", 0.1, 0, [1.0, 0.5, 0.1])
    write_run(tmp_path, "calibrated", 0.1, 0, [1.0, 0.1, None], **{"scores/staleness_mean": 5.0})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        made = figures.make_figures(summarize(tmp_path), {"uniform": 1.0, "calibrated": 2.0})
        for figure in made.values():
            figure.canvas.draw()
    assert set(made) == {"loss", "cost", "variance"}
    labels = [text.get_text() for text in made["loss"].axes[0].get_legend().get_texts()]
    assert labels == ["SGD, i.i.d. (rate 0.1)", "calibrated, a worker and refresh (rate 0.1)"]
    assert made["cost"].axes[0].lines[1].get_xdata().tolist() == [0, 20, 40]


def test_gain_and_staleness_are_medians_over_measurements_but_the_first(tmp_path):
    """Red if the first measurement, where nothing is scored, or one without the value counts, or if the ideal is drawn
    as the ratio of noises and not of variances."""
    write_run(tmp_path, "uniform", 0.1, 0, [1.0, 0.5, 0.1])
    write_run(tmp_path, "calibrated", 0.1, 0, [1.0, 0.1, 0.01, 0.001], **{"scores/staleness_mean": 5.0})
    record = summarize(tmp_path, arms=["calibrated"])
    arm = record["arms"]["calibrated"]
    arm["curves"]["variance/gain"]["median"] = [1.0, 4.0, None, 6.0]
    assert results.typical(arm, "variance/gain") == 6 and results.typical(arm, "nothing") is None
    (row,) = table.make_rows(record, {})
    assert (row["gain"], row["mean staleness"]) == ("6", "5")
    axis = figures.staleness_figure(record, record["arms"]).axes[0]
    point, ideal, uniform = (line.get_xydata().tolist() for line in axis.lines)
    assert point == [[5, 6]] and [y for _, y in ideal] == [16, 16] and [y for _, y in uniform] == [1, 1]


def test_the_figure_of_asynchronous_learners_charges_each_its_own_time():
    """Red if an arm is drawn over the cost of another, or time is drawn where none was measured."""
    steps, values = [0, 10, 20], {q: [1.0, 0.5, None] for q in ("q1", "median", "q3")}
    curves = dict.fromkeys(results.CURVES, values)
    arm = {"label": "some", "learning_rate": 0.1, "step": steps, "curves": curves, "baseline": "uniform_1", "n": 2}
    names = ["uniform_1", "calibrated_8"]
    record = {"study": "asgd", "data": "digits", "network": "MLP", "steps": 20, "arms": dict.fromkeys(names, arm)}
    for costs in ({}, {"uniform_1": 1.0}):
        assert len(figures.make_figures(record, costs)["asgd"].axes) == 2
    made = figures.make_figures(record, {"uniform_1": 1.0, "calibrated_8": 0.5})
    assert "cost" not in made
    drawn = [line.get_xdata().tolist() for line in made["asgd"].axes[1].lines]
    assert drawn == [[0, 10, 20], [0, 5, 10]]


def test_figures_and_table_need_no_jax():
    code = "import sys; sys.modules['jax'] = None; import experiments.paper.figures, experiments.paper.table"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_an_arm_without_its_baseline_is_compared_with_nothing(tmp_path):
    """Red if it is compared with itself: every ratio would be 1."""
    write_run(tmp_path, "calibrated", 0.1, 0, [1.0, 0.1, 0.001])
    (row,) = table.make_rows(summarize(tmp_path), {"uniform": 1.0, "calibrated": 2.0})
    assert row["final training loss"] == "0.001 (0.001 to 0.001)" and not {"ratio", "steps", "time"} & row.keys()


def test_a_flag_without_effect_is_refused():
    """Red if someone believes that a table is of another width than the saved results."""
    command = [sys.executable, "-m", "experiments.paper.table", "--study=fair", "--data=digits", "--width=3"]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    assert done.returncode == 1 and "--width has no effect on this command: leave it out" in done.stderr
