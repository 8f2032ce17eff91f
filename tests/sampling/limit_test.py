"""A limit on what one example adds to a minibatch: what its importance weight loses is owed, and paid."""

import functools

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from issgd_jax import value_grad_and_norms
from issgd_jax.loading.prefetch import Prefetch
from issgd_jax.sampling import Draw, Mixture, Proportional, Sampler, ScoreStore
from issgd_jax.sampling import visits as visits_lib
from issgd_jax.sampling.relative_limit import RelativeLimit, norm_levels
from tests.helpers import soak
from tests.sampling.visits_test import NORMS


@functools.cache
def compiled(sampler):
    """Returns (state, norms of all) -> (state, indices, importance weights, those that the limit leaves, limit)."""

    @jax.jit
    def step(state, norms):
        state, drawn = sampler.draw(state)
        found = norms[drawn.indices]
        weights = drawn.importance_weights
        return sampler.update(state, drawn, found), drawn.indices, weights.full, weights.lowered(found), weights.limit

    return step


def heavy(seed, num_examples=300):
    return np.exp(2 * np.random.default_rng(seed).normal(size=num_examples)).astype(np.float32)


@hypothesis.settings(max_examples=soak(200, 15), deadline=None)
@hypothesis.given(norms=st.lists(NORMS, min_size=37, max_size=37), seed=st.integers(0, 2**20))
def test_what_is_given_and_what_is_owed_add_up_to_the_time_that_has_passed(norms, seed):
    """Red if any norm makes an example lose time, or count twice for it."""
    num_examples, batch_size = 37, 4
    sampler = Sampler(num_examples, batch_size, draw="stride", rebuild_every=3, limit=2.0)
    step, state = compiled(sampler), sampler.init(seed)
    norms = jnp.asarray(norms, jnp.float32)
    given, lowered_times = np.zeros(num_examples), np.zeros(num_examples)
    for _ in range(60):
        state, indices, weights, lowered, _ = step(state, norms)
        np.add.at(given, indices, lowered)
        np.add.at(lowered_times, indices, lowered < weights)
        assert len(set(np.asarray(indices).tolist())) == batch_size
    now = 60 * batch_size
    waited = (now - np.asarray(state.visits.visited_at).astype(np.int64)) / num_examples
    # Before a run each example was visited once, in the epoch before.
    passed = (now + num_examples - np.asarray(sampler.init(seed).visits.deadlines[:num_examples])) / num_examples
    np.testing.assert_array_less(np.abs(given + waited - passed), (0.5 * lowered_times + 0.01) / num_examples + 1e-4)


def test_no_weighted_norm_exceeds_the_limit_and_the_mean_over_time_is_that_of_all():
    """Red if an outlier adds more, or is left out; 1 / t, as without a limit."""
    norms, vectors = heavy(0), np.random.default_rng(1).normal(size=(300, 3))
    vectors = (vectors * norms[:, None] / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)
    sampler = Sampler(300, 8, draw="stride", rebuild_every=4, limit=3.0)
    grad_fn, mean = value_grad_and_norms(lambda params, x: params @ x), vectors.mean(0)

    def step(state, _):
        state, drawn = sampler.draw(state)
        indices, weights = drawn
        _, gradient, found = grad_fn(jnp.zeros(3), weights, jnp.asarray(vectors)[indices])
        lowered = weights.lowered(found)
        over = jnp.max(lowered * found) / weights.limit
        return sampler.update(state, drawn, found), (gradient, over, jnp.sum(lowered < weights.full))

    _, (gradients, over, num_lowered) = jax.jit(lambda state: jax.lax.scan(step, state, length=3000))(sampler.init(0))
    assert np.all(over <= 1 + 1e-6) and np.sum(num_lowered) > 10
    means = np.cumsum(np.asarray(gradients, np.float64), axis=0) / np.arange(1, 3001)[:, None]
    errors = np.linalg.norm(means - mean, axis=1) / np.linalg.norm(mean)
    assert errors[-1] < 0.02 and errors[-1] < errors[299] / 3


