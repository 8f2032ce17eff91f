"""Theorem 1 and Corollary 1 against brute force: a wrong v, a missing mean or a biased ||g||^2 turns these red."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import issgd_jax
from issgd_jax.learning import variance


def gradients(num_examples, dimension=4, seed=0):
    rng = np.random.default_rng(seed)
    return (rng.normal(0.5, 1, (num_examples, dimension)) * rng.lognormal(0, 1, (num_examples, 1))).astype(np.float32)


def brute_force_trace(g, v):
    """Trace of the covariance matrix of `mean(v) / v_n * g_n` with n drawn in proportion to v, from its definition."""
    g, v = g.astype(np.float64), v.astype(np.float64)
    q = v / v.sum()
    estimates = (v.mean() / v)[:, None] * g
    mean = q @ estimates
    covariance = sum(q_n * np.outer(e - mean, e - mean) for q_n, e in zip(q, estimates, strict=True))
    return np.trace(covariance)


def measure(g, v, mean_v=None, num_examples=None):
    return variance.measure(
        np.linalg.norm(g, axis=1),
        v,
        mean_v=v.mean() if mean_v is None else mean_v,
        mean_gradient_norm=np.linalg.norm(g.mean(0)),
        num_examples=num_examples or len(g),
    )


@settings(deadline=None, max_examples=30)
@given(num_examples=st.integers(2, 20), seed=st.integers(0, 10**6))
def test_corollary_1_equals_the_covariance_by_brute_force(num_examples, seed):
    g = gradients(num_examples, seed=seed)
    v = np.random.default_rng(seed + 1).lognormal(0, 1, num_examples).astype(np.float32)
    norms = np.linalg.norm(g, axis=1)
    measured = measure(g, v)
    scale = 1e-4 * np.sqrt(np.mean(norms**2) * max(1, v.mean() * np.mean(1 / v)))  # of the terms that are subtracted
    for value, proposal in ((measured.uniform, np.ones(num_examples)), (measured.actual, v), (measured.ideal, norms)):
        np.testing.assert_allclose(value, np.sqrt(brute_force_trace(g, proposal)), rtol=1e-3, atol=10 * scale)


def test_the_ideal_proposal_has_the_least_variance_of_all_tried():
    g = gradients(30)
    norms = np.linalg.norm(g, axis=1)
    least = brute_force_trace(g, norms)
    rng = np.random.default_rng(1)
    tried = [norms**p for p in (0, 0.5, 0.9, 1.1, 2)] + [norms + c for c in (0.01, 1, 10)]
    tried += [norms * rng.lognormal(0, s, 30) for s in np.repeat([0.01, 0.1, 1.0], 50)]
    ideal = float(measure(g, norms).ideal)
    assert all(float(measure(g, v.astype(np.float32)).actual) > ideal * (1 - 1e-5) for v in tried)
    assert all(brute_force_trace(g, v) > least for v in tried)
    assert np.isclose(measure(g, norms).ideal ** 2, least, rtol=1e-4)
    assert np.isclose(measure(g, norms).actual ** 2, least, rtol=1e-4)


def test_a_subset_is_unbiased_over_all_subsets():
    """The paper's code squared a noisy mean, which is biased up; averaged over every subset, this must be exact."""
    g = gradients(9, seed=2)
    v = np.random.default_rng(3).lognormal(0, 0.5, 9).astype(np.float32)
    subsets = [list(s) for s in itertools.combinations(range(9), 4)]
    norms_square_sum = np.linalg.norm(g, axis=1)
    traces = []
    for s in subsets:
        measured = measure(g[s], v[s], mean_v=v.mean(), num_examples=9)
        traces.append([float(measured.uniform) ** 2, float(measured.actual) ** 2, float(measured.ideal) ** 2])
        assert min(traces[-1]) > 0  # not clipped at zero, which would hide a bias
    expected = [brute_force_trace(g, p) for p in (np.ones(9), v, norms_square_sum)]
    np.testing.assert_allclose(np.mean(traces, axis=0), expected, rtol=1e-4)


@pytest.mark.parametrize("draw", ["shuffled", "stride"])
def test_the_noise_of_a_window_is_that_of_minibatches_drawn(draw):
    """Red if the monitor takes minibatches that balance each other for independent ones."""
    num_examples, batch_size, steps = 400, 4, 6000
    g = gradients(num_examples)
    norms = np.linalg.norm(g, axis=1)
    proposal = issgd_jax.Uniform() if draw == "shuffled" else issgd_jax.Mixture(issgd_jax.Proportional(0.0), 0.3)
    sampler = issgd_jax.Sampler(num_examples, batch_size, proposal, draw, rebuild_every=0)
    state = sampler.ingest(sampler.init(0), np.arange(num_examples), norms, 0)

    def step(state, _):
        state, drawn = sampler.draw(state)
        mean = jnp.mean(drawn.importance_weights[:, None] * jnp.asarray(g)[drawn.indices], axis=0)
        return sampler.update(state, drawn, None), mean

    state, means = jax.lax.scan(step, state, None, length=steps)
    means = np.asarray(means)[steps // 2 :]
    windows = means[: len(means) // variance.WINDOW * variance.WINDOW].reshape(-1, variance.WINDOW, g.shape[1]).mean(1)
    window = variance.WINDOW * batch_size
    measured = variance.measure(
        norms,
        state.table.v() if state.visits is None else state.visits.v(),
        mean_v=state.table.mean_v if state.visits is None else state.visits.mean_v,
        mean_gradient_norm=np.linalg.norm(g.mean(0)),
        num_examples=num_examples,
        strides=jnp.full(num_examples, 1.0 * num_examples) if state.visits is None else state.visits.strides() * 1.0,
        window=window,
    )
    np.testing.assert_allclose(measured.window, np.sqrt(window * np.var(windows, axis=0).sum()), rtol=0.1)
    np.testing.assert_allclose(measured.actual, np.sqrt(batch_size * np.var(means, axis=0).sum()), rtol=0.1)
    assert measured.window < 0.97 * measured.actual


def test_independent_minibatches_do_not_balance_each_other():
    """Red if the column of windows says less than that of single minibatches where nothing is balanced."""
    g = gradients(12)
    measured = measure(g, np.linalg.norm(g, axis=1))
    assert measured.window == measured.actual > 0


def test_gain_is_the_ratio_of_traces_and_one_without_noise():
    g = gradients(12)
    measured = measure(g, np.linalg.norm(g, axis=1))
    np.testing.assert_allclose(measured.gain, measured.uniform**2 / measured.actual**2, rtol=1e-5)
    still = measure(np.ones((5, 2), np.float32), np.ones(5, np.float32))
    assert still.uniform == still.actual == 0 and still.gain == 1


def test_the_noise_of_a_window_of_large_data():
    """Red if N times the window has to fit 32 bits: a run on ImageNet would end at its first measurement."""
    norms, num_examples, window = jnp.array([1.0, 3.0]), 1_281_167, 2560
    measured = variance.measure(
        norms, norms, mean_v=jnp.float32(2), mean_gradient_norm=jnp.float32(0), num_examples=num_examples,
        strides=jnp.full(2, float(num_examples)), window=window,
    )  # fmt: skip
    share = window / num_examples
    assert float(measured.window) ** 2 == pytest.approx(10 * (1 - share), rel=1e-3)


@pytest.mark.parametrize(("size", "num_examples"), [(1, 5), (6, 5)])
def test_sample_size_must_fit(size, num_examples):
    with pytest.raises(ValueError, match=f"2 <= M <= {num_examples}"):
        measure(gradients(size), np.ones(size, np.float32), num_examples=num_examples)
