"""A run that goes on as if it had never stopped: bit by bit, or refused in words."""

import dataclasses
import json
import shutil
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import issgd_jax
from issgd_jax import InputError, NonFiniteLossError
from issgd_jax.learning.learner import Learner
from issgd_jax.run import checkpoint, loop, status, supervision, wiring, workdir
from tests.helpers import arrays_of, check_same, path_of, rewind, scores, small, soak, steps_of, without_time

RESUMED = {
    "delayed": {"schedule__score_delay": 9},  # three rounds in flight at every checkpoint
    "exact": {"schedule__name": "exact", "steps": 21},
    "stride": {"learner__draw": "stride", "learner__rate_by_gain": True, "learner__limit": 2.0},
    "no workers": {"workers__enabled": False},
    "auto": {"proposal__when": "auto", "proposal__cost": 1e9},  # idle and active by turns
    "asynchronous epochs": {"learner__asynchronous": 4, "proposal__name": "uniform", "learner__draw": "shuffled"},
    "adam": {"learner__optimizer": "adam", "learner__learning_rate": 0.001, "workers__score": "loss"},
}
MORE_RESUMED = {
    "asynchronous stride": {
        "learner__asynchronous": 3,
        "devices__workers": 1,
        "learner__draw": "stride",
        "learner__limit": 2.0,
    },
    "uniform stride": {"learner__draw": "stride", "proposal__name": "uniform"},
    "epochs": {"proposal__name": "uniform", "learner__draw": "shuffled"},
    "asynchronous": {
        "learner__asynchronous": 3,
        "devices__workers": 1,
        "proposal__when": "auto",
        "proposal__cost": 1e9,
    },
}


@pytest.mark.parametrize("name", soak([*RESUMED], [*RESUMED, *MORE_RESUMED]))
def test_a_run_that_goes_on_is_bit_equal(name, tmp_path):
    """Red if anything that a run knows is missing in its checkpoint, or a row is lost or measured twice."""
    config = small(**(RESUMED | MORE_RESUMED)[name])
    whole = issgd_jax.train(config, tmp_path)
    has_scores = config.proposal.name != "uniform"
    known, last = has_scores and scores(tmp_path), arrays_of(tmp_path, config.steps)
    for step in (7, 14):
        rewind(tmp_path, step)
        assert without_time(issgd_jax.train(config, tmp_path)) == without_time(whole)
        check_same(tmp_path, config.steps, last)
        if has_scores:
            np.testing.assert_array_equal(scores(tmp_path), known)


def test_more_steps_are_those_of_a_longer_run(tmp_path):
    for steps in (13, 13, 40):  # the second has nothing left to do
        history = issgd_jax.train(small(steps=steps, schedule__score_delay=9), tmp_path / "longer")
    whole = issgd_jax.train(small(schedule__score_delay=9), tmp_path / "whole")
    assert without_time(history) == without_time(whole)
    check_same(tmp_path / "longer", 40, arrays_of(tmp_path / "whole", 40))
    seconds = [row["wall_seconds"] for row in history]
    assert seconds == sorted(seconds)  # the time before counts too
    with pytest.raises(InputError, match="steps is 20, but the run in workdir has done 40"):
        issgd_jax.train(small(steps=20, schedule__score_delay=9), tmp_path / "longer")


def test_a_longer_run_decides_by_what_the_shorter_one_measured(tmp_path):
    """Red if the last minibatch before the first end counts in the window that it is of, and in its gain, otherwise."""
    auto = {"proposal__when": "auto", "proposal__cost": 0.0, "workers__enabled": False, "eval_every": 4}
    for steps in (4, 8):
        longer = issgd_jax.train(small(steps=steps, **auto), tmp_path / "longer")
    assert without_time(longer) == without_time(issgd_jax.train(small(steps=8, **auto), tmp_path / "whole"))
    assert longer[1]["payoff/gain"] is not None


