"""Sampling by importance where it does not pay, or never again where it would, turns these red."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from issgd_jax import sampling
from issgd_jax.learning import payoff, variance
from issgd_jax.learning.payoff import Payoff
from issgd_jax.learning.variance import Moments

STEPS = 8  # of a window


def moments_of(gain, scale=1.0):
    """Of a gradient whose mean is zero: an infinite minibatch's own square is zero too."""
    return Moments(uniform=scale * gain, proposed=scale, gradient=scale / 16)


def simulate(judge, gains, *, uniform_seconds=1.0, cost=1.0):
    """Whether each window was active, where window k has the gain gains[k] and steps take what they take."""
    state, active = judge.init(), []
    for gain in gains:
        active.append(state.active)
        for step in range(STEPS):
            # Norms shrink by orders of magnitude while training: only ratios within a window may count.
            state = judge.observe(
                state, moments_of(gain if state.active else 1.0, 10.0 ** -(len(active) % 30 + step / STEPS))
            )
        state = judge.end_window(state, uniform_seconds * (cost if state.active else 1.0))
    return np.array(active), state


def test_while_it_pays_it_goes_on():
    active, state = simulate(Payoff(16, STEPS, trial=6, cost=2.0), [3.0] * 50)
    assert active.all() and Payoff(16, STEPS, 6).gain(state) == pytest.approx(3.0)


def test_while_it_does_not_pay_trials_grow_rare():
    active, _ = simulate(Payoff(16, STEPS, trial=6, cost=4.0), [3.0] * 1000)
    begins = np.flatnonzero(np.diff(active.astype(int)) == 1) + 1
    np.testing.assert_array_equal(np.diff(begins)[:6], [6 + 12, 6 + 24, 6 + 48, 6 + 96, 6 + 96, 6 + 96])
    assert active[500:].mean() < 1 / 12


def test_it_comes_back_by_itself_and_goes_again():
    gains = [1.0] * 100 + [9.0] * 400 + [1.0] * 100
    active, _ = simulate(Payoff(16, STEPS, trial=6, cost=4.0), gains)
    assert not active[36:60].any() and active[114:500].all() and not active[505:].all()


def test_the_cost_is_measured_and_compilation_does_not_count():
    judge = Payoff(16, STEPS, trial=3)
    state = judge.init()
    assert np.isnan(judge.measured_cost(state)) and np.isnan(judge.gain(state)) and not state.active
    for k in range(20):
        compiles = k in (0, 3, 4)  # the uniform step; the other one; what takes scores in
        state = judge.observe(state, moments_of(2.0))
        state = judge.end_window(state, 50.0 if compiles else 1.7 if state.active else 1.0)
    assert judge.measured_cost(state) == pytest.approx(1.7) and state.active


@pytest.mark.parametrize(("cost", "pays"), [(1.5, True), (2.5, False)])
def test_a_measured_cost_decides_like_a_given_one(cost, pays):
    active, _ = simulate(Payoff(16, STEPS, trial=6), [2.0] * 60, cost=cost)
    assert not active[: payoff.IDLE_WINDOWS].any() and active[payoff.IDLE_WINDOWS : payoff.IDLE_WINDOWS + 6].all()
    assert active[payoff.IDLE_WINDOWS :].all() == pays


@pytest.mark.parametrize("moments", [Moments(0.0, 0.0, 0.0), Moments(1.0, 1.0, 5.0)])
def test_moments_that_tell_nothing_give_no_gain(moments):
    """All gradients zero, or a minibatch's square above all squares: no NaN, no infinity."""
    judge = Payoff(1, STEPS, trial=1, cost=1.0)
    state = judge.end_window(judge.observe(judge.init(), moments), 1.0)
    assert judge.gain(state) == 1.0


@pytest.mark.parametrize("method", ["systematic", "independent"])
def test_the_gain_of_minibatches_is_the_gain_of_all_gradients(method):
    """Moments of minibatches against Corollary 1 over all examples, with a mean gradient that is not small."""
    rng = np.random.default_rng(0)
    gradients = (rng.normal(0.4, 1, (300, 5)) * rng.lognormal(0, 1, (300, 1))).astype(np.float32)
    norms = np.linalg.norm(gradients, axis=1)
    v = norms * rng.lognormal(0, 0.3, 300).astype(np.float32)
    exact = variance.measure(
        norms, v, mean_v=v.mean(), mean_gradient_norm=np.linalg.norm(gradients.mean(0)), num_examples=300
    )

    def one(key):
        indices, importance_weights = sampling.draw(key, sampling.build_table(v), 16, method)
        mean = jnp.mean(importance_weights[:, None] * jnp.asarray(gradients)[indices], axis=0)
        return variance.minibatch_moments(jnp.asarray(norms)[indices], importance_weights, jnp.linalg.norm(mean))

    found = jax.jit(jax.vmap(one))(jax.random.split(jax.random.key(0), 20_000))
    judge = Payoff(16, steps=20_000, trial=1, cost=1.0)
    sums = Moments(*(float(np.sum(np.asarray(moment, np.float64))) for moment in found))
    state = judge.end_window(judge.observe(judge.init(), sums), 1.0)
    np.testing.assert_allclose(judge.gain(state), exact.gain, rtol=0.05)
