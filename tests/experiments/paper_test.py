"""The study: replicas are the runs they stand for, sweeps go on where they stopped, results are what the files say."""

import dataclasses
import json
import math
import subprocess
import sys
import warnings

import jax
import pytest

from experiments.configs import digits
from experiments.paper import cost, figures, replicas, results, runs, studies, table
from experiments.paper.sweep import sweep
from issgd_jax import config as config_lib
from issgd_jax.errors import InputError
from issgd_jax.run import workdir as workdir_lib
from issgd_jax.run.training import train

TINY = {"steps": 60, "eval_every": 20, "data.train_split": "train[:300]", "model.mlp.hidden_sizes": (16,)}


def tiny_config(**overrides):
    config = digits.get_config()
    config.update_from_flattened_dict(TINY)
    config.devices.workers, config.devices.host_platform_count = 1, 0
    config.workers.chunk_size = 70  # rounds begin anew in the middle of the data
    config.schedule.steps_per_round = config.schedule.score_delay = 4
    config.log.progress = config.log.tensorboard = False
    config.update_from_flattened_dict({name.replace("__", "."): value for name, value in overrides.items()})
    return config


def assert_same_rows(got, wanted, steps):
    for row in got:
        (want,) = (other for other in wanted if other["step"] == row["step"])
        assert set(want) - set(row) == {"wall_seconds", "failed_rounds", "skipped_updates", "memory/resident_bytes"}
        if row["step"] in steps:
            assert row == pytest.approx({name: want[name] for name in row}, rel=2e-3, abs=1e-5)


# A replica that starts, delays or takes in a round or a gradient at another step, or draws with another key, is another
# run.
@pytest.mark.parametrize(
    "overrides",
    [
        {},
        {"schedule__score_delay": 0, "learner__lr_schedule": "cosine"},
        {"schedule__score_delay": 6, "workers__score": "loss"},
        {"schedule__score_delay": 12},
        {"workers__enabled": False},
        {"learner__refresh": False, "learner__draw": "independent", "proposal__name": "proportional"},
        {"proposal__name": "uniform"},
        {"learner__asynchronous": 4},
    ],
    ids=lambda overrides: ", ".join(f"{k}={v}" for k, v in overrides.items()) or "default",
)
def test_replicas_are_the_runs_they_stand_for(overrides, tmp_path):
    config = tiny_config(**overrides)
    pairs = [(0, 0.05), (3, 0.02)]
    histories = list(zip(*replicas.train_replicas(config, pairs, devices=jax.devices()[:1])))
    for (seed, rate), history in zip(pairs, histories):
        config.seed, config.learner.learning_rate = seed, rate
        # Rounding grows with every step: later rows may drift.
        assert_same_rows(history, train(config, tmp_path / f"{seed}"), steps=(0, 20))


def test_replicas_on_several_devices_are_those_on_one():
    """Three replicas on two devices: a place is filled with a copy, which must not come out."""
    config, pairs = tiny_config(steps=20), [(0, 0.05), (1, 0.05), (2, 0.01)]
    on_one = list(replicas.train_replicas(config, pairs, devices=jax.devices()[:1]))
    on_two = list(replicas.train_replicas(config, pairs, devices=jax.devices()[:2]))
    assert [len(rows) for rows in on_two] == [3, 3]
    for rows, others in zip(on_one, on_two):
        for row, other in zip(rows, others):
            assert row == pytest.approx(other, rel=1e-3, abs=1e-5)


def test_a_replica_that_diverges_leaves_the_others_alone():
    config = tiny_config(proposal__name="uniform")
    alone = [rows[0] for rows in replicas.train_replicas(config, [(0, 0.01)])]
    both = list(replicas.train_replicas(config, [(0, 0.01), (0, 1e20)], devices=jax.devices()[:1]))
    assert math.isnan(both[-1][1]["train/loss"])
    assert both[-1][0]["train/loss"] == pytest.approx(alone[-1]["train/loss"], rel=0.05)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"schedule__name": "exact"}, "relaxed schedule"),
        ({"proposal__when": "auto"}, "relaxed schedule"),
        ({"eval_every": 30}, "multiple of steps_per_round 4"),
        ({"steps": 50}, "divide steps 50"),
        ({"devices__workers": 2}, "enlarge its chunk_size"),
        ({"workers__chunk_size": 301}, "chunk_size must be <= 300, got 301"),
        ({"learner__learning_rate": -1.0}, "learning_rate"),
    ],
)
def test_what_replicas_cannot_do_is_refused(overrides, message):
    with pytest.raises(InputError, match=message):
        next(replicas.train_replicas(tiny_config(**overrides), [(0, 0.05)]))


