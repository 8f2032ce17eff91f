"""Each fast norm against a Python loop of `jax.grad`; a dropped leaf, example or square root turns these red."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from issgd_jax import losses, models
from issgd_jax.gradnorm import per_example_grad_norms

SHAPES = {"mlp": (6, 5, 2), "convnet": (8, 8, 3), "gru": (7, 4, 1), "transformer": (8, 8, 1)}
OPTIONS = {
    "mlp": {"hidden_sizes": (16, 8)},
    "convnet": {"channels": (4, 6), "dense_size": 8},
    "gru": {"units": 8},
    "transformer": {"num_layers": 1, "width": 8, "num_heads": 2},
}


def loop(loss_fn, params, *batch):
    """The definition: one gradient at a time, its norm in float64 on the host."""
    grad = jax.jit(jax.grad(loss_fn))
    norms = []
    for i in range(len(batch[0])):
        leaves = jax.tree.leaves(grad(params, *(x[i] for x in batch)))
        norms.append(np.sqrt(sum(np.sum(np.asarray(leaf, np.float64) ** 2) for leaf in leaves)))
    return np.array(norms)


def problem(name, size, seed=0):
    model = models.MODELS[name](10, **OPTIONS[name])
    rng = np.random.default_rng(seed)
    images = rng.normal(size=(size, *SHAPES[name])).astype(np.float32)
    labels = rng.integers(0, 10, size).astype(np.int32)
    params = model.init(jax.random.key(seed), images[0])
    return lambda p, image, label: losses.example_loss(model.apply(p, image), label), params, images, labels


@pytest.mark.parametrize("name", models.MODELS)
def test_equals_a_loop_for_every_model(name):
    loss_fn, params, images, labels = problem(name, 13)
    norms = jax.jit(per_example_grad_norms(loss_fn, microbatch_size=4))(params, images, labels)
    np.testing.assert_allclose(norms, loop(loss_fn, params, images, labels), rtol=1e-5)


@settings(deadline=None, max_examples=25)
@given(size=st.integers(1, 9), microbatch=st.integers(1, 12), width=st.integers(1, 5), seed=st.integers(0, 99))
def test_any_batch_and_microbatch_size(size, microbatch, width, seed):
    rng = np.random.default_rng(seed)
    params = {"w": rng.normal(size=(width, 3)).astype(np.float32), "unused": np.ones(2, np.float32)}
    x = rng.normal(size=(size, width)).astype(np.float32)

    def loss_fn(p, row):
        return jnp.sum(jnp.tanh(row @ p["w"]) ** 2)

    norms = per_example_grad_norms(loss_fn, microbatch_size=microbatch)(params, x)
    np.testing.assert_allclose(norms, loop(loss_fn, params, x), rtol=1e-5, atol=1e-7)


def test_parameters_larger_than_the_memory_bound_go_one_example_at_a_time(monkeypatch):
    monkeypatch.setattr("issgd_jax.gradnorm.norms.MICROBATCH_BYTES", 16)
    loss_fn, params, images, labels = problem("mlp", 3)
    np.testing.assert_allclose(
        per_example_grad_norms(loss_fn)(params, images, labels), loop(loss_fn, params, images, labels), rtol=1e-5
    )


def test_bfloat16_sums_in_float32():
    # A sum of 4,096 ones stops at 256 in bfloat16.
    norms = per_example_grad_norms(lambda p, x: jnp.sum(p * x))(
        jnp.ones(4096, jnp.bfloat16), jnp.ones((2, 4096), jnp.bfloat16)
    )
    assert norms.dtype == jnp.float32
    np.testing.assert_array_equal(norms, [64, 64])


def test_a_zero_gradient_has_norm_zero():
    norms = per_example_grad_norms(lambda p, x: jnp.sum(p * x))(jnp.ones(3), jnp.zeros((2, 3)))
    np.testing.assert_array_equal(norms, [0, 0])


def test_a_dictionary_batch_and_any_pytree_of_parameters():
    params = {"a": [jnp.ones(3), jnp.ones(())]}
    batch = {"x": jnp.arange(6.0).reshape(2, 3)}
    norms = per_example_grad_norms(lambda p, e: p["a"][0] @ e["x"] + 2 * p["a"][1])(params, batch)
    np.testing.assert_allclose(norms, np.sqrt(np.sum(np.arange(6.0).reshape(2, 3) ** 2, 1) + 4), rtol=1e-6)


@pytest.mark.parametrize(
    ("error", "message", "loss_fn", "params", "batch"),
    [
        (ValueError, r"scalar.*\(3,\)", lambda p, x: p * x, jnp.ones(3), (jnp.ones((2, 3)),)),
        (
            ValueError,
            "differ in their leading axis",
            lambda p, x, y: p @ x,
            jnp.ones(3),
            (jnp.ones((2, 3)), jnp.ones(4)),
        ),
        (ValueError, r"at least one example.*\(0, 3\)", lambda p, x: p @ x, jnp.ones(3), (jnp.ones((0, 3)),)),
        (ValueError, "at least one example", lambda p, x: p @ p, jnp.ones(3), (jnp.float32(1),)),
        (ValueError, "at least one example", lambda p: p @ p, jnp.ones(3), ()),
        (
            TypeError,
            r"params\['w'\] has dtype int32",
            lambda p, x: p["w"] @ x,
            {"w": jnp.ones(3, jnp.int32)},
            (jnp.ones((2, 3)),),
        ),
    ],
)
def test_bad_input_is_named(error, message, loss_fn, params, batch):
    with pytest.raises(error, match=message):
        per_example_grad_norms(loss_fn)(params, *batch)


def test_microbatch_size_must_be_positive():
    with pytest.raises(ValueError, match="microbatch_size must be >= 1, got 0"):
        per_example_grad_norms(lambda p, x: p @ x, microbatch_size=0)


def test_stands_inside_other_transformations():
    loss_fn, params, images, labels = problem("mlp", 6)
    norms_fn = per_example_grad_norms(loss_fn)
    expected = loop(loss_fn, params, images, labels)
    shards = images.reshape(2, 3, *images.shape[1:]), labels.reshape(2, 3)
    vmapped = jax.vmap(norms_fn, in_axes=(None, 0, 0))(params, *shards)
    np.testing.assert_allclose(vmapped.reshape(-1), expected, rtol=1e-5)
    gradient = jax.grad(lambda p: jnp.sum(norms_fn(p, images, labels)))(params)
    assert np.isfinite(optax.tree.norm(gradient))
