"""A problem of a user's own, which workers on other machines make by its name."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax

import issgd_jax

NUM_EXAMPLES = 96


def loss_fn(params, batch, key):
    noise = 0.1 * jax.random.normal(key, batch["x"].shape)
    return ((batch["x"] + noise) @ params["w"] - batch["y"]) ** 2


def make_problem():
    x = np.random.default_rng(0).normal(size=(NUM_EXAMPLES, 5)).astype(np.float32)
    examples = {"x": x, "y": x @ np.arange(5, dtype=np.float32)}
    return issgd_jax.Problem(init=lambda key: {"w": jnp.zeros(5)}, loss_fn=loss_fn, train=examples, keyed=True)


def make_with_optimizer():
    return dataclasses.replace(make_problem(), optimizer=optax.adam(0.1))