# An override that names no field, or a value out of range, would stop a sweep hours after it began.
@pytest.mark.parametrize("study", studies.STUDIES.values(), ids=studies.STUDIES)
def test_every_arm_of_every_study_is_a_valid_experiment(study):
    for data in study.data:
        for name, arm in studies.choose_arms(study, data).items():
            for rate in arm.learning_rates or study.learning_rates:
                config = studies.make_config(study, name, data, learning_rate=rate, seed=1)
                config_lib.validate(config)
                replicas.check(config)


def test_both_arms_of_the_papers_pairs_have_one_rate():
    """The original compared SGD at 0.001 with ISSGD at 0.01."""
    arms = studies.STUDIES["svhn"].arms
    for rate in ("0.01", "0.001"):
        rates = {arm.learning_rates for name, arm in arms.items() if name.split("_")[1] == f"lr{rate}"}
        assert rates == {(float(rate),)}
        assert {f"sgd_lr{rate}", f"issgd_lr{rate}_c1", f"issgd_lr{rate}_c10", f"calibrated_lr{rate}"} <= set(arms)


SMALL = {"steps": 100, "data.train_split": "train[:400]", "model.mlp.hidden_sizes": (8,)}


def small_sweep(workdir, **changes):
    options = {"study": "fair", "data": "digits", "num_seeds": 3, "arms": ["uniform", "calibrated_refresh"]}
    sweep(workdir, **options | {"overrides": SMALL, "at_once": 8, "shown": False} | changes)


@pytest.fixture(scope="module")
def swept(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("sweep")
    small_sweep(workdir)
    return workdir


def run_files(workdir):
    return sorted(workdir.rglob("metrics.jsonl"))


def test_a_sweep_tunes_on_the_first_seeds_and_runs_the_best_rate_on_all(swept):
    found = runs.finished(swept, "fair", "digits", "uniform")
    best = runs.best_rate(swept, "fair", "digits", "uniform")
    assert set(found) == set(studies.STUDIES["fair"].learning_rates)
    assert {rate: set(seeds) for rate, seeds in found.items()} == {
        rate: {0, 1, 2} if rate == best else {0, 1} for rate in found
    }
    losses = {rate: [runs.mean_log_loss(seeds[seed]) for seed in (0, 1)] for rate, seeds in found.items()}
    assert sum(losses[best]) == min(map(sum, losses.values()))


def test_a_sweep_goes_on_where_it_stopped(swept, tmp_path):
    """Finished runs stay as they are; one that was cut off in the middle of a line is run again."""
    before = {file: file.stat().st_mtime_ns for file in run_files(swept)}
    cut = run_files(swept)[0]
    text = cut.read_text()
    cut.write_text(text[: len(text) * 2 // 3])
    small_sweep(swept)
    assert {file for file in before if file.stat().st_mtime_ns != before[file]} == {cut}
    rows, again = ([json.loads(line) for line in t.splitlines()] for t in (text, cut.read_text()))
    for row, other in zip(rows, again, strict=True):
        assert other["train/loss"] == pytest.approx(row["train/loss"], rel=0.02)


def test_a_sweep_refuses_a_workdir_of_another_experiment(swept):
    with pytest.raises(
        InputError, match="holds a run with learner.momentum = 0.9, but 0.5 is asked for: choose another --workdir"
    ):
        small_sweep(swept, overrides=SMALL | {"learner.momentum": 0.5})


def test_runs_that_diverge_alone_or_together_are_measured_at_the_same_steps(tmp_path, monkeypatch):
    """Else a summary would refuse them, or count a run that stopped early as one that was not finished."""
    wild = dataclasses.replace(studies.STUDIES["fair"], learning_rates=(1e20,))
    monkeypatch.setitem(studies.STUDIES, "fair", wild)
    for at_once in (1, 2):
        small_sweep(tmp_path / f"{at_once}", num_seeds=2, at_once=at_once, arms=["uniform"])
    alone, together = (summary_of(tmp_path / f"{n}")["arms"]["uniform"] for n in (1, 2))
    assert alone["diverged"] == together["diverged"] == 2
    assert alone["step"] == together["step"] == [0, 50, 100]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"study": "fiar"}, "no study 'fiar': did you mean fair"),
        ({"arms": ["unifrom"]}, "no arm 'unifrom' on digits: did you mean uniform"),
        ({"data": "digit"}, "no data 'digit': did you mean digits"),
        ({"num_seeds": 0}, "seeds must be between 1"),
        ({"num_seeds": -3}, "seeds must be between 1"),
        ({"at_once": 0}, "at_once >= 1"),
    ],
)
def test_a_sweep_of_what_there_is_not_is_refused(changes, message, tmp_path):
    with pytest.raises(InputError, match=message):
        small_sweep(tmp_path, **changes)
    assert not run_files(tmp_path)


