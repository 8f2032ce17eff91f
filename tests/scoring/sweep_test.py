"""`score_all` against one call on everything: a wrong order, padding or cut turns these red."""

import builtins
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from issgd_jax.gradnorm import per_example_grad_norms
from issgd_jax.sampling import Sampler
from issgd_jax.scoring.sweep import score_all
from tests.gradnorm.helpers import loop_norms, model_problem


@pytest.mark.parametrize("seed", range(4))
def test_every_example_gets_its_score(seed):
    rng = np.random.default_rng(seed)
    num_examples, chunk_size = rng.integers(1, 50), int(rng.integers(1, 60))
    x, y = rng.normal(size=(num_examples, 3)).astype(np.float32), rng.integers(0, 9, num_examples)
    scores = score_all(lambda p, x, y: p * x[:, 0] + y, 2.0, (x, y), chunk_size=chunk_size, progress=False)
    assert scores.dtype == np.float32
    np.testing.assert_allclose(scores, 2 * x[:, 0] + y, rtol=1e-6)


def test_gradient_norms_equal_a_loop():
    loss_fn, params, images, labels = model_problem("convnet", 11)
    scores = score_all(per_example_grad_norms(loss_fn), params, (images, labels), chunk_size=4, progress=False)
    np.testing.assert_allclose(scores, loop_norms(loss_fn, params, images, labels), rtol=1e-5)


def test_it_compiles_once_whatever_the_last_chunk():
    sizes = []

    def score_fn(params, x):
        sizes.append(x.shape)
        return params * x

    for _ in range(2):
        score_all(score_fn, 1.0, np.arange(10.0), chunk_size=4, progress=False)
    assert set(sizes) == {(4,)} and len(sizes) <= 2  # its shape is checked, then it is compiled


def test_the_sampler_counts_bad_scores():
    """Red if a score that is not finite is hidden, or enters the store."""
    scores = score_all(lambda p, x: p / x, 1.0, np.array([1.0, 0.0, np.nan, -2.0, 4.0]), progress=False)
    np.testing.assert_array_equal(scores, np.array([1, np.inf, np.nan, -0.5, 0.25], np.float32))
    sampler = Sampler(5, 2)
    state = sampler.ingest(sampler.init(0), np.arange(5), scores, jnp.int32(0))
    assert np.asarray(state.store.scored).tolist() == [True, False, False, False, True]


def test_collate_and_the_bar(capsys):
    tokens = [[1], [2, 3], [4, 5, 6]]
    score_fn, collate = lambda p, x: p * x.sum(1), lambda rows: np.array([row + [0] * (3 - len(row)) for row in rows])
    assert score_all(score_fn, 1, tokens, chunk_size=2, collate=collate).tolist() == [1, 5, 15]
    assert "scoring" in capsys.readouterr().err


def test_without_tqdm_there_is_no_bar(monkeypatch, capsys):
    actual = builtins.__import__

    def without_tqdm(name, *args):
        if name == "tqdm":
            raise ModuleNotFoundError(name)
        return actual(name, *args)

    monkeypatch.setattr(builtins, "__import__", without_tqdm)
    assert score_all(lambda p, x: x, 1, np.arange(3.0), chunk_size=2).tolist() == [0, 1, 2]
    assert not capsys.readouterr().err


def test_no_more_than_a_chunk_is_read_ahead():
    """Red if the whole data set is in memory at once: chunks read, when the first are scored."""
    read = []

    class Rows:
        def __len__(self):
            return 100

        def __getitem__(self, index):
            read.append(index)
            return np.float32(index)

    def scored(x):
        assert len(read) <= int(x[0]) + 4 * 10
        return x

    def score_fn(params, x):
        return jax.pure_callback(scored, jax.ShapeDtypeStruct((10,), jnp.float32), x)

    assert score_all(score_fn, 0, Rows(), chunk_size=10, progress=False).tolist() == list(range(100))


def test_errors_of_the_source_raise_and_its_thread_ends():
    before = threading.active_count()

    def collate(examples):
        if 7.0 in examples:
            raise OSError("disk is gone")
        return np.stack(examples)

    with pytest.raises(OSError, match="disk is gone"):
        score_all(lambda p, x: x, 0, [np.float32(i) for i in range(10)], chunk_size=3, collate=collate, progress=False)
    assert threading.active_count() == before


@pytest.mark.parametrize(
    "score_fn", [lambda p, x: x.sum(), lambda p, x: x[:, None], lambda p, x: (x, x), lambda p, x: x[:1]]
)
def test_score_fn_must_return_one_number_an_example(score_fn):
    with pytest.raises(ValueError, match=r"one number an example, an array of shape \(3,\), got"):
        score_all(score_fn, 0, np.ones(3), progress=False)


def test_chunk_size_must_be_positive():
    with pytest.raises(ValueError, match="chunk_size must be >= 1, got 0"):
        score_all(lambda p, x: x, 0, np.ones(3), chunk_size=0)
