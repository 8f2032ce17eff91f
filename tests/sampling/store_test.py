"""A bad score in the store, an old one over a new one, or a lost one turns these red."""

import jax.numpy as jnp
import numpy as np
import pytest

from issgd_jax.errors import InputError
from issgd_jax.sampling.store import ScoreStore


def write(store, indices, score, step):
    store, rejected = store.write(jnp.asarray(indices), jnp.asarray(score, jnp.float32), jnp.int32(step))
    return store, int(rejected.count)


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


def test_a_rejected_example_is_named():
    store = ScoreStore.init(9)
    store, first = store.write(jnp.array([4, 7, 2]), jnp.array([1.0, -1.0, jnp.nan]), jnp.int32(1))
    assert first.index == 7
    _, none = store.write(jnp.array([4, 77]), jnp.array([1.0, -1.0]), jnp.int32(2))
    assert none.index == -1
    both = first.merge(none)
    assert both.count == 2 and both.index == 7
    assert none.merge(first).index == 7


@pytest.mark.parametrize("scored_before", [False, True])
def test_of_duplicates_the_last_valid_one_wins(scored_before):
    """A scatter alone may keep any of them."""
    store = ScoreStore.init(50)
    if scored_before:
        store, _ = write(store, np.arange(50), np.arange(50.0), step=900)
    rng = np.random.default_rng(0)
    indices, score = rng.integers(0, 50, 1000), rng.lognormal(0, 1, 1000).astype(np.float32)
    score[990:] = np.nan
    expected = np.asarray(store.score).copy()
    expected[indices[:990]] = score[:990]  # NumPy keeps the last
    store, rejected = write(store, indices, score, step=1000)
    np.testing.assert_array_equal(store.score, expected)
    assert rejected == 10
    written = np.isin(np.arange(50), indices[:990])
    np.testing.assert_array_equal(store.scored_at, np.where(written, 1000, 900 if scored_before else -1))


def test_the_strict_mode_names_the_examples():
    store = ScoreStore.init(5)
    store.check([0, 4], [0.0, 1e30])
    with pytest.raises(ValueError, match="finite and >= 0, got nan of example 3, -1.0 of example 1$"):
        store.check([0, 3, 1], [1.0, np.nan, -1.0])
    with pytest.raises(ValueError, match=r"indices must lie in \[0, 5\), got 5, -1$"):
        store.check([5, 0, -1], [1.0, 1.0, 1.0])
    with pytest.raises(ValueError, match="got 99, 99, 99, 99, 99 and 3 more"):
        store.check([99] * 8, [1.0] * 8)
    with pytest.raises(ValueError, match=r"one shape \[m\], got \(2,\) and \(1,\)"):
        store.check([0, 1], [1.0])


def test_appended_examples_are_never_scored_and_come_last():
    store, _ = write(ScoreStore.init(2), [0, 1], [5.0, 6.0], step=3)
    longer = store.append(2)
    np.testing.assert_array_equal(longer.score, [5, 6, 0, 0])
    np.testing.assert_array_equal(longer.scored, [True, True, False, False])
    assert len(store.append(0)) == 2
    with pytest.raises(ValueError, match="num_examples must be >= 0, got -1"):
        store.append(-1)


def test_removed_examples_are_gone_and_the_others_keep_their_scores():
    store, _ = write(ScoreStore.init(4), [0, 1, 3], [5.0, 6.0, 8.0], step=3)
    shorter, kept = store.remove([1, 1, 2])
    np.testing.assert_array_equal(kept, [0, 3])
    np.testing.assert_array_equal(shorter.score, [5, 8])
    np.testing.assert_array_equal(shorter.scored_at, [3, 3])
    with pytest.raises(ValueError, match=r"\[0, 4\), got 4"):
        store.remove([4])
    with pytest.raises(ValueError, match="all 4 examples would be removed"):
        store.remove(range(4))