def write_run(workdir, arm, rate, seed, losses, *, of=("fair", "digits"), steps=None, cut=False, **more):
    """A run with these training losses, as a sweep leaves it. of: study and data."""
    folder = studies.folder(workdir, *of, arm, rate, seed)
    folder.mkdir(parents=True, exist_ok=True)
    steps = steps or [10 * i for i in range(len(losses))]
    record = {
        "config": {
            "steps": steps[-1],
            "data": {"train_split": "train"},
            "model": {"name": "mlp", "mlp": {"hidden_sizes": [4]}},
        }
    }
    record |= {"devices": {}, "versions": {}, "git_commit": "abc"}
    (folder / workdir_lib.CONFIG_FILE).write_text(json.dumps(record))
    variances = {"variance/uniform": 4.0, "variance/actual": 2.0, "variance/ideal": 1.0, "variance/gain": 4.0}
    rows = [
        {"step": step, "train/loss": loss, "train/error": 0.1, "test/error": 0.2, "test/loss": 1.0} | variances | more
        for step, loss in zip(steps, losses, strict=True)
    ]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / workdir_lib.METRICS_FILE).write_text(text[:-15] if cut else text)


def summary_of(workdir, **options):
    return results.summarize(workdir, "fair", "digits", **options)


def test_a_summary_has_the_quartiles_of_the_best_rate(tmp_path):
    for seed, last in enumerate((0.5, 0.1, 0.3, 0.2, 0.4)):
        write_run(tmp_path, "uniform", 0.1, seed, [2.0, 1.0, last])
        write_run(tmp_path, "uniform", 0.2, seed, [2.0, 1.0, 0.9])
    arm = summary_of(tmp_path)["arms"]["uniform"]
    assert (arm["learning_rate"], arm["n"], arm["seeds"]) == (0.1, 5, [0, 1, 2, 3, 4])
    assert [arm["curves"]["train/loss"][q][-1] for q in ("q1", "median", "q3")] == [0.2, 0.3, 0.4]
    assert arm["final"]["train/loss"] == [0.5, 0.1, 0.3, 0.2, 0.4]
    assert (arm["actual_over_uniform_max"], arm["actual_over_ideal_median"]) == (0.5, 2.0)


def test_a_run_that_diverged_counts_as_the_worst(tmp_path):
    for seed, last in enumerate((None, 0.1, None)):
        write_run(tmp_path, "uniform", 0.1, seed, [2.0, 1.0, last])
    arm = summary_of(tmp_path)["arms"]["uniform"]
    assert arm["diverged"] == 2
    assert arm["curves"]["train/loss"]["median"] == [2.0, 1.0, None]
    assert table.rows_of(summary_of(tmp_path), {})[0]["final training loss"].startswith("inf")


def test_the_rate_that_is_fast_and_ends_low_is_the_best(tmp_path):
    """A single measurement must not choose the rate, nor how far below nothing a loss ends, nor a run that diverged."""
    write_run(tmp_path, "uniform", 0.1, 0, [2.0, 0.1, 0.01, 0.002])
    write_run(tmp_path, "uniform", 0.2, 0, [2.0, 1.9, 1.9, 0.001])
    write_run(tmp_path, "uniform", 0.3, 0, [0.1, 0.1, 0.1, None])
    write_run(tmp_path, "uniform", 0.4, 0, [2.0, 0.9, 0.9, 1e-12])
    assert runs.best_rate(tmp_path, "fair", "digits", "uniform") == 0.1