def test_a_gradient_that_has_grown_is_paid_in_parts_at_once():
    """Red if the example comes back only after its stride, or all that it is owed comes in one minibatch."""
    sampler = Sampler(300, 8, draw="stride", rebuild_every=4, limit=4.0)
    step, state, norms = compiled(sampler), sampler.init(0), np.ones(300, np.float32)
    for _ in range(100):
        state, *_ = step(state, jnp.asarray(norms))
    norms[7], visits = 100.0, []
    for i in range(60):
        state, indices, weights, lowered, limit = step(state, jnp.asarray(norms))
        if 7 in indices.tolist():
            place = indices.tolist().index(7)
            visits.append((i, float(weights[place]), float(lowered[place]), float(limit)))
        if len(visits) == 4:
            norms[7] = 1e-3  # it is learned
    first, weights, lowered, limits = zip(*visits)
    assert list(np.diff(first[:5])) == [1, 1, 1, 1]  # in every minibatch
    assert all(100 * w <= limit * 1.001 for w, limit in zip(lowered[:4], limits))
    assert lowered[4] == weights[4] > 0.2  # the rest, now that it does no harm
    assert sum(lowered[:5]) == pytest.approx(weights[0] + 4 * 8 / 300, abs=0.02)


def test_an_example_with_nearly_the_whole_gradient_is_owed_no_more_than_it_can_be_paid():
    """Red if what is owed grows for ever: such an example is in every minibatch and must stand for all of its time."""
    sampler = Sampler(300, 8, draw="stride", rebuild_every=4, limit=2.0)
    step, state = compiled(sampler), sampler.init(0)
    norms = jnp.ones(300).at[7].set(1e6)
    waited = []
    for _ in range(400):
        state, *_ = step(state, norms)
        waited.append(int(state.visits.now - state.visits.visited_at[7]))
    assert max(waited[200:]) <= 300 and max(waited[350:]) <= 40
    assert int(jnp.max(state.visits.now - state.visits.visited_at)) < 10 * 300


@pytest.mark.parametrize("value", [0.0, np.nan, np.inf, -1.0])
def test_norms_that_say_nothing_lower_nothing(value):
    """Red if a limit of zero or NaN stops training, or makes a weight NaN."""
    sampler = Sampler(20, 4, draw="stride", rebuild_every=1, limit=2.0)
    step, state = compiled(sampler), sampler.init(0)
    for _ in range(12):
        state, _, weights, lowered, limit = step(state, jnp.full(20, value, jnp.float32))
        np.testing.assert_array_equal(weights, lowered)
        assert limit == np.inf


def test_the_limit_is_the_mean_of_the_known_norms_times_the_factor():
    limit = RelativeLimit(5.0, 1000, 8)
    store, _ = ScoreStore.init(1000).write(jnp.arange(4), jnp.float32([1, 2, 3, 10]), jnp.int32(0))
    assert float(limit.of(norm_levels(store))) == 20.0
    assert float(limit.of(norm_levels(store), jnp.int32(200))) == pytest.approx(200 * 10 * 2 * 8 / 1000)
    assert float(limit.of(norm_levels(ScoreStore.init(3)))) == np.inf
    huge, _ = store.write(jnp.arange(1000), jnp.full(1000, 3e38), jnp.int32(0))
    assert np.isfinite(limit.of(norm_levels(huge)))


