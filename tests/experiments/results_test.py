"""Summaries of finished runs: quartiles, best rates, spikes, divergence; what is refused; what is kept."""

import json
import math

import pytest

from experiments.paper import results, runs, studies, table
from issgd_jax.errors import InputError
from tests.experiments.helpers import summarize, write_run


def test_a_summary_has_the_quartiles_of_the_best_rate(tmp_path):
    for seed, last in enumerate((0.5, 0.1, 0.3, 0.2, 0.4)):
        write_run(tmp_path, "uniform", 0.1, seed, [2.0, 1.0, last])
        write_run(tmp_path, "uniform", 0.2, seed, [2.0, 1.0, 0.9])
    arm = summarize(tmp_path)["arms"]["uniform"]
    assert (arm["learning_rate"], arm["n"], arm["seeds"]) == (0.1, 5, [0, 1, 2, 3, 4])
    assert [arm["curves"]["train/loss"][q][-1] for q in ("q1", "median", "q3")] == [0.2, 0.3, 0.4]
    assert arm["final"]["train/loss"] == [0.5, 0.1, 0.3, 0.2, 0.4]
    assert (arm["actual_over_uniform_max"], arm["actual_over_ideal_median"]) == (0.5, 2.0)


def test_a_diverged_run_counts_as_the_worst(tmp_path):
    for seed, last in enumerate((None, 0.1, None)):
        write_run(tmp_path, "uniform", 0.1, seed, [2.0, 1.0, last])
    summary = summarize(tmp_path)
    arm = summary["arms"]["uniform"]
    assert arm["diverged"] == 2
    assert arm["curves"]["train/loss"]["median"] == [2.0, 1.0, None]
    assert table.make_rows(summary, {})[0]["final training loss"].startswith("inf")


def test_the_best_rate_is_fast_and_ends_low(tmp_path):
    """Red if one measurement chooses the rate, or how far below LEAST_LOSS a run ends, or if a diverged run may win."""
    write_run(tmp_path, "uniform", 0.1, 0, [2.0, 0.1, 0.01, 0.002])
    write_run(tmp_path, "uniform", 0.2, 0, [2.0, 1.9, 1.9, 0.001])
    write_run(tmp_path, "uniform", 0.3, 0, [0.1, 0.1, 0.1, None])
    write_run(tmp_path, "uniform", 0.4, 0, [2.0, 0.9, 0.9, 1e-12])
    assert runs.best_rate(tmp_path, "fair", "digits", "uniform") == 0.1


def test_a_loss_that_jumps_counts_as_a_spike(tmp_path):
    write_run(tmp_path, "uniform", 0.1, 0, [2.0, 1.0, 1.1, 1.0, 2.3, 1.0])
    write_run(tmp_path, "uniform", 0.1, 1, [2.0, 1.0, 1.1, 1.0, 1.9, 1.0])
    assert summarize(tmp_path)["arms"]["uniform"]["with_spikes"] == 1


def test_a_file_cut_in_a_line_is_read_to_the_cut_and_reported(tmp_path, capsys):
    write_run(tmp_path, "uniform", 0.1, 0, [2.0, 1.0, 0.5])
    write_run(tmp_path, "uniform", 0.1, 1, [2.0, 1.0, 0.1], cut=True)
    with pytest.warns(UserWarning, match="last line 3 is cut off"):
        arm = summarize(tmp_path)["arms"]["uniform"]
    assert arm["seeds"] == [0]
    assert "seed=1: skipped, it ends at step 10" in capsys.readouterr().err


def test_runs_of_one_arm_measured_at_different_steps_are_refused(tmp_path):
    write_run(tmp_path, "uniform", 0.1, 0, [2.0, 1.0, 0.5])
    write_run(tmp_path, "uniform", 0.1, 1, [2.0, 0.5], steps=[0, 20])
    with pytest.raises(InputError, match=r"seeds 0 and 1 were measured at different steps \(2 in common, 3 and 2"):
        summarize(tmp_path)


def test_arms_of_different_lengths_are_refused(tmp_path):
    write_run(tmp_path, "uniform", 0.1, 0, [2.0, 1.0, 0.5])
    write_run(tmp_path, "calibrated", 0.1, 0, [2.0, 1.0])
    with pytest.raises(InputError, match="arms have different lengths, {'uniform': 20, 'calibrated': 10}"):
        summarize(tmp_path)