def test_a_loss_that_jumps_is_counted_as_a_spike(tmp_path):
    write_run(tmp_path, "uniform", 0.1, 0, [2.0, 1.0, 1.1, 1.0, 2.3, 1.0])
    write_run(tmp_path, "uniform", 0.1, 1, [2.0, 1.0, 1.1, 1.0, 1.9, 1.0])
    assert summary_of(tmp_path)["arms"]["uniform"]["with_spikes"] == 1


def test_a_file_cut_in_a_line_is_read_to_the_cut_and_reported(tmp_path, capsys):
    write_run(tmp_path, "uniform", 0.1, 0, [2.0, 1.0, 0.5])
    write_run(tmp_path, "uniform", 0.1, 1, [2.0, 1.0, 0.1], cut=True)
    with pytest.warns(UserWarning, match="last line 3 is cut off"):
        arm = summary_of(tmp_path)["arms"]["uniform"]
    assert arm["seeds"] == [0]
    assert "seed=1: left out, it ends at step 10" in capsys.readouterr().err


def test_runs_of_one_arm_measured_at_different_steps_are_refused(tmp_path):
    write_run(tmp_path, "uniform", 0.1, 0, [2.0, 1.0, 0.5])
    write_run(tmp_path, "uniform", 0.1, 1, [2.0, 0.5], steps=[0, 20])
    with pytest.raises(InputError, match=r"seeds 0 and 1 were measured at different steps \(2 in common, 3 and 2"):
        summary_of(tmp_path)


def test_arms_of_different_lengths_are_refused(tmp_path):
    write_run(tmp_path, "uniform", 0.1, 0, [2.0, 1.0, 0.5])
    write_run(tmp_path, "calibrated", 0.1, 0, [2.0, 1.0])
    with pytest.raises(InputError, match="arms have different lengths, {'uniform': 20, 'calibrated': 10}"):
        summary_of(tmp_path)


def test_an_arm_that_is_to_end_earlier_stands_beside_the_others(tmp_path):
    """With rates that decay, the loss at equal time is that of a shorter run, not of the middle of a longer one."""
    of = ("fair_decay", "fashion_mnist")
    write_run(tmp_path, "uniform", 0.1, 0, [1.0, 0.5, 0.1], of=of)
    write_run(tmp_path, "calibrated_refresh_3600", 0.1, 0, [1.0, 0.01], of=of)
    for arms in (None, ["calibrated_refresh_3600"]):
        record = results.summarize(tmp_path, *of, arms=studies.with_baselines(studies.get_study(of[0]), arms))
        assert record["steps"] == 20
    _, row = table.rows_of(record, {"uniform": 1.0, "calibrated_refresh_3600": 1.5})
    assert (row["steps"], row["time"], row["ratio"], row["loss at equal time"]) == ("0.25", "0.38", "0.1", "0.1")
    write_run(tmp_path, "calibrated", 0.1, 0, [1.0, 0.01], of=of)
    with pytest.raises(InputError, match="arms have different lengths"):
        results.summarize(tmp_path, *of)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"arms": ["calibrate"]}, "did you mean calibrated"),
        ({"arms": ["calibrated"]}, "arm calibrated .* has no finished run"),
        ({"seeds": [0, 7]}, r"no finished run of seed\(s\) \[7\]"),
    ],
)
def test_a_summary_of_what_there_is_not_is_refused(options, message, tmp_path):
    write_run(tmp_path, "uniform", 0.1, 0, [2.0, 1.0, 0.5])
    with pytest.raises(InputError, match=message):
        summary_of(tmp_path, **options)