def test_scores_of_an_earlier_end_are_gone_when_the_run_goes_on(tmp_path):
    """Red if they are shown as those of a later step, or the run is taken for finished where it was killed before."""
    issgd_jax.train(small(steps=8), tmp_path)
    is_there = []
    writers = [lambda step, row: is_there.append((tmp_path / "scores.npz").exists())]
    issgd_jax.train(small(steps=20), tmp_path, writers=writers)
    assert is_there and not any(is_there) and (tmp_path / "scores.npz").exists()


def test_a_resumed_run_beats_at_the_step_that_it_resumes_from(tmp_path, monkeypatch):
    """Red if a run that compiles for long, or is killed then, seems to have lost its steps."""
    issgd_jax.train(small(steps=8), tmp_path)
    beats, write, first, run = [], supervision.Supervision._write_heartbeat, threading.Event(), loop.run

    def write_heartbeat(self, step, at):
        beats.append(step)
        write(self, step, at)
        first.set()

    def run_later(*args, **keywords):
        assert first.wait(60)
        return run(*args, **keywords)

    monkeypatch.setattr(supervision.Supervision, "_write_heartbeat", write_heartbeat)
    monkeypatch.setattr(supervision, "HEARTBEAT_SECONDS", 0.01)
    monkeypatch.setattr(loop, "run", run_later)
    issgd_jax.train(small(steps=9), tmp_path)
    assert min(beats) == 8


@pytest.mark.parametrize(
    "overrides", [{}, {"proposal__when": "off"}, {"learner__lr_schedule": "cosine"}, {"checkpoint__every_steps": 0}]
)
def test_a_finished_run_says_so_and_changes_nothing(overrides, tmp_path, capsys, compilations):
    """Red if it compiles, writes, or names a remedy that would be refused."""
    config = small(steps=8, **overrides)
    rows = issgd_jax.train(config, tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    jax.clear_caches()
    compilations.clear()
    config.log.explain = True  # would need the data
    assert issgd_jax.train(config, tmp_path) == rows and not compilations
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    out, err = capsys.readouterr()
    can_go_on = config.learner.lr_schedule == "constant" and config.checkpoint.every_steps
    remedy = "raise --config.steps to continue, or start again" if can_go_on else "start again"
    assert not out and err.count("\n") == 1
    assert err.endswith(f"the run in {tmp_path} has done its 8 steps: {remedy} with --overwrite\n")
    with pytest.raises(InputError, match="holds a run of another experiment"):
        issgd_jax.train(small(steps=8, seed=1, **overrides), tmp_path)
    with workdir.locked(tmp_path), pytest.raises(InputError, match="is in use by"):
        issgd_jax.train(config, tmp_path)
    history = issgd_jax.train(config, tmp_path, overwrite=True)
    assert without_time(history) == without_time(rows) and "has done" not in capsys.readouterr().err


@pytest.mark.parametrize("name", ["scores.npz", "metrics.jsonl", "checkpoint"])
def test_a_run_whose_end_is_incomplete_is_not_finished(name, tmp_path, capsys):
    """Red if a run that was killed while it wrote its last files is taken for a finished one."""
    whole = issgd_jax.train(small(steps=8), tmp_path)
    last, known = arrays_of(tmp_path, 8), scores(tmp_path)
    if name == "scores.npz":
        (tmp_path / name).unlink()
    elif name == "metrics.jsonl":
        (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[:-9])
    else:
        (path_of(tmp_path, 8) / "state.json").write_text("{}")
    assert without_time(issgd_jax.train(small(steps=8), tmp_path)) == without_time(whole)
    assert "has done" not in capsys.readouterr().err
    check_same(tmp_path, 8, last)
    np.testing.assert_array_equal(scores(tmp_path), known)


def test_free_running_learners_go_on_with_what_was_in_flight(tmp_path):
    config = small(learner__asynchronous=3, devices__workers=1, schedule__name="free_running")
    issgd_jax.train(config, tmp_path)
    rewind(tmp_path, 21)
    in_flight = {name for name in arrays_of(tmp_path, 21) if name.startswith("train_state.in_flight.")}
    assert {name.split(".")[2] for name in in_flight} == {"0", "1"}
    history = issgd_jax.train(config, tmp_path)
    assert [row["step"] for row in history] == [0, 10, 20, 30, 40]
    assert history[-1]["train/loss"] < history[0]["train/loss"]


def test_with_fewer_workers_it_goes_on_and_says_that_it_is_not_bit_equal(tmp_path, capsys):
    whole = issgd_jax.train(small(schedule__score_delay=9), tmp_path)
    rewind(tmp_path, 21)
    state = checkpoint.read(path_of(tmp_path, 21)).state
    assert state["cursor"] == {"item": 200, "workers": 3} and len(state["rounds"]) == 3
    fewer = small(schedule__score_delay=9, devices__workers=2)
    history = issgd_jax.train(fewer, tmp_path)
    assert "devices have changed, so that the numbers will not be bit-equal" in capsys.readouterr().err
    assert without_time(history)[:3] == without_time(whole)[:3]
    # Rounds of three workers began at steps 0 to 20, all entered; of those of two, at 24 to 36, only the first two.
    assert history[-1]["worker_examples"] == 6 * 300 + 2 * 200
    assert history[-1]["train/loss"] < history[0]["train/loss"] and history[-1]["scores/scored_fraction"] > 0.9


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"learner__learning_rate": 0.1}, r"learner.learning_rate was 0.05, now 0.1\): give the old values to go on"),
        ({"seed": 1, "learner__batch_size": 8}, "learner.batch_size was 32, now 8, seed was 0, now 1"),
        ({"eval_every": 5}, "eval_every was 10, now 5"),
        ({"proposal__when": "off"}, "proposal.name was 'calibrated', now 'uniform'"),
    ],
)
def test_another_experiment_is_refused_naming_the_fields(overrides, message, tmp_path):
    issgd_jax.train(small(steps=8), tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file() and path.name != "lock"}
    with pytest.raises(InputError, match=message):
        issgd_jax.train(small(steps=8, **overrides), tmp_path)
    assert all(path.read_bytes() == text for path, text in before.items())


