"""A bad score in the store, an old one over a new one, or a lost one turns these red."""

import jax.numpy as jnp
import numpy as np
import pytest

from issgd_jax.store import ScoreStore


def write(store, indices, score, step):
    store, rejected = store.write(jnp.asarray(indices), jnp.asarray(score, jnp.float32), jnp.int32(step))
    return store, int(rejected)


def test_scores_and_their_step_are_kept():
    store, rejected = write(ScoreStore.init(5), [3, 0], [2.0, 0.0], step=7)
    np.testing.assert_array_equal(store.score, [0, 0, 0, 2, 0])
    np.testing.assert_array_equal(store.scored_at, [7, -1, -1, 7, -1])
    np.testing.assert_array_equal(store.scored, [True, False, False, True, False])
    np.testing.assert_array_equal(store.staleness(10)[jnp.array([0, 3])], [3, 3])
    assert rejected == 0


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, -1.0])
def test_bad_scores_never_enter_and_are_counted(bad):
    before, _ = write(ScoreStore.init(3), [0, 1], [5.0, 6.0], step=1)
    store, rejected = write(before, [0, 1, 2], [bad, 7.0, bad], step=2)
    np.testing.assert_array_equal(store.score, [5, 7, 0])
    np.testing.assert_array_equal(store.scored_at, [1, 2, -1])
    assert rejected == 2


def test_an_older_measurement_never_replaces_a_newer():
    newer, _ = write(ScoreStore.init(2), [0], [5.0], step=9)
    store, _ = write(newer, [0, 1], [1.0, 2.0], step=4)
    np.testing.assert_array_equal(store.score, [5, 2])
    np.testing.assert_array_equal(store.scored_at, [9, 4])


def test_padding_is_ignored_and_not_counted():
    store, rejected = write(ScoreStore.init(2), [2, -1, 1, 99], [np.nan, 3.0, 4.0, 5.0], step=0)
    np.testing.assert_array_equal(store.score, [0, 4])
    assert rejected == 0


def test_saved_and_loaded(tmp_path):
    store, _ = write(ScoreStore.init(4), [1, 2], [0.5, 1e-30], step=3)
    store.save(tmp_path / "scores.npz")
    loaded = ScoreStore.load(tmp_path / "scores.npz")
    np.testing.assert_array_equal(loaded.score, store.score)
    np.testing.assert_array_equal(loaded.scored_at, store.scored_at)


def test_needs_an_example():
    with pytest.raises(ValueError, match="num_examples must be >= 1, got 0"):
        ScoreStore.init(0)