def test_arms_swept_on_another_machine_are_kept_beside_new_ones(tmp_path):
    """Of the same experiment; those of another must not be shown as if they were comparable."""
    for machine, losses in (("a", [2.0, 1.0, 0.5]), ("b", [2.0, 1.0, 0.1]), ("longer", [2.0, 1.0, 0.5, 0.2])):
        write_run(tmp_path / machine, "calibrated" if machine == "a" else "uniform", 0.1, 0, losses)
    first, second, other = (summary_of(tmp_path / machine) for machine in ("a", "b", "longer"))
    assert list(results.merged(first, second)["arms"]) == ["uniform", "calibrated"]
    assert results.merged(second, first)["arms"] == results.merged(first, second)["arms"]
    assert results.merged(first, other) == other and results.merged(None, first) == first
    again = second | {"arms": {"uniform": {"n": 7}}}
    assert results.merged(second, again)["arms"]["uniform"] == {"n": 7}


def test_results_kept_are_those_that_were_summarized(tmp_path, monkeypatch):
    """Kept with a list a line: what is read back must be the same, diverged runs and all."""
    monkeypatch.setattr(results, "FOLDER", tmp_path / "results")
    with pytest.raises(InputError, match="no results of fair on digits: name the --workdir"):
        results.load("fair", "digits")
    for seed, last in enumerate((None, 0.1)):
        write_run(tmp_path, "uniform", 0.1, seed, [2.0, 1.0, last])
    summary = summary_of(tmp_path)
    text = results.save(summary).read_text()
    assert results.load("fair", "digits") == json.loads(json.dumps(summary))
    assert '"step": [ 0, 10, 20 ]' in text


def test_an_empty_workdir_is_refused(tmp_path):
    with pytest.raises(InputError, match="has no finished run of fair on digits: sweep first"):
        summary_of(tmp_path)


def test_steps_to_a_loss_are_log_linear_between_measurements():
    assert results.steps_to(0.1, [0, 10, 20], [1.0, 1.0, 0.01]) == pytest.approx(15)
    assert results.steps_to(1.0, [0, 10, 20], [1.0, 1.0, 0.01]) == 0
    assert results.steps_to(0.001, [0, 10, 20], [1.0, 1.0, 0.01]) == math.inf
    assert results.steps_to(0.1, [0, 10, 20], [1.0, None, 0.01]) == 20
    assert results.loss_at(15, [0, 10, 20], [1.0, 1.0, 0.01]) == pytest.approx(0.1)
    assert results.loss_at(99, [0, 10, 20], [1.0, 1.0, 0.01]) == pytest.approx(0.01)
    assert results.loss_at(15, [0, 10, 20], [1.0, 1.0, None]) == math.inf


def test_the_table_counts_steps_and_time_against_the_first_arm(tmp_path):
    write_run(tmp_path, "uniform", 0.1, 0, [1.0, 0.5, 0.1])
    write_run(tmp_path, "calibrated", 0.1, 0, [1.0, 0.1, 0.001])
    _, row = table.rows_of(summary_of(tmp_path), {"uniform": 1.0, "calibrated": 4 / 3})
    assert (row["steps"], row["cost"], row["time"], row["ratio"]) == ("0.50", "1.33", "0.67", "0.01")
    assert row["loss at equal time"] == "0.1"  # after 15 steps, 0.01
    assert "| calibrated, a worker and refresh | 1 | 0.1 |" in table.markdown([row])
    row, same = table.rows_of(summary_of(tmp_path), {"uniform": 1.0, "calibrated": 2.0}, "calibrated")
    assert (row["steps"], row["cost"], row["ratio"], same["cost"]) == ("never", "0.50", "100", "1.00")
    with pytest.raises(InputError, match="no arm 'calibratd' to compare with"):
        table.rows_of(summary_of(tmp_path), {}, "calibratd")


def test_figures_show_every_arm(tmp_path):
    write_run(tmp_path, "uniform", 0.1, 0, [1.0, 0.5, 0.1])
    write_run(tmp_path, "calibrated", 0.1, 0, [1.0, 0.1, None], **{"scores/staleness_mean": 5.0})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        made = figures.figures_of(summary_of(tmp_path), {"uniform": 1.0, "calibrated": 2.0})
        for figure in made.values():
            figure.canvas.draw()
    assert set(made) == {"loss", "cost", "variance"}
    labels = [text.get_text() for text in made["loss"].axes[0].get_legend().get_texts()]
    assert labels == ["SGD, i.i.d. (rate 0.1)", "calibrated, a worker and refresh (rate 0.1)"]
    assert made["cost"].axes[0].lines[1].get_xdata().tolist() == [0, 20, 40]


