"""Wrong arguments are named, before anything is compiled."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from issgd_jax.gradnorm import per_example_grad_norms, value_grad_and_norms


@pytest.mark.parametrize(
    ("error", "message", "loss_fn", "params", "batch"),
    [
        (ValueError, r"one floating-point scalar.*\(3,\)", lambda p, x: p * x, jnp.ones(3), (jnp.ones((2, 3)),)),
        (ValueError, "got a tuple; set has_aux=True", lambda p, x: (p @ x, x), jnp.ones(3), (jnp.ones((2, 3)),)),
        (ValueError, "got a dict", lambda p, x: {"loss": p @ x}, jnp.ones(3), (jnp.ones((2, 3)),)),
        (ValueError, "got a NoneType", lambda p, x: None, jnp.ones(3), (jnp.ones((2, 3)),)),
        (ValueError, "dtype int32", lambda p, x: 1, jnp.ones(3), (jnp.ones((2, 3)),)),
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
            r"params\['w'\] has dtype int32 and shape \(3,\)",
            lambda p, x: p["w"] @ x,
            {"w": jnp.ones(3, jnp.int32)},
            (jnp.ones((2, 3)),),
        ),
    ],
)
def test_bad_input_is_named(error, message, loss_fn, params, batch):
    with pytest.raises(error, match=message):
        per_example_grad_norms(loss_fn)(params, *batch)


@pytest.mark.parametrize("transform", [per_example_grad_norms, value_grad_and_norms])
def test_microbatch_size_must_be_positive(transform):
    for size in (0, 2.5):
        with pytest.raises(ValueError, match=f"microbatch_size must be >= 1, and a whole number, got {size}"):
            transform(lambda p, x: p @ x, microbatch_size=size)


@pytest.mark.parametrize("importance_weights", [None, 1.0, np.ones(3, np.float32), np.ones((2, 1), np.float32)])
def test_importance_weights_of_another_shape_are_refused(importance_weights):
    with pytest.raises(ValueError, match=r"importance_weights, .* shape \(2,\).* got .*: pass jnp.ones\(2\)"):
        value_grad_and_norms(lambda p, x: p @ x)(jnp.ones(3), importance_weights, jnp.ones((2, 3)))


def test_importance_weights_that_are_forgotten_or_elsewhere_are_told_of():
    """Red if the loss is traced with arguments that are one place off, and its own error hides what is wrong."""
    step = value_grad_and_norms(lambda p, x, y: p @ x - y)
    with pytest.raises(ValueError, match=r"importance_weights, the second argument, .* got \(2, 3\)"):
        step(jnp.ones(3), jnp.ones((2, 3)), jnp.ones(2))
    with pytest.raises(ValueError, match=r"importance_weights, the second argument, .* got \(2, 3\)"):
        step(jnp.ones(3), jnp.ones((2, 3)), jnp.ones(2), jnp.ones(2))
    with pytest.raises(ValueError, match="got no batch argument.*importance_weights.* come between params and batch"):
        step(jnp.ones(3), jnp.ones((2, 3)))


@pytest.mark.parametrize("key", [jax.random.key(0), jax.random.PRNGKey(0)])
def test_one_key_for_the_batch_is_told_of_keyed(key):
    with pytest.raises(ValueError, match="leading axis.*; pass one random key for the batch as key=, with keyed=True"):
        per_example_grad_norms(lambda p, x, key: p @ x)(jnp.ones(3), jnp.ones((4, 3)), key)


@pytest.mark.parametrize("argnums", [2, (), (0, 5), (0, 0), (0, -2)])
def test_argnums_out_of_range_are_refused(argnums):
    with pytest.raises(ValueError, match="argnums must name some of the 2 arguments"):
        per_example_grad_norms(lambda p, x: p @ x, argnums=argnums)(jnp.ones(3), jnp.ones((2, 3)))
