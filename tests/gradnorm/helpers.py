"""Losses, reference computations and comparisons that several tests of gradient norms use."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from issgd_jax.gradnorm import per_example_grad_norms, value_grad_and_norms
from issgd_jax.task import losses, models

SHAPES = {"mlp": (6, 5, 2), "convnet": (8, 8, 3), "gru": (7, 4, 1), "transformer": (8, 8, 1)}
OPTIONS = {
    "mlp": {"hidden_sizes": (16, 8)},
    "convnet": {"channels": (4, 6), "dense_size": 8},
    "gru": {"units": 8},
    "transformer": {"num_layers": 1, "width": 8, "num_heads": 2},
}
# The programs are tiny: nearly all the time is spent on compiling them.
QUICK = {"xla_backend_optimization_level": 0}


@functools.cache
def model_loss(name):
    """Returns `(loss_fn, jitted init)` of a small network of `models.MODELS`."""
    model = models.MODELS[name](10, **OPTIONS[name])
    return lambda p, image, label: losses.example_loss(model.apply(p, image), label), jax.jit(model.init)


@functools.cache
def model_problem(name, size):
    """Returns `(loss_fn, params, images, labels)` of a small network and `size` random examples."""
    loss_fn, init = model_loss(name)
    rng = np.random.default_rng(0)
    images = rng.normal(size=(size, *SHAPES[name])).astype(np.float32)
    labels = rng.integers(0, 10, size).astype(np.int32)
    return loss_fn, init(jax.random.key(0), images[0]), images, labels


@functools.cache
def jitted_grad(loss_fn):
    return jax.jit(jax.grad(loss_fn))


def loop_norms(loss_fn, params, *batch):
    """Returns norms by definition: one gradient at a time, its norm in float64 on the host."""
    norms = []
    for i in range(len(batch[0])):
        leaves = jax.tree.leaves(jitted_grad(loss_fn)(params, *(x[i] for x in batch)))
        norms.append(np.sqrt(sum(np.sum(np.asarray(leaf, np.float64) ** 2) for leaf in leaves)))
    return np.array(norms)


def scalar_loss(y):
    """Returns a loss whose gradient differs for every entry of y."""
    return jnp.sum(jnp.sin(y.ravel() + jnp.linspace(0, 3, y.size, dtype=y.dtype)))


def normalized(x, axis=-1):
    return (x - jnp.mean(x, axis, keepdims=True)) * lax.rsqrt(jnp.var(x, axis, keepdims=True) + 0.1)


def cast(tree, dtype):
    return jax.tree.map(lambda x: x.astype(dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x, tree)


def reference(loss_fn, params, importance_weights, batch):
    """Returns losses, weighted gradient, norms per leaf and norms by definition: one float64 gradient at a time."""
    with jax.enable_x64(True):
        params, batch = cast((params, batch), np.float64)
        step = jax.jit(jax.value_and_grad(loss_fn), compiler_options=QUICK)
        examples = [jax.tree.map(lambda x, i=i: x[i], batch) for i in range(len(importance_weights))]
        losses, gradients = zip(*(step(params, *example) for example in examples))
    stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *gradients)
    gradient = jax.tree.map(lambda g: np.tensordot(importance_weights, g, 1) / len(importance_weights), stacked)
    per_leaf = jax.tree.map(lambda g: np.sqrt(np.sum(g**2, tuple(range(1, g.ndim)))), stacked)
    return np.stack(losses), gradient, per_leaf, np.sqrt(sum(n**2 for n in jax.tree.leaves(per_leaf)))


def transformed(loss_fn, params, importance_weights, batch, dtype):
    """Returns the same as `reference`, from one pass with the gradient and one for the norms alone."""

    @functools.partial(jax.jit, compiler_options=QUICK)
    def both(params, importance_weights, batch):
        with_gradient = value_grad_and_norms(loss_fn, per_leaf=True)(params, importance_weights, *batch)
        return *with_gradient, per_example_grad_norms(loss_fn)(params, *batch)

    with jax.enable_x64(dtype == np.float64):
        results = jax.device_get(both(*cast((params, importance_weights, batch), dtype)))
    assert {x.dtype for x in jax.tree.leaves(results)} == {np.dtype(dtype)}
    return results


def assert_close(results, expected, rtol, floor):
    """Compares norms to rtol; losses, norms per leaf and gradient also to `floor` of a loss of 1 or of the norm."""
    (losses, gradient, per_leaf, norms), (*_, whole) = results, expected
    np.testing.assert_allclose(losses, expected[0], rtol, floor, err_msg="losses")
    np.testing.assert_allclose(norms, whole, rtol, err_msg="norms")
    assert jax.tree.structure((gradient, per_leaf)) == jax.tree.structure(expected[1:3])
    for (path, e), g in zip(jax.tree.leaves_with_path(expected[1]), jax.tree.leaves(gradient)):
        np.testing.assert_allclose(g, e, rtol, floor * np.max(whole), err_msg=f"gradient of {path}")
    unit = np.maximum(whole, np.finfo(rtol).tiny)
    for (path, e), n in zip(jax.tree.leaves_with_path(expected[2]), jax.tree.leaves(per_leaf)):
        np.testing.assert_allclose(n / unit, e / unit, rtol, floor, err_msg=f"norms of {path}")
