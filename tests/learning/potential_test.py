"""What importance sampling could gain: estimates against gradients that are known, verdicts, and bad input."""

import jax.numpy as jnp
import numpy as np
import pytest

import issgd_jax
from issgd_jax.learning.potential import Estimate, Potential

RNG = np.random.default_rng(0)
# The gradient of x · params is x itself.
LONG_TAILED = (RNG.standard_t(3, (4096, 6)) * RNG.lognormal(0, 1, (4096, 1)) + 0.3).astype(np.float32)
EQUAL = np.stack([np.cos(t := np.linspace(0, 20, 4096)), np.sin(t)], axis=1).astype(np.float32)


def linear(params, x):
    return jnp.sum(params * x)


def measured(x, **changes):
    options = {"batch_size": 64, "sample": 4096} | changes
    return issgd_jax.potential(linear, jnp.zeros(x.shape[1]), x, **options)


def test_all_examples_give_the_numbers_of_corollary_1():
    """Red if the square of the true gradient is forgotten, or noise is that of one example instead of a minibatch."""
    found = measured(LONG_TAILED)
    norms, mean = np.linalg.norm(LONG_TAILED, axis=1), np.linalg.norm(LONG_TAILED.mean(0))
    uniform, ideal = np.mean(norms**2) - mean**2, np.mean(norms) ** 2 - mean**2
    np.testing.assert_allclose(found.uniform.value, np.sqrt(uniform), rtol=1e-2)
    np.testing.assert_allclose(found.ideal.value, np.sqrt(ideal), rtol=1e-2)
    np.testing.assert_allclose(found.gain.value, uniform / ideal, rtol=2e-2)
    np.testing.assert_allclose(found.noise_share.value, uniform / 64 / (uniform / 64 + mean**2), rtol=0.1)


def test_intervals_hold_the_numbers_of_all_examples():
    """Red if the bootstrap draws the same examples each time, or of parts that it pairs with themselves."""
    whole = measured(LONG_TAILED)
    samples = [measured(LONG_TAILED, sample=512, seed=seed) for seed in range(20)]
    for name in ("uniform", "ideal", "noise_share"):
        intervals = [getattr(found, name) for found in samples]
        assert all(low < value < high for value, low, high in intervals)
        inside = sum(low < getattr(whole, name).value < high for _, low, high in intervals)
        assert inside >= 14, f"{name}: {inside} of 20"


@pytest.mark.parametrize(
    ("gain", "noise_share", "cost", "verdict"),
    [
        ((3, 2.5, 4), 0.8, (1.1, 1.0, 1.2), "is worth a try"),
        ((1.6, 1.4, 1.8), 0.9, (1.1, 1.0, 1.2), "would not help these parameters"),  # perhaps below the least gain
        ((9, 8, 10), 0.1, (1.1, 1.0, 1.2), "would not help with this minibatch"),
        ((3, 2.5, 4), 0.6, (2.0, 1.5, 2.5), "would cost more than it saves"),  # removes 40 %, costs 50 % at least
        ((3, 2.5, 4), 0.6, (2.0, 1.3, 2.5), "is worth a try"),
    ],
)
def test_verdicts(gain, noise_share, cost, verdict):
    """Red if what is not worth a try is called so, or the other way round, or intervals are not heeded."""
    one, cost = Estimate(1.0, 1.0, 1.0), Estimate(*cost)
    found = Potential(one, one, Estimate(*gain), Estimate(noise_share, 0, 1), one, cost, batch_size=64)
    assert found.verdict.startswith(f"Importance sampling {verdict}")
    assert found.verdict.count(". ") == 1 and found.verdict in str(found)


def test_gradients_that_differ_in_length_alone_gain_without_limit():
    """Red if an ideal without variance counts as no gain."""
    one_direction = RNG.lognormal(0, 2, (4096, 1)).astype(np.float32) * np.ones(3, np.float32)
    found = measured(one_direction, batch_size=2)
    assert found.gain.value > 100 and found.gain.low > 10 and found.gain.high == np.inf
    assert "similar length" not in found.verdict and not np.isnan(found.removable_share)


def test_gradients_of_one_length_gain_nothing():
    """Red if a verdict does not follow from what was measured."""
    assert "would not help these parameters" in measured(EQUAL).verdict


def test_the_same_seed_measures_the_same_sample():
    """Red if anything but the times depends on more than the seed."""
    one, two = (measured(LONG_TAILED, sample=256, seed=3) for _ in range(2))
    assert (one.uniform, one.gain, one.noise_share) == (two.uniform, two.gain, two.noise_share)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 0}, "batch_size must be a whole number between 1 and 40, the number of examples, got 0"),
        ({"batch_size": 41}, "batch_size must be .* got 41"),
        ({"batch_size": 2.5}, "batch_size must be .* got 2.5"),
        ({"sample": 15}, "sample must be a whole number >= 16, got 15"),
        ({"x": np.ones((15, 2), np.float32), "batch_size": 4}, "the number of examples must be .* >= 16, got 15"),
        ({"x": np.full((40, 2), np.nan, np.float32)}, "40 of 40 gradients are not finite: pass parameters"),
    ],
)
def test_bad_input(changes, message):
    options = {"x": LONG_TAILED[:40], "batch_size": 8} | changes
    with pytest.raises(ValueError, match=message):
        measured(options.pop("x"), **options)
