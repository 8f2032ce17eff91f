"""Replicas are the runs that `train` would do one at a time, whatever the devices and whatever other replicas do."""

import math

import jax
import numpy as np
import pytest

from experiments.configs import digits
from experiments.paper import replicas
from issgd_jax.errors import InputError
from issgd_jax.run.training import train
from tests.helpers import soak

TINY = {"steps": 60, "eval_every": 20, "data.train_split": "train[:300]", "model.mlp.hidden_sizes": (16,)}


def tiny_config(**overrides):
    config = digits.get_config()
    config.update_from_flattened_dict(TINY)
    config.devices.workers, config.devices.host_platform_count = 1, 0
    config.workers.chunk_size = 70  # rounds wrap around in the middle of the data
    config.schedule.steps_per_round = config.schedule.score_delay = 4
    config.log.progress = config.log.tensorboard = False
    config.update_from_flattened_dict({name.replace("__", "."): value for name, value in overrides.items()})
    return config


def assert_alike(row, want, rel):
    """Asserts that two rows have the same numbers up to rounding, by which a few scores come into another bin."""
    numbers = {name: value for name, value in row.items() if not isinstance(value, list)}
    assert numbers == pytest.approx({name: want[name] for name in numbers}, rel=rel, abs=1e-5)
    for name in row.keys() - numbers.keys():
        counts, others = np.array(row[name]), np.array(want[name])
        assert counts.sum() == others.sum() and np.abs(counts - others).sum() <= 0.03 * counts.sum(), name


def assert_same_rows(rows, expected_rows, steps):
    """Asserts that all rows have the same columns, and those of `steps` the same values."""
    expected = {row["step"]: row for row in expected_rows}
    assert [row["step"] for row in rows] == list(expected)
    for row in rows:
        want = expected[row["step"]]
        assert set(want) - set(row) == {
            "wall_seconds",
            "step_seconds",
            "failed_rounds",
            "skipped_updates",
            "memory/resident_bytes",
        }
        if row["step"] in steps:
            assert_alike(row, want, rel=2e-3)


PAIRS = [(0, 0.05), (3, 0.02)]
_NO_REFRESH = {"learner__refresh": False, "learner__draw": "independent", "proposal__name": "proportional"}
# Late gradients; rounds that enter between two steps, in a program whose rate changes; the paper's method.
_REPRESENTATIVE = [
    {"learner__asynchronous": 4},
    {"learner__draw": "stride", "learner__rate_by_gain": True, "learner__limit": 2.0},
    {"schedule__score_delay": 6, "workers__score": "loss", "learner__lr_schedule": "cosine"},
    _NO_REFRESH,
]
_ALL = [
    {},
    {"schedule__score_delay": 0, "learner__lr_schedule": "cosine"},
    {"schedule__score_delay": 6, "workers__score": "loss"},
    {"schedule__score_delay": 12},
    {"workers__enabled": False},
    {"learner__asynchronous": 4, "learner__draw": "stride", "learner__limit": 2.0},
    {"proposal__name": "uniform"},
    *_REPRESENTATIVE,
]


# A replica that starts, delays or ingests a round or a gradient at another step, or draws with another key, is another
# run.
@pytest.mark.parametrize(
    "overrides",
    soak(_REPRESENTATIVE, _ALL),
    ids=lambda overrides: ", ".join(f"{k}={v}" for k, v in overrides.items()) or "default",
)
def test_replicas_are_the_runs_they_stand_for(overrides, tmp_path):
    config = tiny_config(**overrides)
    histories = list(zip(*replicas.train_replicas(config, PAIRS, devices=jax.devices()[:1])))
    for (seed, rate), history in zip(PAIRS, histories):
        config.seed, config.learner.learning_rate = seed, rate
        # Rounding grows with every step: later rows may drift.
        assert_same_rows(history, train(config, tmp_path / f"{seed}"), steps=(0, 20))


def test_replicas_on_several_devices_are_those_on_one():
    """Three replicas on two devices: the fourth place is filled with a copy, which must not be yielded."""
    config, last = tiny_config(steps=20, **soak(_NO_REFRESH, {})), (2, 0.01)
    on_two = list(replicas.train_replicas(config, [*PAIRS, last], devices=jax.devices()[:2]))
    assert [len(rows) for rows in on_two] == [3, 3]
    # Two at a time, as above: the programs are compiled already.
    on_one = [list(replicas.train_replicas(config, pairs, devices=jax.devices()[:1])) for pairs in (PAIRS, [last] * 2)]
    for rows, (first, second), (third, _) in zip(on_two, *on_one):
        for row, other in zip(rows, (first, second, third)):
            assert row.keys() == other.keys()
            assert_alike(row, other, rel=1e-3)


def test_a_replica_that_diverges_leaves_the_others_alone():
    config = tiny_config(proposal__name="uniform")
    without, with_diverged = (
        list(replicas.train_replicas(config, [(0, 0.01), (0, rate)], devices=jax.devices()[:1]))
        for rate in (0.01, 1e20)
    )
    assert math.isnan(with_diverged[-1][1]["train/loss"])
    assert with_diverged[-1][0]["train/loss"] == pytest.approx(without[-1][0]["train/loss"], rel=0.05)


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
def test_unsupported_configs_are_refused(overrides, message):
    with pytest.raises(InputError, match=message):
        next(replicas.train_replicas(tiny_config(**overrides), [(0, 0.05)]))
