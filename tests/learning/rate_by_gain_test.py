"""The rate follows the ratio of second moments of minibatches, which Monte Carlo also measures; and its schedule."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from issgd_jax import config as config_lib
from issgd_jax.errors import InputError
from issgd_jax.learning.rate_by_gain import rate_by_gain
from issgd_jax.run.training import train
from issgd_jax.sampling import build_table, draw, uniform_table
from tests.helpers import soak


def sgd(rate):
    return optax.sgd(rate, momentum=0.5)


def run(optimizer, minibatches, params=None):
    """The states of the optimiser after each (gradient, norms, importance weights)."""
    state, states = optimizer.init(jnp.zeros(2) if params is None else params), []
    update = jax.jit(lambda g, state, n, w: optimizer.update(g, state, norms=n, importance_weights=w))
    for gradient, norms, importance_weights in minibatches:
        updates, state = update(gradient, state, norms, importance_weights)
        states.append((updates, state))
    return states


def test_the_gain_is_the_ratio_of_second_moments_of_minibatches():
    """Red if the gain is that of examples and not of minibatches, or uses a weight once too often."""
    rng, num_examples, batch_size = np.random.default_rng(0), 300, 8
    gradients = (rng.normal(size=(num_examples, 2)) + 0.5) * np.exp(rng.normal(size=(num_examples, 1)))
    gradients = jnp.asarray(gradients, jnp.float32)
    norms = jnp.linalg.norm(gradients, axis=1)

    def minibatch(table, key):
        indices, importance_weights = draw(key, table, batch_size, "independent")
        return jnp.mean(importance_weights[:, None] * gradients[indices], 0), norms[indices], importance_weights

    keys, table = jax.random.split(jax.random.key(0), soak(20_000, 4_000)), build_table(norms)
    drawn = [jax.vmap(functools.partial(minibatch, t))(keys)[0] for t in (uniform_table(num_examples), table)]
    squares = [np.mean(np.sum(np.asarray(gradient) ** 2, axis=1), dtype=float) for gradient in drawn]
    states = run(rate_by_gain(sgd, 0.1), [minibatch(table, key) for key in keys[:2000]])
    gains = [float(state.gain) for _, state in states[500:]]
    assert np.mean(gains) == pytest.approx(squares[0] / squares[1], rel=0.1)
    assert np.std(gains) < 0.3 * np.mean(gains)


def test_uniform_minibatches_leave_the_rate_as_it_is():
    """Red if importance weights of 1 change the rate, or the optimiser is another one than without."""
    schedule = optax.linear_schedule(0.1, 0.0, 50)
    gradients = jnp.asarray(np.random.default_rng(0).normal(size=(50, 2)), jnp.float32)
    states = run(rate_by_gain(sgd, schedule), [(g, jnp.array([1.0, 3.0]), jnp.ones(2)) for g in gradients])
    plain = sgd(schedule)
    plain_state = plain.init(jnp.zeros(2))
    for gradient, (updates, state) in zip(gradients, states):
        expected, plain_state = plain.update(gradient, plain_state)
        np.testing.assert_allclose(updates, expected, rtol=1e-5, atol=1e-7)
        assert float(state.gain) == 1
    assert float(states[-1][1].effective_steps) == 50


def test_the_schedule_runs_in_effective_steps():
    """Red if the rate decays by the number of updates, though each does the work of several."""
    step = jnp.ones(2), jnp.array([30.0, 1.0]), jnp.array([0.1, 1.9])
    states = run(rate_by_gain(optax.sgd, optax.linear_schedule(1.0, 0.0, 100), max_gain=3.0), [step] * 100)
    gains = np.array([float(state.gain) for _, state in states])
    assert gains[0] < 1.5 and gains[-1] == 3 and np.all(np.diff(gains) >= 0)
    done = np.concatenate([[0], np.cumsum(gains)[:-1]])
    rates = [-float(updates[0]) for updates, _ in states]
    np.testing.assert_allclose(rates, gains * np.maximum(1 - done / 100, 0), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("done", [0, 2**22, 2**24, 2**29])
def test_the_schedule_goes_on_however_long_the_run_is(done):
    """Red if a gain is rounded away beside the sum of the others."""
    optimizer = rate_by_gain(optax.sgd, lambda steps: steps)
    state = optimizer.init(jnp.ones(2))._replace(effective_steps=jnp.float32(done))
    update = jax.jit(optimizer.update)
    for _ in range(40):
        _, state = update(jnp.ones(2), state, norms=jnp.zeros(2), importance_weights=jnp.ones(2))
    total = float(state.effective_steps) - done + float(state.remainder)
    assert total == 40


def test_an_optimiser_in_place_of_its_maker_is_told():
    with pytest.raises(TypeError, match="make_optimizer must take a learning rate, got GradientTransf.*: pass a func"):
        rate_by_gain(optax.sgd(0.1), 0.1)


@pytest.mark.parametrize("bad", [np.nan, np.inf, 1e30])
def test_moments_that_are_not_finite_teach_nothing(bad):
    """Red if one overflow makes the rate NaN for good."""
    good = jnp.ones(2), jnp.array([4.0, 1.0]), jnp.array([0.5, 1.5])
    states = run(rate_by_gain(sgd, 0.1), [good, (jnp.ones(2), jnp.array([bad, 1.0]), jnp.ones(2)), good])
    gains = [float(state.gain) for _, state in states]
    assert gains[0] == gains[1] < gains[2] < 4


@pytest.mark.parametrize(("worse", "limit"), [(True, 1 / 4), (False, 4)])
def test_the_gain_is_bounded(worse, limit):
    """Red if a rate is multiplied without limit, or a draw that is worse than uniform ones raises it."""
    norms = jnp.array([1.0, 100.0] if worse else [100.0, 1.0])
    states = run(rate_by_gain(sgd, 0.1), [(jnp.ones(2) * 0.01, norms, jnp.array([0.1, 1.9]))] * 200)
    assert float(states[-1][1].gain) == limit


def test_missing_norms_are_an_error():
    """Red if the optimiser runs at the plain rate without a word where an outside loop forgets the norms."""
    optimizer = rate_by_gain(sgd, 0.1)
    state = optimizer.init(jnp.zeros(2))
    with pytest.raises(ValueError, match=r"got None and None: pass both to update"):
        optimizer.update(jnp.ones(2), state)
    with pytest.raises(ValueError, match=r"got \(2,\) and \(3,\)"):
        optimizer.update(jnp.ones(2), state, norms=jnp.ones(2), importance_weights=jnp.ones(3))
    with pytest.raises(ValueError, match="max_gain must be >= 1, got 0.5"):
        rate_by_gain(sgd, 0.1, max_gain=0.5)


def test_the_trainer_follows_the_gain(tmp_path):
    """Red if the config's field does not reach the optimiser, or its state is not in the checkpoints."""
    losses = {}
    for name, steps, on in (("whole", 60, True), ("half", 30, True), ("half", 60, True), ("plain", 60, False)):
        config = config_lib.default()
        config.steps, config.eval_every, config.log.progress, config.workers.enabled = steps, 30, False, False
        config.model.mlp.hidden_sizes, config.learner.rate_by_gain = (8,), on
        config.checkpoint.every_steps = 30
        losses[name] = train(config, tmp_path / name)[-1]["train/loss"]
    assert losses["whole"] == losses["half"] != losses["plain"]


@pytest.mark.parametrize("change", [{"proposal.name": "uniform"}, {"learner.refresh": False}])
def test_it_needs_the_norms_of_minibatches(change):
    """Red if a rate that cannot follow anything is accepted."""
    config = config_lib.default()
    config.update_from_flattened_dict({"learner.rate_by_gain": True} | change)
    with pytest.raises(InputError, match="learner.rate_by_gain measures the gain by the gradient norms"):
        config_lib.validate(config)
