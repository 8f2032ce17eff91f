"""Recurrence, scans, checkpoints, branches and loops."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax import lax

from tests.gradnorm.networks.registry import ARCHITECTURES, TOKENS, B, architecture, dense, linen

# Recurrence.


@architecture
def linen_gru(draw):
    return linen(draw, lambda dtype: nn.RNN(nn.GRUCell(4, param_dtype=dtype)), draw(B, 5, 3))


@architecture
def linen_lstm(draw):
    return linen(draw, lambda dtype: nn.RNN(nn.LSTMCell(3, param_dtype=dtype)), draw(B, 5, 3))


@architecture
def linen_optimized_lstm(draw):
    return linen(draw, lambda dtype: nn.RNN(nn.OptimizedLSTMCell(3, param_dtype=dtype)), draw(B, 5, 3))


@architecture
def linen_bidirectional(draw):
    def module(dtype):
        return nn.Bidirectional(*(nn.RNN(nn.SimpleCell(3, param_dtype=dtype)) for _ in range(2)))

    return linen(draw, module, draw(B, 5, 3))


def cell(p, h, x):
    h = jnp.tanh(h @ p["w"] + x @ p["u"] + p["b"])
    return h, h


def rnn(**options):
    """A recurrent network with a learned initial state."""

    def build(draw):
        params = {"w": draw(4, 4), "u": draw(3, 4), "b": draw(4), "start": draw(4)}
        return lambda p, x: lax.scan(functools.partial(cell, p), p["start"], x, **options)[1], params, draw(B, 5, 3)

    return build


ARCHITECTURES |= {"scan": rnn(), "scan_in_reverse": rnn(reverse=True), "scan_unrolled": rnn(unroll=2)}


@architecture
def scan_with_checkpoint(draw):
    def apply(p, x):
        return lax.scan(jax.checkpoint(functools.partial(cell, p)), jnp.zeros(4, x.dtype), x)[1]

    return apply, {"w": draw(4, 4), "u": draw(3, 4), "b": draw(4)}, draw(B, 5, 3)


@architecture
def scan_in_scan(draw):
    def apply(p, x):
        def row(h, tokens):
            h, _ = lax.scan(functools.partial(cell, p["inner"]), h, tokens)
            h = jnp.tanh(h @ p["outer"])
            return h, h

        return lax.scan(row, jnp.ones(4, x.dtype), x)[1]

    return apply, {"inner": {"w": draw(4, 4), "u": draw(3, 4), "b": draw(4)}, "outer": draw(4, 4)}, draw(B, 2, 3, 3)


@architecture
def scan_over_layers(draw):
    def apply(p, x):
        def layer(x, q):
            return x + jnp.tanh(dense(q, x) @ p["shared"]), jnp.sum(q["b"] * x)

        x, sums = lax.scan(layer, x, p["layers"])
        return jnp.append(x, sums)

    return apply, {"layers": {"w": draw(3, 4, 4), "b": draw(3, 4)}, "shared": draw(4, 4)}, draw(B, 2, 4)


@architecture
def scan_with_embedding_and_convolution(draw):
    def apply(p, tokens):
        def step(h, token):
            h = jnp.tanh(jnp.convolve(h, p["kernel"], "same") + p["table"][token])
            return h, h @ p["table"].T

        return lax.scan(step, p["table"][0], tokens)[1]

    return apply, {"table": draw(6, 5), "kernel": draw(3)}, TOKENS


@architecture
def scan_associative(draw):
    def apply(p, x):
        decay = jax.nn.sigmoid(x @ p["gate"])
        _, h = lax.associative_scan(lambda a, b: (a[0] * b[0], b[0] * a[1] + b[1]), (decay, x @ p["w"]))
        return h + jnp.cumsum(x * p["scale"], 0)

    return apply, {"gate": draw(3, 3), "w": draw(3, 3), "scale": draw(3)}, draw(B, 5, 3)


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, _=None):
        return x + jnp.tanh(nn.Dense(4)(nn.LayerNorm(epsilon=0.1)(x))), None


@architecture
def linen_scan_over_layers(draw):
    blocks = nn.scan(Block, variable_axes={"params": 0}, split_rngs={"params": True}, length=3)
    apply, params, x = linen(draw, lambda _: blocks(), draw(B, 2, 4))
    return lambda p, x: apply(p, x)[0], params, x


@architecture
def linen_remat(draw):
    apply, params, x = linen(draw, lambda _: nn.remat(Block)(), draw(B, 2, 4))
    return lambda p, x: apply(p, x)[0], params, x


@architecture
def checkpoint(draw):
    layer = jax.checkpoint(lambda p, x: jnp.tanh(dense(p, x)), policy=jax.checkpoint_policies.dots_saveable)
    params = [{"w": draw(4, 4), "b": draw(4)} for _ in range(2)]
    return jax.checkpoint(lambda p, x: layer(p[1], layer(p[0], layer(p[0], x)))), params, draw(B, 4)


# Control flow.


@architecture
def cond_with_parameters_in_both(draw):
    def apply(p, x):
        y = lax.cond(x[0, 0] > 0, lambda q, y: y @ q["yes"], lambda q, y: jnp.tanh(y @ q["no"] @ q["yes"]), p, x)
        return jnp.tanh(y) @ p["yes"]

    signs = np.array([1, -1, 1], np.float32)[:, None, None]
    return apply, {"yes": draw(4, 4), "no": draw(4, 4)}, signs * np.abs(draw(B, 3, 4))


@architecture
def cond_with_parameters_in_one(draw):
    def apply(p, x, skipped):
        return lax.cond(skipped, lambda: x, lambda: jnp.tanh(dense(p["skipped"], x))) @ p["w"]

    params = {"skipped": {"w": draw(4, 4), "b": draw(4)}, "w": draw(4, 3)}
    return apply, params, draw(B, 4), np.array([True, False, True])


@architecture
def cond_on_a_parameter(draw):
    return lambda p, x: lax.cond(p[0, 0] < 9, lambda: x @ p, lambda: x), draw(4, 4), draw(B, 4)


@architecture
def switch(draw):
    def apply(p, x, branch):
        return lax.switch(branch, [lambda x: x @ p["a"], lambda x: x * p["b"], lambda x: x @ p["a"] @ p["a"]], x)

    return apply, {"a": draw(4, 4), "b": draw(4)}, draw(B, 4), np.array([2, 0, 1])


@architecture
def while_loop_without_gradient(draw):
    def apply(p, x):
        def power_step(state):
            u = x.T @ (x @ state[1])
            return state[1], u / jnp.linalg.norm(u)

        def has_moved(state):
            return jnp.max(jnp.abs(state[0] - state[1])) > 1e-2

        start = jnp.zeros(4, x.dtype), jnp.ones(4, x.dtype)
        _, direction = lax.while_loop(has_moved, power_step, start)
        return x @ p * (direction @ p)

    return apply, draw(4, 3), draw(B, 3, 4)


@architecture
def fori_loop(draw):
    def apply(p, x):
        return lax.fori_loop(0, 3, lambda i, h: jnp.tanh(dense(p, h)) * (i + 1), x)

    return apply, {"w": draw(4, 4), "b": draw(4)}, draw(B, 4)


@architecture
def loop_without_steps(draw):
    def apply(p, x, i):
        return lax.fori_loop(0, 0, lambda _, h: jnp.tanh(h @ p["w"] + p["table"][i]), x * p["scale"])

    return apply, {"w": draw(4, 4), "table": draw(6, 4), "scale": draw(4)}, draw(B, 5, 4), TOKENS


@architecture
def map_over_tokens(draw):
    def apply(p, x):
        return lax.map(lambda token: jnp.tanh(dense(p, token)), x)

    return apply, {"w": draw(4, 3), "b": draw(3)}, draw(B, 5, 4)
