"""The registry of networks, and layers that several of them use."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from tests.gradnorm.helpers import scalar_loss

B = 3
TOKENS = np.array([[1, 4, 4, 0, 4], [2, 2, 2, 2, 2], [0, 1, 2, 3, 5]])
ARCHITECTURES = {}


def architecture(build):
    """Registers `build(draw) -> (apply, params, *batch)`, where `draw(*shape)` returns random numbers."""
    ARCHITECTURES[build.__name__] = build
    return build


@functools.cache
def problem(name):
    """Returns `(loss_fn, params, importance_weights, batch)` in float32."""
    rng = np.random.default_rng(0)
    apply, params, *batch = ARCHITECTURES[name](lambda *shape: rng.normal(scale=0.5, size=shape).astype(np.float32))
    importance_weights = rng.uniform(0.1, 3, B).astype(np.float32)
    return (lambda p, *example: scalar_loss(apply(p, *example))), params, importance_weights, batch


def dense(p, x):
    return x @ p["w"] + p["b"]


def attention(q, k, v, bias=0):
    """q, k, v: [T, heads, size]. Returns [T, heads·size]."""
    weights = jax.nn.softmax(jnp.einsum("thd,shd->hts", q, k) + bias)
    return jnp.einsum("hts,shd->thd", weights, v).reshape(len(q), -1)


def like(draw, tree):
    """Random parameters in place of initial ones: a zero bias would hide a wrong factor."""
    return jax.tree.map(lambda x: draw(*x.shape), tree)


def linen(draw, module, *batch):
    """A flax module for one example: `module(dtype)`, since a recurrent cell does not take its state's dtype from x."""
    params = jax.eval_shape(module(np.float32).init, jax.random.key(0), *(x[0] for x in batch))
    return lambda p, *x: module(x[0].dtype).apply(p, *x), like(draw, params), *batch
