"""The examples with the largest scores: which, in which order, and what cannot be had."""

import json
import re

import matplotlib.image
import numpy as np
import pytest

from issgd_jax.errors import InputError
from issgd_jax.task import data
from issgd_jax.view.hardest import grid, hardest
from tests.view.helpers import write_checkpoint, write_run, write_scores

N = 1437
SCORE, STEP = np.arange(N) % 100 / 10, np.full(N, 15)


@pytest.fixture
def run(tmp_path):
    folder = write_run(tmp_path / "run")
    write_scores(folder, SCORE, STEP)
    return folder


def test_the_largest_scores_first_with_their_labels(run, tmp_path, run_command):
    """Red if the order, the labels, the staleness, the counts or the pictures are of other examples."""
    assert hardest(run, k=1).times_drawn is None
    write_scores(run, SCORE, STEP, times_drawn=np.arange(N, dtype=np.int32))
    found = hardest(run, k=20)
    assert (found.times_drawn == found.indices).all()
    assert found.indices.tolist() == [*range(99, N, 100), *range(98, 698, 100)] and found.staleness.tolist() == 20 * [5]
    digits = data.load("digits", "train")
    assert (found.labels == digits.labels[found.indices]).all() and (found.images == digits.images[found.indices]).all()
    code, text = run_command("hardest", run, "--k=30", f"--images={tmp_path / 'grid.png'}")
    assert code == 0 and re.search(rf"\b99 +{digits.labels[99]} +9.9 +5 +99\n", text) and "has most of them" in text
    assert matplotlib.image.imread(tmp_path / "grid.png")[..., :3].std() > 0.2  # red if no picture is drawn


def test_the_mean_is_over_the_checkpoints_in_which_an_example_has_a_score(run):
    once, twice, never = np.zeros(N), np.zeros(N), np.full(N, -1)
    once[:3], twice[:3] = (4, 1, 1), (0, 3, 3)
    at_first, later = never.copy(), never.copy()
    at_first[:2], later[1:3] = 1, 2
    write_checkpoint(run, 10, once, at_first)
    write_checkpoint(run, 20, np.where(later > 0, twice, 0), later)
    found = hardest(run, k=3, by="mean")
    assert found.indices.tolist() == [0, 2, 1] and found.scores.tolist() == [4, 3, 2]
    assert found.staleness.tolist() == [19, 18, 18] and "mean score of 2 steps, 10 to 20" in str(found)
    (run / "checkpoints" / "step_0000000020" / "state.json").write_text("{}")  # damaged: left out
    assert hardest(run, k=1, by="mean").steps == (10,)


def spoil_config(folder, **values):
    path = folder / "config.json"
    record = json.loads(path.read_text())
    for name, value in values.items():
        group, _, field = name.rpartition("__")
        (record["config"][group] if group else record["config"])[field] = value
    path.write_text(json.dumps(record))


@pytest.mark.parametrize(
    ("spoil", "arguments", "message"),
    [
        (lambda run: None, {"k": 0}, "k must be between 1 and 1,437, the examples that have a score, got 0"),
        (lambda run: None, {"k": -1}, "got -1"),
        (lambda run: None, {"k": N + 1}, "got 1,438"),
        (lambda run: None, {"by": "median"}, "by must be last or mean"),
        (lambda run: None, {"by": "mean"}, "has no checkpoint with scores: wait for the first"),
        (lambda run: write_scores(run, 0 * SCORE, STEP * 0 - 1), {}, "has a score yet: wait for the first round"),
        (lambda run: (run / "scores.npz").unlink(), {}, "has no scores.npz yet, which a run writes at its end"),
        (lambda run: (run / "scores.npz").write_bytes(b"PK"), {}, "is not a file of scores"),
        (lambda run: write_scores(run, SCORE, STEP, times_drawn=STEP), {}, "times_drawn int64(1437,): expected int32"),
        (lambda run: (run / "config.json").write_text("{}"), {}, "config.json cannot be read"),
        (lambda run: spoil_config(run, data__name="digit"), {}, "did you mean digits"),
        (lambda run: spoil_config(run, data__name="mnist", data__dir="/none"), {}, "(here: --data_dir=FOLDER)"),
        (lambda run: spoil_config(run, data__train_split="test"), {}, "has 360 examples, but the run in"),
    ],
)  # fmt: skip
def test_what_cannot_be_had_is_one_readable_error(spoil, arguments, message, run):
    spoil(run)
    with pytest.raises(InputError) as error:
        hardest(run, **arguments)
    assert message in str(error.value)


def test_a_uniform_run_has_no_scores(run):
    (run / "scores.npz").unlink()
    spoil_config(run, proposal__name="uniform")
    for by in ("last", "mean"):
        with pytest.raises(InputError, match="drew uniformly and has no scores"):
            hardest(run, by=by)


def test_examples_of_a_problem_of_the_users_own(run, run_command):
    """Red if code that config.json names is executed, or scores need labels."""
    spoil_config(run, problem="antigravity:fly")
    found = hardest(run, k=2)
    assert found.labels is None and found.images is None and f"{found.indices[0]:>9}      -" in str(found)
    code, text = run_command("hardest", run, "--k=2", "--images=x.png")
    assert code == 1 and "draw them by their indices" in text


def test_what_cannot_be_drawn(run, tmp_path, run_command):
    assert "k must be <= 400 to be drawn, got 401" in run_command("hardest", run, "--k=401", "--images=x.png")[1]
    for output in ("none/x.png", "x.txt"):
        code, text = run_command("hardest", run, "--k=1", f"--images={tmp_path / output}")
        assert code == 1 and "cannot be written" in text


def test_the_grid_has_a_place_for_every_example(run):
    figure = grid(hardest(run, k=12))
    assert sum(bool(axis.images) for axis in figure.axes) == 12
