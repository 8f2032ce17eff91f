"""Linear regression on a few examples, and samplers that draw from a given table."""

import jax
import jax.numpy as jnp
import numpy as np

from issgd_jax.sampling import Sampler, Uniform

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


def drawing_from(table, batch_size=BATCH_SIZE, seed=0):
    """A sampler and its state that draws from `table`, its store empty."""
    sampler = Sampler(NUM_EXAMPLES, batch_size, Uniform())
    return sampler, sampler.init(seed).with_table(table)
