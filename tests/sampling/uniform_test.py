"""Shuffled epochs: an order that repeats an example, prefers one, or is the same every epoch turns these red."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from issgd_jax.sampling import uniform
from tests.helpers import soak


def epochs(num_examples, batch_size, count, *, subset=False, seed=0):
    """i32[count, batches * B]: the examples of the first epochs, in their order."""
    batches = (num_examples // uniform.SUBSET if subset else num_examples) // batch_size
    draw = jax.jit(
        jax.vmap(lambda step: uniform.shuffled(jax.random.key(seed), step, num_examples, batch_size, subset))
    )
    return np.asarray(draw(jnp.arange(count * batches))).reshape(count, batches * batch_size)


@pytest.mark.parametrize(
    ("num_examples", "batch_size"),
    soak([(2, 1), (17, 4), (1437, 128)], [(2, 1), (3, 1), (16, 4), (17, 4), (300, 7), (1437, 128)]),
)
def test_an_epoch_has_no_example_twice(num_examples, batch_size):
    for epoch in epochs(num_examples, batch_size, 20):
        assert len(set(epoch)) == len(epoch) and epoch.min() >= 0 and epoch.max() < num_examples
        assert len(epoch) > num_examples - batch_size


@pytest.mark.parametrize("num_examples", soak([2, 5, 17], [2, 3, 5, 16, 17]))
def test_all_orders_are_as_likely(num_examples):
    """Of the first two places of an epoch, every pair; a network with too few rounds prefers some."""
    first, second, *_ = epochs(num_examples, 1, 4000).T
    counts = np.bincount(first * num_examples + second, minlength=num_examples**2).reshape(num_examples, -1)
    assert np.trace(counts) == 0
    assert stats.chisquare(counts[~np.eye(num_examples, dtype=bool)]).pvalue > 1e-4


def test_every_example_comes_as_often_though_epochs_leave_some_out():
    counts = np.bincount(epochs(100, 30, 2000).ravel(), minlength=100)
    assert stats.chisquare(counts).pvalue > 1e-4


def test_a_random_subset_serves_for_three_epochs():
    drawn = epochs(300, 20, 30, subset=True)
    assert drawn.shape[1] == 100
    subsets = [frozenset(epoch) for epoch in drawn]
    assert all(len(subset) == 100 for subset in subsets)
    assert len(set(subsets)) == 10 and all(len(set(subsets[i : i + 3])) == 1 for i in range(0, 30, 3))
    assert not any(np.array_equal(*drawn[i : i + 2]) for i in range(29))
    counts = np.bincount(epochs(300, 20, 3000, subset=True).ravel(), minlength=300)
    assert stats.chisquare(counts / 3).pvalue > 1e-4  # an example comes three times or not at all


def test_a_late_step_does_not_overflow():
    last = jnp.int32(2**30 - 1)
    indices = np.asarray(uniform.shuffled(jax.random.key(0), last, 1000, 128))
    assert len(set(indices)) == 128 and indices.min() >= 0 and indices.max() < 1000


@pytest.mark.parametrize(("subset", "limit"), [(False, 100), (True, 33)])
def test_a_minibatch_larger_than_an_epoch_is_refused(subset, limit):
    with pytest.raises(ValueError, match=f"an epoch of {limit} examples has no minibatch of {limit + 1}"):
        uniform.shuffled(jax.random.key(0), jnp.int32(0), 100, limit + 1, subset)
