"""Gradients of draws with a limit, against their definition: each example's gradient formed, weighted and added."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from issgd_jax.gradnorm import value_grad_and_norms
from issgd_jax.limits import LimitedWeights, limit_weights
from issgd_jax.task import models
from tests.gradnorm.clipping_test import PARAMS, X, assert_close, formed_gradients, lengths, loss_fn
from tests.gradnorm.helpers import model_problem
from tests.gradnorm.norms_test import tied_problem

WEIGHTS = jnp.float32([0.5, 3.0, 1.0, 0.0, 2.0, 0.1])


def limited(importance_weights, limit):
    return LimitedWeights(importance_weights, jnp.float32(limit))


@pytest.mark.parametrize("microbatch_size", [None, 3])
@pytest.mark.parametrize("name", [*models.MODELS, "tied"])
def test_equals_the_mean_of_gradients_whose_weighted_norms_are_limited(name, microbatch_size):
    """Red if weights are lowered by the norm of one leaf, of one microbatch's place, or twice."""
    loss_fn, params, *batch = tied_problem(size=7) if name == "tied" else model_problem(name, 7)
    weights = np.random.default_rng(0).uniform(0.2, 4, 7).astype(np.float32)
    gradients = formed_gradients(loss_fn, params, *batch)
    whole = np.sqrt(sum(n**2 for n in jax.tree.leaves(lengths(gradients))))
    limit = np.median(weights * whole)
    lowered = np.minimum(weights, limit / whole)
    assert 0 < np.sum(lowered < weights) < 7
    expected = jax.tree.map(lambda g: np.tensordot(lowered, g, 1) / 7, gradients)
    for per_leaf in (False, True):
        grad_fn = value_grad_and_norms(loss_fn, per_leaf=per_leaf, microbatch_size=microbatch_size)
        _, gradient, norms = grad_fn(params, limited(jnp.asarray(weights), limit), *batch)
        assert_close(gradient, expected)
        found = np.sqrt(sum(np.square(x) for x in jax.tree.leaves(norms))) if per_leaf else norms
        np.testing.assert_allclose(found, whole, rtol=2e-5)


@pytest.mark.parametrize("limit", [jnp.inf, 1e30, jnp.nan])
def test_a_limit_that_no_norm_reaches_lowers_nothing(limit):
    _, gradient, _ = value_grad_and_norms(loss_fn)(PARAMS, limited(WEIGHTS, limit), X)
    assert_close(gradient, value_grad_and_norms(loss_fn)(PARAMS, WEIGHTS, X)[1], 1e-6)


def test_an_example_that_is_not_finite_is_not_hidden_by_the_limit():
    """Red if a gradient of NaN is scaled away, so that nothing tells of it."""
    losses, gradient, norms = value_grad_and_norms(loss_fn)(PARAMS, limited(WEIGHTS, 0.1), X.at[1].set(jnp.nan))
    assert np.isnan(losses[1]) and not np.isfinite(norms[1])
    assert all(np.isnan(leaf).any() for leaf in jax.tree.leaves(gradient))


def test_weights_of_another_length_are_refused():
    with pytest.raises(ValueError, match=r"importance_weights, the second argument, must have shape \(6,\)"):
        value_grad_and_norms(loss_fn)(PARAMS, limited(WEIGHTS[:5], 1.0), X)


def test_works_inside_jit_and_vmap():
    """Red if a limit is compiled in, or is shared by several networks."""
    limits = jnp.float32([0.3, 30.0])
    grad_fn = value_grad_and_norms(loss_fn)
    both = jax.jit(jax.vmap(lambda limit: grad_fn(PARAMS, LimitedWeights(WEIGHTS, limit), X)))(limits)
    for i, limit in enumerate(limits):
        alone = grad_fn(PARAMS, limited(WEIGHTS, limit), X)
        jax.tree.map(lambda x, y, i=i: np.testing.assert_allclose(x[i], y, rtol=1e-5, atol=1e-6), both, alone)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16, np.float64])
def test_weights_norms_and_limit_may_be_of_several_types(dtype):
    """Red where they meet, also where nothing is promoted; with the limit and without."""
    if dtype == np.float64 and not jax.config.jax_enable_x64:
        pytest.skip("64-bit types are for `make variants`")
    params, x = jax.tree.map(lambda leaf: leaf.astype(dtype), PARAMS), X.astype(dtype)
    grad_fn = value_grad_and_norms(lambda p, x: jnp.sum(jnp.tanh(x @ p["w"])))
    for weights in (limited(WEIGHTS, 0.5), WEIGHTS):
        with jax.numpy_dtype_promotion("strict"):
            _, gradient, norms = grad_fn(params, weights, x)
        assert gradient["w"].dtype == dtype and np.all(np.isfinite(norms.astype(np.float32)))


def test_what_is_no_array_is_not_taken_for_one():
    """Red if full weights can be multiplied with losses, or summed, where the gradient has the lowered ones."""
    wrong = [
        lambda w: w * jnp.ones(6), lambda w: jnp.ones(6) * w, lambda w: np.ones(6) * w, lambda w: 2.0 * w,
        lambda w: jnp.mean(w), lambda w: jnp.asarray(w), lambda w: np.asarray(w, np.float32), lambda w: w[0],
        lambda w: w / jnp.ones(6), lambda w: 1 / w, lambda w: w + 1, lambda w: 1 - w, len, float, lambda w: w**2,
    ]  # fmt: skip
    for use in wrong:
        with pytest.raises(TypeError, match=r"get their values by importance_weights.lowered\(norms\)"):
            use(limited(WEIGHTS, 1.0))


def test_weights_are_lowered_where_they_must_be_and_nowhere_else():
    """Red if an overflow of weight times norm, or a norm that is none, escapes or becomes NaN."""
    weights = jnp.float32([2.0, 2.0, 3e38, 0.0, 1.0, 1.0, -1.0])
    norms = jnp.float32([1.0, 10.0, 10.0, 1e30, jnp.nan, jnp.inf, 100.0])
    lowered = limit_weights(weights, norms, jnp.float32(5.0))
    np.testing.assert_array_equal(lowered, jnp.float32([2.0, 0.5, 0.5, 0.0, 1.0, 1.0, -1.0]))