@pytest.mark.parametrize(("depth", "lag"), [(0, 0), (2, 0), (5, 0), (2, 2), (1, 11), (6, 8)])
def test_draws_ahead_lose_nothing_of_what_is_owed(depth, lag):
    """Red if what is owed after a weight was fixed is forgotten, or a limit is read that was donated.

    With 40 examples, and up to 40 of them in flight, those in flight are drawn again. Norms change at each step.
    """
    sampler, in_flight = Sampler(40, 4, draw="stride", rebuild_every=1, limit=2.0), []
    state, given, times_lowered = sampler.init(0), np.zeros(40), np.zeros(40)
    first = np.asarray(state.visits.deadlines[:40])
    with Prefetch(sampler, np.arange(40), depth) as prefetch:
        for step in range(200):
            state, drawn, batch = prefetch.draw(state)
            np.testing.assert_array_equal(batch, drawn.indices)
            in_flight.append(drawn)
            if len(in_flight) > lag:
                drawn = in_flight.pop(0)
                found = 10 ** (step % 7) * jnp.asarray(heavy(step, 4))
                lowered = drawn.importance_weights.lowered(found)
                np.add.at(given, np.asarray(drawn.indices), lowered)
                np.add.at(times_lowered, np.asarray(drawn.indices), lowered < drawn.importance_weights.full)
                state = sampler.update(state, drawn, found)
    for drawn in in_flight:
        np.add.at(given, np.asarray(drawn.indices), drawn.importance_weights.full)
    waited = (800 - np.asarray(state.visits.visited_at)) / 40
    assert np.sum(times_lowered) >= 5
    # To half a visit each time that a weight is lowered; before a run each example was visited once.
    passed = (800 + 40 - first) / 40
    np.testing.assert_array_less(np.abs(given + waited - passed), 0.5 * times_lowered / 40 + 1e-4)


@pytest.mark.parametrize("is_owed", [False, True])
def test_who_is_owed_and_whose_v_is_bad_gets_the_mean_stride(is_owed):
    """Red if an example is taken for one that is not in flight, because its last visit counts as earlier."""
    visits = visits_lib.init(jax.random.key(0), 100)
    indices, _ = visits_lib.draw(visits, jnp.uint32(0), 4)
    visits = visits_lib.visit(visits, indices)
    visits = visits_lib.owe(visits, indices, jnp.full(4, 0.5 * is_owed))
    np.testing.assert_array_equal(visits.strides(indices), 100)
    visits = visits_lib.write(visits, indices, jnp.ones(4), arrived=False)  # a worker's score, while they are in flight
    visits = visits_lib.rebuild(visits, jnp.ones(100))
    visits = visits_lib.write(visits, indices, jnp.full(4, jnp.nan), arrived=True)
    np.testing.assert_array_equal(visits.last_strides()[indices], 100)


def test_a_state_has_the_limit_of_the_sampler_that_draws():
    """Red if a limit or a minibatch that has changed has no effect until the next rebuild."""
    state = Sampler(1000, 4, draw="stride", limit=5.0).init(0)
    state = Sampler(1000, 4, draw="stride", limit=5.0).ingest(state, jnp.arange(1000), jnp.ones(1000).at[0].set(50), 0)
    for limit, batch_size, expected in ((5.0, 4, 5 * 1.049), (2.0, 4, 2 * 1.049), (2.0, 100, 50 * 0.2)):
        drawn = Sampler(1000, batch_size, draw="stride", limit=limit).draw(jax.tree.map(jnp.copy, state))[1]
        assert float(drawn.importance_weights.limit) == pytest.approx(expected)


def test_draws_ahead_pay_an_example_with_nearly_the_whole_gradient():
    """Red if the limit does not know how seldom such an example can be drawn."""
    sampler, norms = Sampler(300, 8, draw="stride", rebuild_every=4, limit=5.0), jnp.ones(300).at[7].set(1e6)
    state, given = sampler.init(0), np.zeros(300)
    with Prefetch(sampler, np.arange(300), depth=3) as prefetch:
        for _ in range(1000):
            state, drawn, _ = prefetch.draw(state)
            found = norms[drawn.indices]
            np.add.at(given, np.asarray(drawn.indices), drawn.importance_weights.lowered(found))
            state = sampler.update(state, drawn, found)
    assert given[7] > 0.9 * 1000 * 8 / 300
    assert int(state.visits.now - state.visits.visited_at[7]) < 300