def test_an_arm_with_fewer_steps_of_its_own_is_accepted(tmp_path):
    """With rates that decay, the loss at equal time is that of a shorter run, not of the middle of a longer one."""
    study = {"study": "fair_decay", "data": "fashion_mnist"}
    write_run(tmp_path, "uniform", 0.1, 0, [1.0, 0.5, 0.1], **study)
    write_run(tmp_path, "calibrated_refresh_3600", 0.1, 0, [1.0, 0.01], **study)
    for arms in (None, ["calibrated_refresh_3600"]):
        chosen = studies.get_study("fair_decay").with_baselines(arms)
        record = results.summarize(tmp_path, **study, arms=chosen)
        assert record["steps"] == 20
    _, row = table.make_rows(record, {"uniform": 1.0, "calibrated_refresh_3600": 1.5})
    assert (row["steps"], row["time"], row["ratio"], row["loss at equal time"]) == ("0.25", "0.38", "0.1", "0.1")
    alone = results.summarize(tmp_path, **study, arms=["calibrated_refresh_3600"])
    assert alone["steps"] == 8000, "swept alone, it would replace the saved results of all others"
    write_run(tmp_path, "calibrated", 0.1, 0, [1.0, 0.01], **study)
    with pytest.raises(InputError, match="arms have different lengths"):
        results.summarize(tmp_path, **study)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"arms": ["calibrate"]}, "did you mean calibrated"),
        ({"arms": ["calibrated"]}, "arm calibrated .* has no finished run"),
        ({"seeds": [0, 7]}, r"no finished run of seed\(s\) \[7\]"),
    ],
)
def test_a_summary_of_unknown_arms_or_seeds_is_refused(options, message, tmp_path):
    write_run(tmp_path, "uniform", 0.1, 0, [2.0, 1.0, 0.5])
    with pytest.raises(InputError, match=message):
        summarize(tmp_path, **options)


def test_an_empty_workdir_is_refused(tmp_path):
    with pytest.raises(InputError, match="has no finished run of fair on digits: sweep first"):
        summarize(tmp_path)


def test_arms_swept_on_another_machine_are_merged(tmp_path, monkeypatch):
    """Arms of the same experiment; those of another must not be shown as if they were comparable."""
    for machine, losses in (("a", [2.0, 1.0, 0.5]), ("b", [2.0, 1.0, 0.1]), ("longer", [2.0, 1.0, 0.5, 0.2])):
        write_run(tmp_path / machine, "calibrated" if machine == "a" else "uniform", 0.1, 0, losses)
    first, second, other = (summarize(tmp_path / machine) for machine in ("a", "b", "longer"))
    assert list(results.merged(first, second)["arms"]) == ["uniform", "calibrated"]
    assert results.merged(second, first)["arms"] == results.merged(first, second)["arms"]
    assert results.merged(first, other) == other and results.merged(None, first) == first
    monkeypatch.setattr(results, "FOLDER", tmp_path / "results")
    assert results.is_as_saved(first)  # as nothing is saved
    results.save(first)
    assert results.is_as_saved(second) and not results.is_as_saved(other)
    again = second | {"arms": {"uniform": {"n": 7}}}
    assert results.merged(second, again)["arms"]["uniform"] == {"n": 7}


def test_saved_results_are_loaded_as_they_were(tmp_path, monkeypatch):
    """Saved with one list a line; also with diverged runs."""
    monkeypatch.setattr(results, "FOLDER", tmp_path / "results")
    with pytest.raises(InputError, match="no results of fair on digits: name the --workdir"):
        results.load("fair", "digits")
    for seed, last in enumerate((None, 0.1)):
        write_run(tmp_path, "uniform", 0.1, seed, [2.0, 1.0, last])
    summary = summarize(tmp_path)
    text = results.save(summary).read_text()
    assert results.load("fair", "digits") == json.loads(json.dumps(summary))
    assert '"step": [ 0, 10, 20 ]' in text


def test_losses_are_log_linear_between_measurements():
    assert results.loss_at(15, [0, 10, 20], [1.0, 1.0, 0.01]) == pytest.approx(0.1)
    assert results.loss_at(99, [0, 10, 20], [1.0, 1.0, 0.01]) == pytest.approx(0.01)
    assert results.loss_at(15, [0, 10, 20], [1.0, 1.0, None]) == math.inf