def test_gain_and_staleness_are_medians_over_measurements_but_the_first(tmp_path):
    """Red if the first measurement, where nothing is scored, or one that lacks the value, counts; and if the ideal is
    drawn as the ratio of noises, not of variances."""
    write_run(tmp_path, "uniform", 0.1, 0, [1.0, 0.5, 0.1])
    write_run(tmp_path, "calibrated", 0.1, 0, [1.0, 0.1, 0.01, 0.001], **{"scores/staleness_mean": 5.0})
    record = results.summarize(tmp_path, "fair", "digits", arms=["calibrated"])
    arm = record["arms"]["calibrated"]
    arm["curves"]["variance/gain"]["median"] = [1.0, 4.0, None, 6.0]
    assert results.typical(arm, "variance/gain") == 6 and results.typical(arm, "nothing") is None
    (row,) = table.rows_of(record, {})
    assert (row["gain"], row["mean staleness"]) == ("6", "5")
    axis = figures.staleness_figure(record, record["arms"]).axes[0]
    point, ideal, uniform = (line.get_xydata().tolist() for line in axis.lines)
    assert point == [[5, 6]] and [y for _, y in ideal] == [16, 16] and [y for _, y in uniform] == [1, 1]


def test_a_study_of_several_networks_is_not_called_by_one_of_them():
    study = studies.get_study("architectures")
    config = studies.make_config(study, "gru_uniform", "digits", learning_rate=0.1, seed=0)
    assert results.network_of(study, config.to_dict()) == "4 networks"
    assert config.model.transformer.patch_size == 2  # patches of seven are for larger images


def test_the_figure_of_asynchronous_learners_charges_each_its_own_time():
    """Red if an arm is drawn over the cost of another, or time is drawn where none was measured."""
    steps, values = [0, 10, 20], {q: [1.0, 0.5, None] for q in ("q1", "median", "q3")}
    curves = dict.fromkeys(results.CURVES, values)
    arm = {"label": "some", "learning_rate": 0.1, "step": steps, "curves": curves, "baseline": "uniform_1", "n": 2}
    names = ["uniform_1", "calibrated_8"]
    record = {"study": "asgd", "data": "digits", "network": "MLP", "steps": 20, "arms": dict.fromkeys(names, arm)}
    assert len(figures.figures_of(record, {})["asgd"].axes) == 2
    made = figures.figures_of(record, {"uniform_1": 1.0, "calibrated_8": 0.5})
    assert "cost" not in made
    drawn = [line.get_xdata().tolist() for line in made["asgd"].axes[1].lines]
    assert drawn == [[0, 10, 20], [0, 5, 10]]


def test_costs_are_those_of_arms_and_their_baselines(tmp_path, monkeypatch):
    """And costs measured alike are kept beside new ones; others must not be mixed with them."""
    monkeypatch.setattr(results, "FOLDER", tmp_path)
    overrides = SMALL | {"workers.chunk_size": 100}
    measured = cost.measure("fair", "digits", arms=["calibrated"], overrides=overrides, num_blocks=1)
    assert measured["ratio"].keys() == {"uniform", "calibrated"}
    assert measured["ratio"]["uniform"] == 1 and measured["ratio"]["calibrated"] > 0
    cost.save(measured)
    cost.save(measured | {"ratio": {"uniform": 1.0, "exact": 9.0}, "milliseconds": {}})
    assert cost.load("fair", "digits") == measured["ratio"] | {"exact": 9.0}
    cost.save(measured | {"network": "another"})
    assert cost.load("fair", "digits") == measured["ratio"]


def test_learners_that_share_a_gradient_share_its_time_alone():
    """What the owner does stays; charged for k learners it must never be less than that."""
    assert cost.charged(5.0, 1.0, 1) == 5 and cost.charged(5.0, 1.0, 4) == 2
    measured = cost.measure("asgd", "digits", arms=["calibrated_8"], overrides=SMALL, num_blocks=1)
    assert measured["ratio"].keys() == {"uniform_1", "calibrated_8"}
    assert measured["milliseconds"]["calibrated_8"] > 0


def test_figures_and_table_need_no_jax():
    code = "import sys; sys.modules['jax'] = None; import experiments.paper.figures, experiments.paper.table"
    subprocess.run([sys.executable, "-c", code], check=True)
