"""Several steps a call, where nothing happens between them."""

import dataclasses
import math
import os
import signal

import numpy as np
import pytest

import issgd_jax
from issgd_jax.run import loop, wiring
from tests.helpers import arrays_of, check_same, scores, small, steps_of, without_time
from tests.run.resume_test import nan_at

FIXED = {
    "refresh": {"workers__enabled": False},
    "stride": {
        "workers__enabled": False,
        "learner__draw": "stride",
        "learner__rate_by_gain": True,
        "learner__limit": 2.0,
    },
    "epochs": {"proposal__name": "uniform", "learner__draw": "shuffled"},
    "workers": {"schedule__score_delay": 9},  # rounds start and enter between the steps of others
}


@pytest.fixture
def calls(monkeypatch):
    """The size of every call; they grow, however slow the machine is."""
    monkeypatch.setattr(loop, "SHORT", math.inf)
    monkeypatch.setattr(loop, "LONG", math.inf)
    sizes, build = [], wiring.build

    def counting(prepared):
        parts = build(prepared)

        def train_steps(*arguments, **keywords):
            sizes.append(int(arguments[-1].addressable_data(0)[()]))
            return own(*arguments, **keywords)

        own = parts.train_steps
        return dataclasses.replace(parts, train_steps=own and train_steps)

    monkeypatch.setattr(wiring, "build", counting)
    return sizes


@pytest.mark.parametrize("name", FIXED)
def test_calls_of_any_size_give_the_same_run(name, calls, tmp_path, monkeypatch):
    """Bit by bit. Red if a call goes past a row, checkpoint, round or rebuild, or knows how many steps it does."""
    config = small(**FIXED[name])
    whole = issgd_jax.train(config, tmp_path / "many")
    assert sum(calls) == 40 and max(calls) > 1, calls
    calls.clear()
    monkeypatch.setattr(loop, "MAX_STEPS_A_CALL", 1)
    assert without_time(issgd_jax.train(config, tmp_path / "one")) == without_time(whole)
    assert calls == [1] * 40
    assert steps_of(tmp_path / "many") == steps_of(tmp_path / "one")
    for step in steps_of(tmp_path / "one"):
        check_same(tmp_path / "many", step, arrays_of(tmp_path / "one", step))
    if name != "epochs":
        np.testing.assert_array_equal(scores(tmp_path / "many"), scores(tmp_path / "one"))


def test_calls_that_take_long_do_one_step(calls, tmp_path, monkeypatch):
    """Red if a signal waits for 32 steps of a large network."""
    monkeypatch.setattr(loop, "SHORT", -math.inf)
    monkeypatch.setattr(loop, "LONG", -math.inf)
    issgd_jax.train(small(**FIXED["refresh"]), tmp_path)
    assert calls == [1] * 40


@pytest.mark.parametrize(
    "overrides", [{"schedule__name": "free_running"}, {"workers__enabled": False, "proposal__when": "auto"}]
)
def test_where_something_may_happen_between_two_steps_a_call_does_one(overrides, calls, tmp_path):
    """Red if scores that are ready enter late, or the payoff misses minibatches."""
    issgd_jax.train(small(steps=8, **overrides), tmp_path)
    assert calls == []


def test_a_bad_update_within_a_call_is_named_and_its_examples(calls, tmp_path, monkeypatch):
    """Red if the last step of the call is named, or its examples; those after it are all NaN too."""
    nan_at(monkeypatch, 23)
    with pytest.raises(issgd_jax.NonFiniteLossError, match="not finite at step 23;") as error:
        issgd_jax.train(small(eval_every=40, checkpoint__every_steps=40, **FIXED["refresh"]), tmp_path)
    batch = error.value.batch
    assert calls[-1] > 1 and batch["step"] == 23
    assert 0 < np.isnan(batch["losses"]).sum() < 32


def test_a_bad_update_within_a_call_is_left_out_and_counted_where_asked(calls, tmp_path, monkeypatch, capsys):
    """Red if it is not counted, or another step is named."""
    nan_at(monkeypatch, 26)
    overrides = FIXED["refresh"] | {"on_nonfinite": "skip", "eval_every": 20}
    rows = issgd_jax.train(small(**overrides), tmp_path)
    assert [row["skipped_updates"] for row in rows] == [0, 0, 1]
    assert "the update of step 26 is not finite and is skipped, 1 so far" in capsys.readouterr().err
    assert max(calls) > 1 and rows[-1]["train/loss"] < rows[0]["train/loss"]


def test_bad_updates_within_one_call_are_all_counted(calls, tmp_path, monkeypatch, capsys):
    """Red if one of them counts once a call, or if what they leave out depends on how the steps are divided."""
    nan_at(monkeypatch, 25, 26, 31)
    config = small(**FIXED["refresh"], on_nonfinite="skip", eval_every=20)
    whole = issgd_jax.train(config, tmp_path / "many")
    assert [row["skipped_updates"] for row in whole] == [0, 0, 3]
    assert "the update of step 25 is not finite and is skipped, 2 so far" in capsys.readouterr().err
    monkeypatch.setattr(loop, "MAX_STEPS_A_CALL", 1)
    assert without_time(issgd_jax.train(config, tmp_path / "one")) == without_time(whole)


def test_a_run_that_a_signal_stops_after_such_a_call_goes_on_as_if_nothing_had_been(tmp_path, calls, monkeypatch):
    """Red if the steps of the call are lost, done again, or their loss is not read before the checkpoint."""
    config = small(**FIXED["stride"], checkpoint__every_steps=1000, eval_every=40)
    whole = issgd_jax.train(config, tmp_path / "whole")
    calls.clear()
    build = wiring.build

    def interrupted(prepared):
        parts = build(prepared)

        def train_steps(*arguments, **keywords):
            result = parts.train_steps(*arguments, **keywords)
            if sum(calls) == 24:
                os.kill(os.getpid(), signal.SIGTERM)
            return result

        return dataclasses.replace(parts, train_steps=train_steps)

    with monkeypatch.context() as patch, pytest.raises(issgd_jax.StoppedError, match="by SIGTERM at step 24;"):
        patch.setattr(wiring, "build", interrupted)
        issgd_jax.train(config, tmp_path / "stopped")
    assert calls[-1] > 1 and steps_of(tmp_path / "stopped") == [24]
    assert without_time(issgd_jax.train(config, tmp_path / "stopped")) == without_time(whole)
    check_same(tmp_path / "stopped", 40, arrays_of(tmp_path / "whole", 40))
