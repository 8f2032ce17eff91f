"""From score to update without bias and within memory; an importance weight of the wrong v turns these red."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from issgd_jax import sampling
from issgd_jax.learning.learner import Learner, TrainState
from issgd_jax.sampling import Sampler
from issgd_jax.sampling import table as table_lib
from issgd_jax.sampling.calibrated import Calibrated
from issgd_jax.sampling.proposal import Mixture, Proportional, Uniform
from tests.learning.helpers import (
    BATCH_SIZE,
    NUM_EXAMPLES,
    drawing_from,
    full_gradient,
    per_example,
    problem,
    quadratic_loss,
)


def tables():
    """Every way to a table: each proposal, on scores that are partly missing, stale and of wildly different size."""
    store = sampling.ScoreStore.init(NUM_EXAMPLES)
    scores = np.random.default_rng(5).lognormal(0, 2, 15).astype(np.float32)
    store, _ = store.write(jnp.arange(15), scores, jnp.int32(3))
    for proposal in (Uniform(), Proportional(0.1), Proportional(0.0), Calibrated(), Mixture(Calibrated())):
        basis = proposal.basis(proposal.init(), store, jnp.int32(9))
        yield repr(proposal), proposal.table(basis, store, jnp.int32(9))


def one_step_gradients(table, params, examples, batch_size, count):
    """The gradients that a step applied, over many keys (the number of the draw makes the key)."""
    optimizer = optax.sgd(1.0)
    step = Learner(quadratic_loss, optimizer, refresh=False).step
    state = TrainState.init(params, optimizer)
    sampler, sampler_state = drawing_from(table, batch_size, seed=1)

    def step_of_draw(number):
        return step(state, sampler_state._replace(num_draws=number), sampler, examples)

    new, _, metrics = jax.jit(jax.vmap(step_of_draw))(jnp.arange(count))
    return jax.tree.map(lambda old, updated: old - updated, params, new.params), metrics.loss


@pytest.mark.parametrize(("name", "table"), list(tables()), ids=lambda x: x if isinstance(x, str) else "")
def test_the_update_is_unbiased_over_ten_thousand_steps(name, table):
    params, examples = problem()
    gradients, losses = one_step_gradients(table, params, examples, BATCH_SIZE, 10_000)
    expected = full_gradient(params, examples)
    for estimate, truth in zip(jax.tree.leaves(gradients), jax.tree.leaves(expected), strict=True):
        samples = np.asarray(estimate, np.float64)
        error = np.abs(samples.mean(0) - truth) / (samples.std(0) / 100)
        assert np.max(error) < 3, name
    loss = np.mean(jax.vmap(quadratic_loss, (None, 0, 0))(params, *examples))
    assert abs(np.mean(losses) - loss) < 3 * np.std(losses) / 100


@pytest.mark.parametrize(("name", "table"), list(tables()), ids=lambda x: x if isinstance(x, str) else "")
def test_the_update_is_unbiased_summed_exactly_over_all_examples(name, table):
    """sum_n q_n * (gradient applied when n is drawn) = full gradient, for minibatches of one."""
    params, examples = problem()
    gradients_now = per_example(params, examples)
    gradients, _ = one_step_gradients(table, params, examples, 1, 4000)
    q = np.asarray(table.v(), np.float64) / np.sum(np.asarray(table.v(), np.float64))
    sampler, state = drawing_from(table, 1, seed=1)
    drawn = jax.jit(jax.vmap(lambda number: sampler.draw_number(state, number).indices[0]))(jnp.arange(4000))
    total = jax.tree.map(lambda g: np.zeros(g.shape[1:]), gradients_now)
    missing = 0.0
    for n in range(NUM_EXAMPLES):
        rows = np.flatnonzero(np.asarray(drawn) == n)
        if len(rows):
            applied = jax.tree.map(lambda g, r=rows[0]: np.asarray(g[r], np.float64), gradients)
        else:  # too rare to be met in 4,000 draws; by definition (1 / N) g_n / q_n
            missing += q[n]
            applied = jax.tree.map(lambda g, i=n: np.asarray(g[i], np.float64) / (NUM_EXAMPLES * q[i]), gradients_now)
        total = jax.tree.map(lambda t, a, i=n: t + q[i] * a, total, applied)
    assert missing < 0.01, "nearly all of the probability was checked against what train_step really applied"
    for value, truth in zip(jax.tree.leaves(total), jax.tree.leaves(full_gradient(params, examples)), strict=True):
        np.testing.assert_allclose(value, truth, rtol=1e-4, atol=1e-5)


def test_uniform_is_plain_sgd():
    params, examples = problem()
    table = sampling.uniform_table(NUM_EXAMPLES)
    optimizer = optax.sgd(0.1)
    step = Learner(quadratic_loss, optimizer).compile()
    state = TrainState.init(jax.tree.map(jnp.copy, params), optimizer)
    sampler, sampler_state = drawing_from(table, seed=3)
    state, _, metrics = step(state, sampler_state, sampler, examples)
    indices = sampling.draw(jax.random.fold_in(jax.random.key(3), 0), table, BATCH_SIZE).indices
    batch = jax.tree.map(lambda x: x[indices], examples)
    expected = jax.tree.map(lambda p, g: p - 0.1 * g, params, full_gradient(params, batch))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6), state.params, expected)
    assert state.step == 1 and np.isfinite(metrics.loss)


@pytest.mark.parametrize("refresh", [True, False])
def test_both_states_are_donated(refresh):
    params, examples = problem()
    optimizer, sampler = optax.sgd(0.1), Sampler(NUM_EXAMPLES, 2)
    sampler_state = sampler.init(0)
    Learner(quadratic_loss, optimizer, refresh=refresh).compile()(
        TrainState.init(params, optimizer), sampler_state, sampler, examples
    )
    assert params["w"].is_deleted()
    assert sampler_state.store.score.is_deleted() and sampler_state.table.sums.is_deleted()


def test_a_step_refreshes_the_scores_of_its_own_minibatch():
    params, examples = problem()
    optimizer, proposal = optax.sgd(0.1), Mixture(Calibrated())
    sampler = Sampler(NUM_EXAMPLES, BATCH_SIZE, proposal)
    norms = np.linalg.norm(
        np.concatenate([np.reshape(g, (NUM_EXAMPLES, -1)) for g in jax.tree.leaves(per_example(params, examples))], 1),
        axis=1,
    )
    sampler_state = sampler.init(7)._replace(step=jnp.int32(5), num_draws=jnp.int32(5))
    old = jnp.arange(NUM_EXAMPLES), jnp.full(NUM_EXAMPLES, 2.0)
    sampler_state = sampler.ingest(sampler_state, *old, jnp.int32(0))
    proposal_state, table = jax.tree.map(np.asarray, (sampler_state.proposal_state, sampler_state.table))
    drawn = sampling.draw(jax.random.fold_in(jax.random.key(7), 5), sampler_state.table, BATCH_SIZE).indices
    state = TrainState.init(params, optimizer)._replace(step=jnp.int32(5))
    _, sampler_state, _ = Learner(quadratic_loss, optimizer).compile()(state, sampler_state, sampler, examples)
    scored_at = np.zeros(NUM_EXAMPLES)
    scored_at[drawn] = 5  # of the parameters before the update
    np.testing.assert_array_equal(sampler_state.store.scored_at, scored_at)
    np.testing.assert_allclose(sampler_state.store.score, np.where(scored_at == 5, norms, 2.0), rtol=1e-5)
    taught = np.asarray(sampler_state.proposal_state.inner.counts) - proposal_state.inner.counts
    assert np.sum(taught) == pytest.approx(BATCH_SIZE, rel=1e-5)
    v = np.asarray(sampler_state.table.v())
    refreshed = scored_at == 5
    np.testing.assert_array_equal(v[~refreshed], table.v()[~refreshed])
    assert np.all(v[refreshed] != table.v()[refreshed])
    basis, store = sampler_state.basis, sampler_state.store
    np.testing.assert_allclose(
        v[refreshed], proposal.v(basis, store.score, store.scored_at, jnp.int32(6))[refreshed], rtol=1e-5
    )


@pytest.mark.parametrize("draw", table_lib.METHODS)
@pytest.mark.parametrize(
    "proposal", [Mixture(Calibrated()), Proportional(0.1), Mixture(Proportional(0.0), 0.2)], ids=repr
)
def test_unbiased_through_refreshes_and_rebuilds(proposal, draw):
    """The table changes under the draws; each step's gradient must be that of the very v it was drawn with.

    With a rate of 0 the parameters stay, so that every step estimates the same gradient.
    """
    params, examples = problem()
    optimizer = optax.sgd(0.0)
    step, sampler = Learner(quadratic_loss, optimizer).compile(), Sampler(NUM_EXAMPLES, BATCH_SIZE, proposal, draw)
    loss = np.mean(jax.vmap(quadratic_loss, (None, 0, 0))(params, *examples))

    def one_step(states, _):
        *states, metrics = step(*states, sampler, examples)
        return tuple(states), metrics.loss

    def four_steps_and_a_rebuild(states, _):
        (state, sampler_state), losses = jax.lax.scan(one_step, states, length=4)
        return (state, sampler.rebuild(sampler_state)), losses

    def run(first):
        states = TrainState.init(params, optimizer), sampler.init(2)._replace(num_draws=first)
        return jax.lax.scan(four_steps_and_a_rebuild, states, length=3)[1].ravel()

    losses = np.asarray(jax.jit(jax.vmap(run))(1000 * jnp.arange(3000, dtype=jnp.int32)), np.float64)
    assert losses[:, 0].std() > 0 and losses[:, -1].std() > 0
    assert np.max(np.abs(losses.mean(0) - loss) / (losses.std(0) / np.sqrt(3000))) < 3.5  # of 12: p below 0.6 %


def test_without_refresh_the_sampler_stays_as_it_was():
    params, examples = problem()
    optimizer, sampler = optax.sgd(0.1), Sampler(NUM_EXAMPLES, 2)
    sampler_state = sampler.init(0)
    expected = jax.tree.map(np.array, sampler_state)._replace(num_draws=1, step=1)
    step = Learner(quadratic_loss, optimizer, refresh=False).compile()
    _, sampler_state, _ = step(TrainState.init(params, optimizer), sampler_state, sampler, examples)
    jax.tree.map(np.testing.assert_array_equal, sampler_state, expected)


def test_scores_that_are_no_numbers_never_enter_by_refresh():
    params, examples = problem()
    optimizer, sampler = optax.sgd(0.1), Sampler(NUM_EXAMPLES, BATCH_SIZE)
    state = TrainState.init(params | {"b": jnp.float32(jnp.nan)}, optimizer)
    _, sampler_state, _ = Learner(quadratic_loss, optimizer).compile()(state, sampler.init(0), sampler, examples)
    assert sampler_state.rejected.count == BATCH_SIZE and not np.any(sampler_state.store.scored)


@pytest.mark.parametrize(
    ("draw", "limit"), [("systematic", None), ("independent", None), ("stride", None), ("stride", 5.0)]
)
@pytest.mark.parametrize("proposal", [Proportional(1.0), Mixture(Calibrated())], ids=repr)
def test_a_step_copies_neither_store_nor_table(proposal, draw, limit):
    """Where XLA does not know that all reading comes before the writing, it copies the arrays: O(N) a step."""
    num_examples, params = 573_000, {"w": jnp.zeros(3), "b": jnp.float32(0)}
    sampler = Sampler(num_examples, 128, proposal, draw, rebuild_every=0, limit=limit)
    optimizer, examples = optax.sgd(0.1), (jnp.ones((num_examples, 3)), jnp.ones(num_examples))
    learner, state = Learner(quadratic_loss, optimizer), TrainState.init(params, optimizer)
    for step, count in ((learner.compile(), ()), (learner.compile_steps(), (jnp.int32(3),))):
        memory = step.lower(state, sampler.init(0), sampler, examples, *count).compile().memory_analysis()
        assert memory.temp_size_in_bytes < num_examples


def alone(optimizer, draw="systematic", **options):
    """A learner of several steps a call, and its states and other arguments."""
    params, examples = problem()
    proposal = Uniform() if draw == "shuffled" else Mixture(Calibrated())
    sampler = Sampler(NUM_EXAMPLES, BATCH_SIZE, proposal, draw, limit=2.0 if draw == "stride" else None)
    learner = Learner(quadratic_loss, optimizer, **options)
    return learner, TrainState.init(params, optimizer), sampler.init(7), sampler, examples


@pytest.mark.parametrize("draw", ["systematic", "stride", "shuffled"])
def test_steps_are_the_same_however_they_are_divided_among_calls(draw):
    """Bit by bit. Red if the program depends on the number of steps, or a call forgets what the one before did."""
    found = []
    for counts in ([12], [1] * 12, [5, 1, 6]):
        learner, *states, sampler, examples = alone(optax.adam(0.1), draw)
        steps = learner.compile_steps()
        for count in counts:
            *states, told = steps(*states, sampler, examples, jnp.int32(count))
            assert (int(told.place), int(told.nonfinite)) == (count - 1, 0)
        found.append((states, told.metrics))
    for other in found[1:]:
        jax.tree.map(np.testing.assert_array_equal, other, found[0])
    learner, *states, sampler, examples = alone(optax.adam(0.1), draw)
    for _ in range(12):
        *states, metrics = learner.compile()(*states, sampler, examples)
    np.testing.assert_array_equal(metrics.minibatch.indices, found[0][1].minibatch.indices)
    np.testing.assert_allclose(metrics.loss, found[0][1].loss, rtol=1e-4)


def test_of_several_steps_the_first_bad_one_is_told():
    """Red if the last is: after it, every minibatch has no finite loss."""
    learner, *states, sampler, examples = alone(optax.sgd(1e30))
    *_, told = learner.compile_steps()(*states, sampler, examples, jnp.int32(9))
    learner, *states, sampler, examples = alone(optax.sgd(1e30))
    step, metrics, place = learner.compile(), None, -1
    while metrics is None or np.isfinite(metrics.loss):
        *states, metrics = step(*states, sampler, examples)
        place += 1
    assert (int(told.place), int(told.nonfinite)) == (place, 9 - place) and 0 < place < 8
    np.testing.assert_array_equal(told.metrics.minibatch.indices, metrics.minibatch.indices)


def drifting(change):
    """Plain SGD whose state is something else after each update."""
    return optax.GradientTransformation(
        lambda params: jnp.zeros(2, jnp.bfloat16),
        lambda updates, state, params=None: (jax.tree.map(lambda g: -0.1 * g, updates), change(state)),
    )


def test_an_optimiser_keeps_the_types_of_its_state():
    """Red if a state that is f32 after the first update ends the program with an error of a loop in JAX."""
    learner, *states, sampler, examples = alone(drifting(lambda state: state + jnp.ones(2, jnp.float32)))
    state, *_ = learner.compile_steps()(*states, sampler, examples, jnp.int32(3))
    assert state.opt_state.dtype == jnp.bfloat16 and state.opt_state.tolist() == [3, 3]


def test_an_optimiser_whose_state_changes_its_form_is_refused_in_words():
    for change in (lambda state: jnp.zeros(3, jnp.bfloat16), lambda state: (state, state)):
        learner, *states, sampler, examples = alone(drifting(change))
        with pytest.raises(ValueError, match="optimiser's state has other arrays after an update than its init gives"):
            learner.compile_steps()(*states, sampler, examples, jnp.int32(3))


@jax.tree_util.register_pytree_node_class
class Opaque:
    """A state that equals itself alone."""

    def __init__(self, array):
        self.array = array

    def tree_flatten(self):
        return (self.array,), None

    @classmethod
    def tree_unflatten(cls, _, arrays):
        return cls(*arrays)


def test_an_optimiser_may_have_any_pytree():
    """Red if two states are compared by the equality of a class of the user's own."""
    optimizer = optax.GradientTransformation(
        lambda params: Opaque(jnp.zeros(2)), lambda updates, state, params=None: (updates, Opaque(state.array + 1))
    )
    learner, state, sampler_state, sampler, examples = alone(optimizer)
    states = state._replace(params=jax.tree.map(jnp.float32, state.params)), sampler_state
    with jax.numpy_dtype_promotion("strict"):
        state, *_ = learner.compile_steps()(*states, sampler, examples, jnp.int32(3))
    assert state.opt_state.array.tolist() == [3, 3]


def test_several_devices_do_one_step_a_call():
    mesh = jax.make_mesh((2,), ("data",), devices=jax.devices()[:2])
    with pytest.raises(ValueError, match="of one device, but the learner has a mesh"):
        alone(optax.sgd(0.1), mesh=mesh)[0].compile_steps()
