"""Estimates of the noise scale against the mean and covariance of all examples' gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from issgd_jax.gradnorm import NoiseScale, average_noise_scale, noise_scale, value_grad_and_norms

RNG = np.random.default_rng(0)
GRADIENTS = RNG.normal(size=(50, 3)) * RNG.uniform(0.1, 3, (50, 1)) + np.array([0.5, -1, 0.2])
TRACE, SQUARED_NORM = np.sum(np.var(GRADIENTS, axis=0)), np.sum(np.mean(GRADIENTS, axis=0) ** 2)


def linear_loss(params, row):
    return jnp.sum(params["a"] * row[:1]) + jnp.sum(params["b"] * row[1:])


STEP = value_grad_and_norms(linear_loss)
PARAMS = {"a": jnp.zeros(1), "b": jnp.zeros(2)}


@pytest.mark.parametrize("batch_size", [2, 5])
@pytest.mark.parametrize("weighted", [False, True])
def test_both_estimates_are_unbiased(weighted, batch_size):
    """Red if one of B and B - 1, or a power of an importance weight, is wrong: the mean of many is then off."""
    probabilities = np.linalg.norm(GRADIENTS, axis=1) + 0.5 if weighted else np.ones(50)
    probabilities = probabilities / probabilities.sum()

    def estimate(key):
        rows = jax.random.choice(key, 50, (batch_size,), p=jnp.float32(probabilities))
        weights = jnp.float32(1 / (50 * probabilities))[rows]
        _, gradient, norms = STEP(PARAMS, weights, jnp.float32(GRADIENTS)[rows])
        return noise_scale(norms, gradient, weights if weighted else None)

    num = 40_000
    estimates = jax.jit(jax.vmap(estimate))(jax.random.split(jax.random.key(0), num))
    for values, expected in zip(np.asarray(estimates, np.float64), (TRACE, SQUARED_NORM)):
        assert abs(np.mean(values) - expected) < 4 * np.std(values) / np.sqrt(num)


def test_ones_are_no_importance_weights():
    """Red if the default differs from uniform draws."""
    _, gradient, norms = STEP(PARAMS, jnp.ones(6), jnp.float32(GRADIENTS[:6]))
    both = noise_scale(norms, gradient), noise_scale(norms, gradient, jnp.ones(6))
    assert both[0] == both[1]
    expected = np.sum(np.var(GRADIENTS[:6], axis=0, ddof=1))
    np.testing.assert_allclose(both[0].trace, expected, rtol=1e-5)
    np.testing.assert_allclose(both[0].squared_norm, np.sum(np.mean(GRADIENTS[:6], 0) ** 2) - expected / 6, rtol=1e-4)


def test_equal_gradients_have_no_noise():
    """Red if the two terms are not those of the same minibatch."""
    rows = jnp.tile(jnp.float32([[1, 2, 2]]), (4, 1))
    _, gradient, norms = STEP(PARAMS, jnp.ones(4), rows)
    estimate = noise_scale(norms, gradient)
    assert float(estimate.trace) == pytest.approx(0, abs=1e-5) and float(estimate.squared_norm) == pytest.approx(9)


def test_the_average_is_a_ratio_of_averages():
    """Red if ratios are averaged, or the start at zero shows in the ratio."""
    estimates = [NoiseScale(jnp.float32(t), jnp.float32(s)) for t, s in ((4, 2), (6, -1), (5, 2))]
    first = average_noise_scale(NoiseScale(), estimates[0])
    assert float(first.simple) == pytest.approx(2)

    def body(average, estimate):
        return average_noise_scale(average, estimate, 0.9), None

    start = NoiseScale(jnp.float32(0), jnp.float32(0))
    average, _ = jax.lax.scan(body, start, jax.tree.map(lambda *x: jnp.stack(x), *estimates))
    weights = np.array([0.81, 0.9, 1])
    assert float(average.simple) == pytest.approx(weights @ [4, 6, 5] / (weights @ [2, -1, 2]), rel=1e-5)


@pytest.mark.parametrize(
    ("message", "norms", "gradient", "importance_weights"),
    [
        (r"norms must have shape \[B\], of B >= 2 examples, .*got \(1,\)", jnp.ones(1), jnp.ones(3), None),
        ("norms must have shape", jnp.ones((2, 2)), jnp.ones(3), None),
        ("norms must have shape", jnp.float32(1), jnp.ones(3), None),
        (
            r"importance_weights must have the shape of norms, \(4,\), got \(3,\)",
            jnp.ones(4),
            jnp.ones(3),
            jnp.ones(3),
        ),
        ("gradient has no leaves", jnp.ones(4), {}, None),
    ],
)
def test_wrong_arguments_are_named(message, norms, gradient, importance_weights):
    with pytest.raises(ValueError, match=message):
        noise_scale(norms, gradient, importance_weights)


def test_a_minibatch_that_diverges_leaves_the_averages_as_they_are():
    """Red if one NaN stays in them for good, or the ratio before the first raises."""
    average = average_noise_scale(NoiseScale(), NoiseScale(6.0, 2.0))
    for bad in (NoiseScale(jnp.nan, 1.0), NoiseScale(1.0, jnp.inf)):
        assert average_noise_scale(average, bad) == average
    assert float(average.simple) == pytest.approx(3) and np.isnan(NoiseScale().simple)


def test_norms_per_leaf_are_refused():
    """Red if a pytree of norms reaches NumPy, or is taken for a batch."""
    with pytest.raises(ValueError, match=r"not be per leaf, got \{'a': \(4,\)"):
        noise_scale({"a": jnp.ones(4)}, jnp.ones(3))


@pytest.mark.parametrize("decay", [1.0, -0.1, float("nan")])
def test_a_decay_out_of_range_is_refused(decay):
    with pytest.raises(ValueError, match=r"decay must be in \[0, 1\), got"):
        average_noise_scale(NoiseScale(), NoiseScale(1.0, 1.0), decay)