def test_what_does_not_matter_may_change(tmp_path):
    issgd_jax.train(small(steps=8), tmp_path)
    config = small(steps=9, log__tensorboard=True, checkpoint__every_steps=3, watchdog_seconds=5.0)
    assert issgd_jax.train(config, tmp_path)[-1]["step"] == 9
    record = json.loads((tmp_path / "config.json").read_text())
    assert record["config"]["steps"] == 9 and len(record["resumed"]) == 1


def test_with_a_decaying_rate_the_number_of_steps_matters(tmp_path):
    issgd_jax.train(small(steps=8, learner__lr_schedule="cosine"), tmp_path)
    with pytest.raises(InputError, match="steps was 8, now 9"):
        issgd_jax.train(small(steps=9, learner__lr_schedule="cosine"), tmp_path)


def test_other_data_is_refused_by_its_size(tmp_path):
    issgd_jax.train(small(steps=8), tmp_path)
    record = json.loads((tmp_path / "config.json").read_text())
    record["config"]["data"]["train_split"] = "train[:1300]"
    (tmp_path / "config.json").write_text(json.dumps(record))
    with pytest.raises(InputError, match=r"step 8 has float32\(1200,\) where this run has sampler_state.score"):
        issgd_jax.train(small(steps=9, data__train_split="train[:1300]"), tmp_path)


def test_a_checkpoint_of_an_earlier_version_is_refused_in_words(tmp_path):
    """Red if a number that it lacks is made up, or is a KeyError."""
    issgd_jax.train(small(steps=8), tmp_path)
    for path in (path_of(tmp_path, step) for step in steps_of(tmp_path)):
        kept = checkpoint.read(path)
        del kept.state["rebuilt_at"]
        shutil.rmtree(path)
        checkpoint.write(path, kept)
    with pytest.raises(InputError, match="of step 8 has no .rebuilt_at.: an earlier version"):
        issgd_jax.train(small(steps=9), tmp_path)


