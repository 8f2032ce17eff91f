"""From score to update without bias and within memory; an importance weight of the wrong v turns these red."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from issgd_jax import sampling
from issgd_jax.learning import learner
from issgd_jax.sampling import table as table_lib
from issgd_jax.sampling.calibrated import Calibrated
from issgd_jax.sampling.proposal import Mixture, Proportional, Uniform

NUM_EXAMPLES, BATCH_SIZE = 23, 4


def quadratic_loss(params, x, y):
    return 0.5 * (params["w"] @ x + params["b"] - y) ** 2


def problem(seed=0):
    rng = np.random.default_rng(seed)
    examples = rng.normal(0, 1, (NUM_EXAMPLES, 3)).astype(np.float32), rng.normal(0, 3, NUM_EXAMPLES).astype(np.float32)
    return {"w": jnp.array([0.3, -0.2, 0.5]), "b": jnp.float32(0.1)}, jax.tree.map(jnp.asarray, examples)


def full_gradient(params, examples):
    return jax.grad(lambda p: jnp.mean(jax.vmap(quadratic_loss, (None, 0, 0))(p, *examples)))(params)


def per_example(params, examples):
    return jax.vmap(jax.grad(quadratic_loss), (None, 0, 0))(params, *examples)


def tables():
    """Every way to a table: each proposal, on scores that are partly missing, stale and of wildly different size."""
    store = learner.init_sampler(Uniform(), NUM_EXAMPLES).store
    scores = np.random.default_rng(5).lognormal(0, 2, 15).astype(np.float32)
    store, _ = store.write(jnp.arange(15), scores, jnp.int32(3))
    for proposal in (Uniform(), Proportional(0.1), Proportional(0.0), Calibrated(), Mixture(Calibrated())):
        basis = proposal.basis(proposal.init(), store, jnp.int32(9))
        yield repr(proposal), proposal.table(basis, store, jnp.int32(9))


def sampler_of(table):
    """A sampler that draws from `table`, its store empty."""
    return learner.init_sampler(Uniform(), NUM_EXAMPLES)._replace(table=table)


def one_step_gradients(table, params, examples, batch_size, count):
    """The gradients that `train_step` applied, over many keys (the step number makes the key)."""
    optimizer = optax.sgd(1.0)
    step = learner.make_train_step(quadratic_loss, optimizer, batch_size=batch_size, seed=1)
    states = jax.vmap(lambda i: learner.init_train_state(params, optimizer)._replace(step=i))(jnp.arange(count))
    samplers = jax.tree.map(lambda x: jnp.broadcast_to(x, (count, *jnp.shape(x))), sampler_of(table))
    new, _, metrics = jax.vmap(step, in_axes=(0, 0, None, None))(states, samplers, Uniform(), examples)
    return jax.tree.map(lambda old, after: old - after, params, new.params), metrics.loss


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
    keys = [jax.random.fold_in(jax.random.key(1), i) for i in range(4000)]
    drawn = np.asarray(jax.vmap(lambda key: sampling.draw(key, table, 1).indices[0])(jnp.stack(keys)))
    total = jax.tree.map(lambda g: np.zeros(g.shape[1:]), gradients_now)
    missing = 0.0
    for n in range(NUM_EXAMPLES):
        rows = np.flatnonzero(drawn == n)
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
    step = learner.make_train_step(quadratic_loss, optimizer, batch_size=BATCH_SIZE, seed=3)
    state = learner.init_train_state(jax.tree.map(jnp.copy, params), optimizer)
    state, _, metrics = step(state, sampler_of(table), Uniform(), examples)
    indices = sampling.draw(jax.random.fold_in(jax.random.key(3), 0), table, BATCH_SIZE).indices
    batch = jax.tree.map(lambda x: x[indices], examples)
    expected = jax.tree.map(lambda p, g: p - 0.1 * g, params, full_gradient(params, batch))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6), state.params, expected)
    assert state.step == 1 and np.isfinite(metrics.loss)


@pytest.mark.parametrize("refresh", [True, False])
def test_both_states_are_donated(refresh):
    params, examples = problem()
    optimizer, proposal = optax.sgd(0.1), Mixture(Calibrated())
    state, sampler = learner.init_train_state(params, optimizer), learner.init_sampler(proposal, NUM_EXAMPLES)
    step = learner.make_train_step(quadratic_loss, optimizer, batch_size=2, seed=0, refresh=refresh)
    step(state, sampler, proposal, examples)
    assert params["w"].is_deleted() and sampler.store.score.is_deleted() and sampler.table.sums.is_deleted()


def test_a_step_refreshes_the_scores_of_its_own_minibatch():
    params, examples = problem()
    optimizer, proposal = optax.sgd(0.1), Mixture(Calibrated())
    norms = np.linalg.norm(
        np.concatenate([np.reshape(g, (NUM_EXAMPLES, -1)) for g in jax.tree.leaves(per_example(params, examples))], 1),
        axis=1,
    )
    sampler = learner.init_sampler(proposal, NUM_EXAMPLES)
    old = jnp.arange(NUM_EXAMPLES), jnp.full(NUM_EXAMPLES, 2.0)
    sampler = learner.take_in(proposal, sampler, *old, scored_at=jnp.int32(0), step=jnp.int32(5))
    before, table = jax.tree.map(np.asarray, (sampler.proposal_state, sampler.table))
    drawn = sampling.draw(jax.random.fold_in(jax.random.key(7), 5), sampler.table, BATCH_SIZE).indices
    state = learner.init_train_state(params, optimizer)._replace(step=jnp.int32(5))
    step = learner.make_train_step(quadratic_loss, optimizer, batch_size=BATCH_SIZE, seed=7)
    _, sampler, _ = step(state, sampler, proposal, examples)
    scored_at = np.zeros(NUM_EXAMPLES)
    scored_at[drawn] = 5  # of the parameters before the update
    np.testing.assert_array_equal(sampler.store.scored_at, scored_at)
    np.testing.assert_allclose(sampler.store.score, np.where(scored_at == 5, norms, 2.0), rtol=1e-5)
    taught = np.asarray(sampler.proposal_state.of_proposal.counts) - before.of_proposal.counts
    assert np.sum(taught) == pytest.approx(BATCH_SIZE, rel=1e-5)
    v = np.asarray(sampler.table.v())
    refreshed = scored_at == 5
    np.testing.assert_array_equal(v[~refreshed], table.v()[~refreshed])
    assert np.all(v[refreshed] != table.v()[refreshed])
    basis, store = sampler.basis, sampler.store
    np.testing.assert_allclose(
        v[refreshed], proposal.v(basis, store.score, store.scored_at, jnp.int32(6))[refreshed], rtol=1e-5
    )


@pytest.mark.parametrize("draw", table_lib.METHODS)
@pytest.mark.parametrize(
    "proposal", [Mixture(Calibrated()), Proportional(0.1), Mixture(Proportional(0.0), 0.2)], ids=repr
)
def test_unbiased_through_refreshes_and_renewals(proposal, draw):
    """The table changes under the draws; each step's gradient must be that of the very v it was drawn with.

    With a rate of 0 the parameters stay, so that every step estimates the same gradient.
    """
    params, examples = problem()
    optimizer = optax.sgd(0.0)
    step = learner.make_train_step(quadratic_loss, optimizer, batch_size=BATCH_SIZE, seed=2, draw=draw)
    loss = np.mean(jax.vmap(quadratic_loss, (None, 0, 0))(params, *examples))

    def run(first):
        state = learner.init_train_state(params, optimizer)._replace(step=first)
        sampler, found = learner.init_sampler(proposal, NUM_EXAMPLES), []
        for i in range(12):
            state, sampler, metrics = step(state, sampler, proposal, examples)
            found.append(metrics.loss)
            if i % 4 == 3:
                sampler = learner.renew(proposal, sampler, step=state.step)
        return jnp.stack(found)

    losses = np.asarray(jax.jit(jax.vmap(run))(1000 * jnp.arange(3000, dtype=jnp.int32)), np.float64)
    assert losses[:, 0].std() > 0 and losses[:, -1].std() > 0
    assert np.max(np.abs(losses.mean(0) - loss) / (losses.std(0) / np.sqrt(3000))) < 3.5  # of 12: p below 0.6 %


def test_without_refresh_the_sampler_stays_as_it_was():
    params, examples = problem()
    optimizer, proposal = optax.sgd(0.1), Mixture(Calibrated())
    sampler = learner.init_sampler(proposal, NUM_EXAMPLES)
    before = jax.tree.map(np.array, sampler)
    step = learner.make_train_step(quadratic_loss, optimizer, batch_size=2, seed=0, refresh=False)
    _, after, _ = step(learner.init_train_state(params, optimizer), sampler, proposal, examples)
    jax.tree.map(np.testing.assert_array_equal, after, before)


def test_scores_that_are_no_numbers_never_enter_by_refresh():
    params, examples = problem()
    optimizer, proposal = optax.sgd(0.1), Mixture(Calibrated())
    step = learner.make_train_step(quadratic_loss, optimizer, batch_size=BATCH_SIZE, seed=0)
    broken = params | {"b": jnp.float32(jnp.nan)}
    _, sampler, _ = step(
        learner.init_train_state(broken, optimizer), learner.init_sampler(proposal, NUM_EXAMPLES), proposal, examples
    )
    assert sampler.rejected.count == BATCH_SIZE and not np.any(sampler.store.scored)


def test_a_round_enters_whatever_its_shape_and_is_drawn_from():
    proposal = Proportional(0.0)
    sampler = learner.init_sampler(proposal, 6)
    indices, scores = jnp.array([[0, 2, 4], [1, 3, 6]]), jnp.array([[1.0, 2.0, jnp.nan], [5.0, 0.5, 9.0]])
    sampler = learner.take_in(proposal, sampler, indices, scores, scored_at=jnp.int32(2), step=jnp.int32(5))
    np.testing.assert_array_equal(sampler.store.score, [1, 5, 2, 0.5, 0, 0])
    np.testing.assert_array_equal(sampler.store.staleness(jnp.int32(5))[:4], 3)
    np.testing.assert_allclose(sampler.table.v(), [1, 5, 2, 0.5, 8.5 / 4, 8.5 / 4])
    assert sampler.rejected.count == 1 and sampler.rejected.index == 4


@pytest.mark.parametrize("proposal", [Proportional(1.0), Mixture(Calibrated())], ids=repr)
def test_the_sampler_takes_at_most_sixteen_bytes_an_example(proposal):
    num_examples = 573_000
    sampler = learner.init_sampler(proposal, num_examples)
    indices, scores = jnp.arange(2048), jnp.ones(2048)
    sampler = learner.take_in(proposal, sampler, indices, scores, scored_at=jnp.int32(0), step=jnp.int32(1))
    held = sum(leaf.nbytes for leaf in jax.tree.leaves(sampler))
    assert held <= 16 * num_examples


@pytest.mark.parametrize("draw", ["systematic", "independent"])
@pytest.mark.parametrize("proposal", [Proportional(1.0), Mixture(Calibrated())], ids=repr)
def test_a_step_copies_neither_store_nor_table(proposal, draw):
    """Where XLA does not know that all reading comes before the writing, it copies the arrays: O(N) a step."""
    num_examples, params = 573_000, {"w": jnp.zeros(3), "b": jnp.float32(0)}
    optimizer, examples = optax.sgd(0.1), (jnp.ones((num_examples, 3)), jnp.ones(num_examples))
    state, sampler = learner.init_train_state(params, optimizer), learner.init_sampler(proposal, num_examples)
    step = learner.make_train_step(quadratic_loss, optimizer, batch_size=128, seed=0, draw=draw)
    memory = step.lower(state, sampler, proposal, examples).compile().memory_analysis()
    assert memory.temp_size_in_bytes < num_examples