@pytest.mark.parametrize("lag", [1, 2, 7])
def test_late_updates_are_paid_too(lag):
    """Red if who is in flight most of the time cannot be paid for it: its gradient is then clipped for good."""
    sampler = Sampler(300, 8, draw="stride", rebuild_every=4, limit=5.0)
    norms, in_flight = jnp.ones(300).at[7].set(1e6), []

    @jax.jit
    def draw(state):
        state, drawn = sampler.draw(state)
        return state, drawn

    update = jax.jit(sampler.update)
    state, given = sampler.init(0), np.zeros(300)
    for _ in range(1500):
        state, drawn = draw(state)
        in_flight.append(drawn)
        if len(in_flight) > lag:
            drawn = in_flight.pop(0)
            found = norms[drawn.indices]
            np.add.at(given, np.asarray(drawn.indices), drawn.importance_weights.lowered(found))
            state = update(state, drawn, found)
    assert given[7] > 0.9 * 1500 * 8 / 300
    assert int(state.visits.now - state.visits.visited_at[7]) < 3 * 300


def test_new_and_removed_examples_keep_what_is_owed():
    sampler = Sampler(40, 4, draw="stride", rebuild_every=1, limit=2.0)
    state = sampler.init(0)
    for _ in range(20):
        state, *_ = compiled(sampler)(state, jnp.asarray(heavy(3, 40)))
    visited_at = np.asarray(state.visits.visited_at)
    larger, state = sampler.append(state, 10)
    assert larger.limit == 2.0 and np.all(state.norm_levels > 0)
    np.testing.assert_array_equal(state.visits.visited_at[:40], visited_at)
    smaller, state, kept = larger.remove(state, [0, 5])
    assert smaller.limit == 2.0
    np.testing.assert_array_equal(state.visits.visited_at[:38], visited_at[kept[:38]])


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"limit": 1.9}, ValueError, "limit must be >= 2 and finite, or None: no limit, got 1.9"),
        ({"limit": np.inf}, ValueError, "limit must be >= 2 and finite"),
        ({"limit": np.nan}, ValueError, "limit must be >= 2 and finite"),
        ({"limit": "5"}, TypeError, "limit must be >= 2 and finite"),
        ({"limit": 5, "draw": "systematic"}, ValueError, 'limit 5 needs draw "stride"'),
    ],
)
def test_limits_that_cannot_work_are_refused(options, error, message):
    with pytest.raises(error, match=message):
        Sampler(10, 2, **({"draw": "stride"} | options))


def test_calls_that_would_lose_what_is_owed_are_refused():
    """Red if one of them is answered: the gradient would then be biased, and nothing would tell."""
    sampler, without = (Sampler(10, 2, draw="stride", limit=limit) for limit in (5.0, None))
    state, drawn = sampler.draw(sampler.init(0))
    norms = jnp.ones(2)
    with pytest.raises(ValueError, match="update needs the norms"):
        sampler.update(state, drawn, None)
    with pytest.raises(ValueError, match="takes them as the scores"):
        sampler.update(state, drawn, norms, scores=norms)
    with pytest.raises(ValueError, match="the draw has no limit, but limit is 5.0"):
        sampler.update(state, Draw(drawn.indices, drawn.importance_weights.full, 10), norms)
    with pytest.raises(ValueError, match="are_norms is False, but the limit of this sampler is one of norms"):
        sampler.ingest(state, jnp.arange(3), jnp.ones(3), 0, are_norms=False)
    with pytest.raises(ValueError, match="the state has a limit, but limit is None"):
        without.draw(state)
    with pytest.raises(ValueError, match="the state has no limit, but limit is 5.0"):
        sampler.draw(without.init(0))
    assert int(sampler.update(state, drawn, norms).step) == 1  # nothing was donated by the refused calls


def test_scores_of_another_proposal_have_the_same_limit():
    """Red if the limit is in the unit of v, which is that of the proposal."""
    limits = []
    for proposal in (Mixture(Proportional(0.0), 0.3), Mixture(Proportional(100.0), 0.3)):
        sampler = Sampler(100, 4, proposal, draw="stride", limit=5.0)
        state = sampler.ingest(sampler.init(0), jnp.arange(100), jnp.full(100, 2.0), 0)
        limits.append(float(sampler.draw(state)[1].importance_weights.limit))
    assert limits == [10.0, 10.0]