def test_a_run_without_checkpoints_is_never_overwritten_by_chance(tmp_path):
    rows = issgd_jax.train(small(steps=8, checkpoint__every_steps=0), tmp_path)
    for again in (small(steps=8, checkpoint__every_steps=0), small(steps=8)):
        assert issgd_jax.train(again, tmp_path) == rows
    with pytest.raises(InputError, match="holds a run already, and no checkpoint to resume from.*--overwrite"):
        issgd_jax.train(small(steps=9), tmp_path)
    (tmp_path / "scores.npz").unlink()
    with pytest.raises(InputError, match="holds a run already, and no checkpoint to resume from.*--overwrite"):
        issgd_jax.train(small(steps=8), tmp_path)
    issgd_jax.train(small(steps=8, proposal__name="uniform"), tmp_path, overwrite=True)
    assert not (tmp_path / "scores.npz").exists()


def test_without_further_checkpoints_it_goes_on_from_those_there_are(tmp_path):
    issgd_jax.train(small(steps=8), tmp_path)
    history = issgd_jax.train(small(steps=20, checkpoint__every_steps=0), tmp_path)
    assert [row["step"] for row in history] == [0, 10, 20] and steps_of(tmp_path) == [7, 8]


def test_rows_that_are_missing_are_measured_again(tmp_path, capsys):
    """Red if a run goes on behind a gap in its metrics."""
    whole = issgd_jax.train(small(), tmp_path)
    rows = (tmp_path / "metrics.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "metrics.jsonl").write_text("".join(rows[:2])[:-5])
    assert without_time(issgd_jax.train(small(), tmp_path)) == without_time(whole)
    assert "checkpoint of step 14 cannot be used (" in capsys.readouterr().err


@jax.custom_jvp
def spoiled(loss, factor):
    """The loss, with a gradient that is multiplied by the factor."""
    return loss


@spoiled.defjvp
def _(values, tangents):
    return values[0], tangents[0] * values[1]


def nan_at(monkeypatch, *steps, gradient_only=False):
    """At these steps the losses of the odd digits are NaN, or their gradients alone."""
    make_learner = wiring.make_learner

    def make_spoiled(config, problem, optimizer, **options):
        def loss_fn(params, image, label):
            loss = problem.loss_fn(params, image, label)
            factor = jnp.where(jnp.isin(clock["step"], jnp.array(steps)) & (label % 2 == 1), jnp.nan, 1.0)
            return spoiled(loss, factor) if gradient_only else loss * factor

        clock = {}
        inner_problem = dataclasses.replace(problem, loss_fn=loss_fn)

        @dataclasses.dataclass(frozen=True)
        class Timed(Learner):
            def step(self, state, *args, **keywords):
                clock["step"] = state.step
                return super().step(state, *args, **keywords)

        learner = make_learner(config, inner_problem, optimizer, **options)
        return Timed(**vars(learner))

    monkeypatch.setattr(wiring, "make_learner", make_spoiled)


@pytest.mark.parametrize("gradient_only", [False, True])
@pytest.mark.parametrize("proposal", ["calibrated", "uniform"])
def test_a_bad_update_stops_with_its_examples_and_a_checkpoint_from_before(
    gradient_only, proposal, tmp_path, monkeypatch, capsys
):
    config, never = small(proposal__name=proposal), 10**6  # so that all runs have the same program, and so rounding
    nan_at(monkeypatch, never, gradient_only=gradient_only)
    clean = issgd_jax.train(config, tmp_path / "clean")
    monkeypatch.undo()
    nan_at(monkeypatch, 24, gradient_only=gradient_only)
    # With uniform sampling the gradient is not looked at: the next loss tells, and two minibatches are kept.
    late = gradient_only and proposal == "uniform"
    message = r"at step 25; .* may lie in step 24\." if late else r"at step 24; .*checkpoint of step 21\."
    with pytest.raises(NonFiniteLossError, match=rf"{message}.* examples \(importance weights\): \d+ \(") as error:
        issgd_jax.train(config, tmp_path / "bad")
    kept = json.loads((tmp_path / "bad" / "nonfinite.json").read_text())
    assert kept["indices"] == error.value.batch["indices"] and kept["step"] == 24 + late
    if proposal == "uniform":
        assert kept["previous"]["step"] == 23 + late and len(set(kept["previous"]["indices"])) == 32
    else:
        assert ("nan" in kept["losses"]) != gradient_only
    assert len(kept["indices"]) == 32 == len(kept["importance_weights"]) and min(kept["importance_weights"]) > 0
    assert f"it stopped at step {24 + late}, as a loss or gradient" in status.read(tmp_path / "bad")
    assert steps_of(tmp_path / "bad") == [step for step in steps_of(tmp_path / "clean") if step < 24]
    # The cause mended, the same command goes on as if nothing had been.
    monkeypatch.undo()
    nan_at(monkeypatch, never, gradient_only=gradient_only)
    assert without_time(issgd_jax.train(config, tmp_path / "bad")) == without_time(clean)
    assert status.failure(tmp_path / "bad") is None  # the record of it is still there


@pytest.mark.parametrize("gradient_only", [False, True])
def test_a_bad_update_is_left_out_and_counted_where_asked(gradient_only, tmp_path, monkeypatch, capsys):
    nan_at(monkeypatch, 24, gradient_only=gradient_only)
    history = issgd_jax.train(small(on_nonfinite="skip", checkpoint__every_steps=1), tmp_path)
    assert [row["skipped_updates"] for row in history] == [0, 0, 0, 1, 1]
    assert "the update of step 24 is not finite and is skipped, 1 so far" in capsys.readouterr().err
    assert history[-1]["train/loss"] < history[0]["train/loss"]
    before, after = (arrays_of(tmp_path, step) for step in (24, 25))
    assert int(after["train_state.step"]) == 25
    for name, array in before.items():
        if name.startswith(("train_state.params", "train_state.opt_state")):
            np.testing.assert_array_equal(array, after[name], err_msg=name)
    rewind(tmp_path, 25)  # the loss of step 24 was not yet read
    again = issgd_jax.train(small(on_nonfinite="skip", checkpoint__every_steps=1), tmp_path)
    assert without_time(again) == without_time(history)


def test_a_worker_that_raises_costs_its_rounds_and_not_the_run(tmp_path, monkeypatch, capfd):
    """Red if an error on a worker reaches the arrays of the learner."""
    real, calls = wiring.make_worker_score_fn, []

    def make_worker_score_fn(config, problem):
        scores_fn = real(config, problem)

        def failing(found):
            calls.append(len(calls))
            if 6 <= calls[-1] < 12 or calls[-1] >= 18:
                raise RuntimeError("the worker is on fire")
            return found

        def score(params, *batch):
            found = scores_fn(params, *batch)
            return jax.pure_callback(failing, jax.ShapeDtypeStruct(found.shape, found.dtype), found)

        return score

    monkeypatch.setattr(wiring, "make_worker_score_fn", make_worker_score_fn)
    history = issgd_jax.train(small(), tmp_path)
    told = capfd.readouterr().err
    assert "a round of scoring is lost at step" in told and "the worker is on fire" in told
    assert "3 rounds in a row are lost: training continues without workers" in told
    assert history[-1]["failed_rounds"] >= 4 and 0 < history[-1]["worker_examples"] < 9 * 300
    assert history[-1]["train/loss"] < history[0]["train/loss"] and np.all(np.isfinite(scores(tmp_path)[0]))


def test_the_newest_and_the_best_checkpoints_are_kept(tmp_path):
    config = small(steps=120, checkpoint__keep=2, learner__learning_rate=0.3)
    history = issgd_jax.train(config, tmp_path)
    *rest, last, newest = steps_of(tmp_path)
    assert (last, newest) == (119, 120) and len(rest) <= 1
    errors = {row["step"]: row["test/error"] for row in history if row["step"]}
    best = min(errors, key=lambda step: (errors[step], step))
    assert best in (*rest, last, newest)