def test_merging_keeps_the_newer_score_of_each():
    store, _ = write(ScoreStore.init(3), [0, 1], [5.0, 6.0], step=3)
    other, _ = write(ScoreStore.init(3), [0, 1, 2], [1.0, 2.0, 3.0], step=3)
    other, _ = write(other, [1], [9.0], step=7)
    merged = store.merge(other)
    np.testing.assert_array_equal(merged.score, [5, 9, 3])
    np.testing.assert_array_equal(merged.scored_at, [3, 7, 3])
    with pytest.raises(ValueError, match="as many examples, got 3 and 4"):
        store.merge(ScoreStore.init(4))


def test_the_hardest_examples_largest_first():
    store, _ = write(ScoreStore.init(6), [5, 0, 3, 2], [1.0, 0.0, 7.0, 3.0], step=0)
    indices, scores = store.hardest(3)
    np.testing.assert_array_equal(indices, [3, 2, 5])
    np.testing.assert_array_equal(scores, [7, 3, 1])
    assert list(store.hardest(100)[0]) == [3, 2, 5, 0]  # never-scored examples are not hard
    with pytest.raises(ValueError, match="k must be >= 1, got 0"):
        store.hardest(0)


def test_the_histogram_counts_every_known_score_once():
    score = np.r_[0.0, 0.0, np.random.default_rng(0).lognormal(0, 3, 500)].astype(np.float32)
    store, _ = write(ScoreStore.init(600), np.arange(502), score, step=0)
    histogram = store.histogram(20)
    assert histogram.zeros == 2 and histogram.counts.sum() == 500 and len(histogram.edges) == 21
    inner = np.histogram(score[2:], histogram.edges)[0]
    np.testing.assert_array_equal(histogram.counts, inner)
    one, _ = write(ScoreStore.init(2), [0], [4.0], step=0)
    assert one.histogram(3).counts.sum() == 1
    with pytest.raises(ValueError, match="got 40 bins and 0 scores"):
        ScoreStore.init(3).histogram()


def test_the_mass_of_each_class():
    store, _ = write(ScoreStore.init(5), [0, 1, 2, 3], [1.0, 2.0, 3.0, 4.0], step=0)
    np.testing.assert_allclose(store.class_mass([0, 2, 0, 2, 1], 4), [0.4, 0, 0.6, 0])
    np.testing.assert_array_equal(ScoreStore.init(2).class_mass([0, 1], 2), [0, 0])
    with pytest.raises(ValueError, match=r"5 labels in \[0, 2\), got shape \(5,\), 0 to 2"):
        store.class_mass([0, 2, 0, 2, 1], 2)


@pytest.mark.parametrize("kind", ["missing", "cut", "other", "text", "bad scores", "wrong type"])
def test_a_file_that_is_no_store(tmp_path, kind):
    path = tmp_path / "scores.npz"
    store, _ = write(ScoreStore.init(4), [1, 2], [0.5, 1.0], step=3)
    store.save(path)
    if kind == "missing":
        path.unlink()
    elif kind == "cut":
        path.write_bytes(path.read_bytes()[:200])
    elif kind == "other":
        np.savez(path, images=np.zeros(3))
    elif kind == "text":
        path.write_text("scores")
    elif kind == "bad scores":
        np.savez(path, score=np.array([1, np.nan], np.float32), scored_at=np.zeros(2, np.int32))
    else:
        np.savez(path, score=np.zeros(2), scored_at=np.zeros(2, np.int32))
    with pytest.raises(InputError, match="scores.npz"):
        ScoreStore.load(path)


@pytest.mark.parametrize("step", [-2, 2**30])
def test_steps_that_no_run_has_are_refused(step, tmp_path):
    """Beyond them the places of doubles in a write would win against a real step."""
    path = tmp_path / "scores.npz"
    np.savez(path, score=np.ones(3, np.float32), scored_at=np.array([0, step, -1], np.int32))
    with pytest.raises(InputError, match=f"got {step}"):
        ScoreStore.load(path)


def test_more_examples_than_memory_says_the_bytes_needed():
    with pytest.raises(InputError, match="1,000,000,000,000 examples needs 8,000,000,000,000 bytes"):
        ScoreStore.init(10**12)


def test_needs_an_example():
    with pytest.raises(ValueError, match="num_examples must be >= 1, got 0"):
        ScoreStore.init(0)
