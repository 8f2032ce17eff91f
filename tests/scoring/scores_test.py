"""A score of another example, another label or another function turns these red."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from issgd_jax.scoring import scores
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
