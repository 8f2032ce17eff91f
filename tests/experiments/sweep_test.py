"""Sweeps: tune, resume, refuse another experiment, and record runs that diverge."""

import dataclasses
import json

import pytest

from experiments.paper import runs, studies
from issgd_jax.errors import InputError
from tests.experiments.helpers import SMALL, run_files, small_sweep, summarize


@pytest.fixture(scope="module")
def swept(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("sweep")
    small_sweep(workdir)
    return workdir


def test_a_sweep_tunes_on_the_first_seeds_and_runs_the_best_rate_on_all(swept):
    finished = runs.finished(swept, "fair", "digits", "uniform")
    best = runs.best_rate(swept, "fair", "digits", "uniform")
    assert set(finished) == set(studies.STUDIES["fair"].learning_rates)
    assert {rate: set(seeds) for rate, seeds in finished.items()} == {
        rate: {0, 1, 2} if rate == best else {0, 1} for rate in finished
    }
    losses = {rate: [runs.mean_log_loss(seeds[seed]) for seed in (0, 1)] for rate, seeds in finished.items()}
    assert sum(losses[best]) == min(map(sum, losses.values()))


def test_a_sweep_resumes_where_it_stopped(swept):
    """Finished runs stay as they are; a run whose last line was cut off is run again."""
    modified = {file: file.stat().st_mtime_ns for file in run_files(swept)}
    cut = run_files(swept)[0]
    text = cut.read_text()
    cut.write_text(text[: len(text) * 2 // 3])
    small_sweep(swept)
    assert {file for file in modified if file.stat().st_mtime_ns != modified[file]} == {cut}
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
    alone, together = (summarize(tmp_path / f"{n}")["arms"]["uniform"] for n in (1, 2))
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
def test_a_sweep_of_unknown_names_or_bad_numbers_is_refused(changes, message, tmp_path):
    with pytest.raises(InputError, match=message):
        small_sweep(tmp_path, **changes)
    assert not run_files(tmp_path)
