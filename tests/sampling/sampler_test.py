"""The sampler: the order of draws and updates, what enters, what is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from issgd_jax.sampling import Calibrated, Draw, Mixture, Proportional, Sampler, Uniform, draw
from issgd_jax.sampling.proposal import Stateless
from issgd_jax.sampling.table import METHODS, build_table


class OwnProposal(Stateless):
    """One that this library does not know."""

    def basis(self, state, store, step):
        return ()

    def v(self, basis, score, scored_at, step):
        return score + 1

    def table(self, basis, store, step):
        return build_table(store.score + 1)


def test_scores_of_a_round_enter_whatever_its_shape_and_are_drawn_from():
    sampler = Sampler(6, 2, Proportional(0.0))
    state = sampler.init(0)._replace(step=jnp.int32(5))
    indices, scores = jnp.array([[0, 2, 4], [1, 3, 6]]), jnp.array([[1.0, 2.0, jnp.nan], [5.0, 0.5, 9.0]])
    state = sampler.ingest(state, indices, scores, jnp.int32(2))
    np.testing.assert_array_equal(state.store.score, [1, 5, 2, 0.5, 0, 0])
    np.testing.assert_array_equal(state.store.staleness(jnp.int32(5))[:4], 3)
    np.testing.assert_allclose(state.table.v(), [1, 5, 2, 0.5, 8.5 / 4, 8.5 / 4])
    assert state.rejected.count == 1 and state.rejected.index == 4


@pytest.mark.parametrize("proposal", [Proportional(1.0), Mixture(Calibrated())], ids=repr)
def test_the_state_takes_at_most_sixteen_bytes_an_example(proposal):
    num_examples = 573_000
    sampler = Sampler(num_examples, 2, proposal)
    state = sampler.ingest(sampler.init(0), jnp.arange(2048), jnp.ones(2048), jnp.int32(0))
    assert sum(leaf.nbytes for leaf in jax.tree.leaves(state)) <= 16 * num_examples


@pytest.mark.parametrize("method", METHODS)
def test_a_draw_may_run_ahead_of_updates(method):
    """Red if the number of a draw is that of an update: draws ahead would repeat, or skip."""
    sampler = Sampler(50, 4, Mixture(Calibrated()), method)
    state, drawn = sampler.init(3), []
    for _ in range(3):
        state, ahead = sampler.draw(state)
        drawn.append(ahead)
    for number, ahead in enumerate(drawn):
        expected = draw(jax.random.fold_in(jax.random.key(3), number), state.table, 4, method)
        jax.tree.map(np.testing.assert_array_equal, ahead, expected)
    for ahead in drawn:
        state = sampler.update(state, ahead, jnp.ones(4))
    assert int(state.num_draws) == int(state.step) == 3
    np.testing.assert_array_equal(np.asarray(state.store.scored_at)[np.asarray(drawn[2].indices)], 2)


def test_a_minibatch_drawn_from_an_older_table_is_as_unbiased():
    """Red if the importance weight is of a newer table than the draw."""
    sampler, values = Sampler(40, 8, Proportional(0.1)), np.random.default_rng(0).normal(size=40)
    scores = jnp.asarray(np.random.default_rng(1).lognormal(size=(2, 40)), jnp.float32)

    @jax.jit
    def estimate(seed):
        state = sampler.ingest(sampler.init(seed), jnp.arange(40), scores[0], jnp.int32(0))
        state, ahead = sampler.draw(state)
        state = sampler.ingest(state, jnp.arange(40), scores[1], jnp.int32(1))
        return jnp.mean(ahead.importance_weights * jnp.asarray(values, jnp.float32)[ahead.indices])

    estimates = np.asarray(jax.vmap(estimate)(jnp.arange(4000)), np.float64)
    assert abs(estimates.mean() - values.mean()) < 4 * estimates.std() / np.sqrt(4000)


def test_an_update_without_norms_only_counts():
    sampler = Sampler(20, 4)
    state, drawn = sampler.draw(sampler.init(0))
    expected = jax.tree.map(np.array, state)._replace(step=1)
    jax.tree.map(np.testing.assert_array_equal, sampler.update(state, drawn, None), expected)


@pytest.mark.parametrize("draw", ["systematic", "stride"])
def test_draws_are_counted_if_asked_for(draw):
    """Red if a draw is counted twice, at another example, or counts do not follow their examples."""
    sampler = Sampler(num_examples=40, batch_size=4, draw=draw, count_draws=True)
    state, counts = sampler.init(seed=0), np.zeros(40, int)
    for norms in (jnp.arange(4.0), None, jnp.full(4, jnp.nan)):
        state, drawn = sampler.draw(state)
        np.add.at(counts, np.asarray(drawn.indices), 1)
        state = sampler.update(state, drawn, norms)
    assert state.times_drawn.tolist() == counts.tolist() and counts.sum() == 12
    sampler, state = sampler.append(state, 2)
    sampler, state, kept = sampler.remove(state, [0, 39])
    assert state.times_drawn.tolist() == [*counts[1:39], 0, 0] and len(kept) == 40
    state, drawn = sampler.draw(state)
    assert sampler.update(state, drawn, None).times_drawn.sum() == counts[1:39].sum() + 4


def test_a_state_with_other_counts_is_refused():
    for counts in (True, False):
        state = Sampler(40, 4, count_draws=counts).init(seed=0)
        with pytest.raises(ValueError, match=f"but count_draws is {not counts}: use the sampler that made it"):
            Sampler(40, 4, count_draws=not counts).draw(state)


def test_a_sampler_is_a_pytree_whose_numbers_change_without_compiling():
    traces = []

    @jax.jit
    def draw_one(sampler, state):
        traces.append(1)
        return sampler.draw(state)[1]

    for smoothing in (0.1, 0.2):
        sampler = Sampler(20, 4, Proportional(jnp.float32(smoothing)))
        assert isinstance(draw_one(sampler, sampler.init(0)), Draw)
    assert len(traces) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, 1), "num_examples must be between 1 and 1073741824, got 0"),
        ((2**30 + 1, 1), "num_examples must be"),
        ((10, 0), "batch_size must be between 1 and"),
        ((10, 4, Uniform(), "random_subset"), "batch_size must be between 1 and 3 with draw 'random_subset', got 4"),
        ((10, 11, Uniform(), "without_replacement"), "batch_size must be between 1 and 10"),
        ((10, 2, Uniform(), "random"), "draw must be one of systematic, independent, without_replacement, shuffled"),
        ((10, 2, Mixture(Calibrated()), "shuffled"), "draw 'shuffled' is uniform, but the proposal is"),
        ((10, 2, OwnProposal(), "random_subset"), "draw 'random_subset' is uniform, but the proposal is"),
        ((10, 2**30 + 1), "batch_size must be between 1 and 1,073,741,824 with draw 'systematic', got 1073741825"),
    ],
)
def test_values_that_cannot_work_are_refused_at_once(arguments, message):
    with pytest.raises(ValueError, match=message):
        Sampler(*arguments)


def test_a_mixture_that_would_never_draw_what_is_excluded_is_refused():
    """Red if the gradient is silently that of the share of the examples that have a young score, times that share."""
    excluding = Proportional(0.0, max_staleness=3)
    with pytest.raises(ValueError, match="uniform_fraction must be above 0 with max_staleness, which excludes, got 0"):
        Mixture(excluding, uniform_fraction=0.0)
    Mixture(excluding, uniform_fraction=0.1), Mixture(excluding), Mixture(Proportional(0.0), uniform_fraction=0.0)
