"""A score of another example, another label or another function turns these red."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from issgd_jax import config as config_lib
from issgd_jax import sampling
from issgd_jax.scoring import scores
from issgd_jax.task import images as images_lib
from issgd_jax.task import models
from issgd_jax.task.losses import example_loss

NUM_CLASSES = 4


@pytest.fixture
def problem():
    model = models.mlp(NUM_CLASSES, hidden_sizes=(8,))
    rng = np.random.default_rng(0)
    images = jnp.asarray(rng.normal(0, 1, (11, 3, 3, 1)), jnp.float32)
    labels = jnp.asarray(rng.integers(0, NUM_CLASSES, 11), jnp.int32)
    params = model.init(jax.random.key(0), images[0])
    return model, params, images, labels


def loss_of(model):
    return lambda params, image, label: example_loss(model.apply(params, image), label)


@pytest.mark.parametrize("microbatch_size", [None, 4])
def test_each_against_a_loop(problem, microbatch_size):
    model, params, images, labels = problem
    loss_fn = loss_of(model)

    def norm(image, label):
        leaves = jax.tree.leaves(jax.grad(loss_fn)(params, image, label))
        return np.sqrt(sum(np.sum(np.square(np.asarray(leaf, np.float64))) for leaf in leaves))

    def at_logits(image, label):
        gradient = jax.grad(example_loss)(model.apply(params, image), label)
        return np.linalg.norm(np.asarray(gradient, np.float64))

    functions = {
        "gradient_norm": (scores.GradientNorm(loss_fn, microbatch_size), norm),
        "loss": (scores.loss(loss_fn, microbatch_size), lambda *example: loss_fn(params, *example)),
        "last_layer": (scores.last_layer(model.apply, microbatch_size), at_logits),
        "any": (
            scores.PerExample(lambda params, image, label: jnp.max(image) ** 2 + label, microbatch_size),
            lambda image, label: np.max(np.asarray(image)) ** 2 + label,
        ),
    }
    for name, (function, one) in functions.items():
        found = jax.jit(function)(params, images, labels)
        assert found.dtype == jnp.float32
        np.testing.assert_allclose(found, [one(*example) for example in zip(images, labels)], rtol=1e-5, err_msg=name)


def test_scores_are_values(problem):
    """Equal ones are equal, so that they may be static arguments of compiled functions."""
    loss_fn = loss_of(problem[0])
    assert scores.GradientNorm(loss_fn, 3) == scores.GradientNorm(loss_fn, 3) != scores.GradientNorm(loss_fn)
    assert hash(scores.loss(loss_fn)) == hash(scores.PerExample(loss_fn))


@pytest.mark.parametrize("name", models.MODELS)
def test_a_network_computes_in_the_type_of_its_parameters(name):
    """Red if pixels, or a state that begins as float32, keep a network in float32 while workers score in bfloat16."""
    config, mean = config_lib.default(), np.full((8, 8, 1), 100, np.float32)
    config.model.name = name
    objective = images_lib.make_objective(config, NUM_CLASSES, mean, mean)
    params = jax.eval_shape(objective.init, jax.random.key(0))
    image, label = jax.ShapeDtypeStruct((8, 8, 1), np.uint8), jax.ShapeDtypeStruct((), np.int32)
    for dtype in (jnp.float32, jnp.bfloat16):
        cast = jax.tree.map(lambda x, dtype=dtype: jax.ShapeDtypeStruct(x.shape, dtype), params)
        assert jax.eval_shape(objective.logits_fn, cast, image).dtype == dtype
        assert jax.eval_shape(objective.loss_fn, cast, image, label).dtype == jnp.float32


def test_bfloat16_scores_are_close_and_draws_by_them_unbiased(problem):
    """Red if examples or parameters are not cast, labels are, or what is drawn is weighted by other scores."""
    model, params, images, labels = problem
    score_fn = scores.GradientNorm(loss_of(model))
    exact, half = (
        jax.jit(function)(params, images, labels) for function in (score_fn, scores.InPrecision(score_fn, "bfloat16"))
    )
    assert half.dtype == jnp.float32
    np.testing.assert_allclose(half, exact, rtol=0.05)
    assert np.max(np.abs(half / exact - 1)) > 1e-4
    table = sampling.build_table(half)
    keys = jax.random.split(jax.random.key(0), 20_000)
    drawn = jax.jit(jax.vmap(lambda key: sampling.draw(key, table, 4)))(keys)
    estimates = np.asarray(jnp.mean(drawn.importance_weights * exact[drawn.indices], axis=1), np.float64)
    assert abs(np.mean(estimates) - np.mean(exact)) < 4 * np.std(estimates) / np.sqrt(len(keys))


def test_a_loss_keeps_the_digits_of_a_confident_network():
    """Red if probabilities near one are rounded to bfloat16: this gradient would be zero."""
    logits = jnp.array([8.0, 0.0], jnp.bfloat16)
    gradient = jax.grad(example_loss)(logits, jnp.int32(0))
    np.testing.assert_allclose(np.asarray(gradient, np.float32), np.array([-1, 1]) / (1 + np.exp(8)), rtol=1e-2)
