"""Networks of other libraries."""

import equinox as eqx
import haiku as hk
import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from tests.gradnorm.networks.registry import B, architecture, like


@architecture
def nnx_network(draw):
    rngs = nnx.Rngs(0)
    layers = nnx.Linear(4, 5, rngs=rngs), nnx.LayerNorm(5, rngs=rngs), jnp.tanh, nnx.Linear(5, 2, rngs=rngs)
    definition, params = nnx.split(nnx.Sequential(*layers), nnx.Param)
    return lambda p, x: nnx.merge(definition, p)(x), like(draw, params), draw(B, 3, 4)


def equinox(draw, model, call, *batch):
    params, rest = eqx.partition(model, eqx.is_inexact_array)
    return lambda p, *x: call(eqx.combine(p, rest), *x), like(draw, params), *batch


@architecture
def equinox_mlp(draw):
    return equinox(draw, eqx.nn.MLP(4, 2, 5, 2, jnp.tanh, key=jax.random.key(0)), lambda net, x: net(x), draw(B, 4))


@architecture
def equinox_gru(draw):
    def call(cell, x):
        return lax.scan(lambda h, token: (cell(token, h),) * 2, jnp.zeros(4, x.dtype), x)[1]

    return equinox(draw, eqx.nn.GRUCell(3, 4, key=jax.random.key(0)), call, draw(B, 5, 3))


@architecture
def equinox_attention(draw):
    model = eqx.nn.MultiheadAttention(2, 4, key=jax.random.key(0))
    return equinox(draw, model, lambda attend, x: attend(x, x, x), draw(B, 5, 4))


def haiku(draw, call, *batch):
    network = hk.without_apply_rng(hk.transform(call))
    params = jax.eval_shape(network.init, jax.random.key(0), *(x[0] for x in batch))
    return network.apply, like(draw, params), *batch


@architecture
def haiku_convnet(draw):
    def call(x):
        x = jnp.tanh(hk.GroupNorm(2)(hk.Conv2D(4, 3, stride=2)(x[None])))
        return hk.Linear(3)(hk.Flatten()(hk.Conv2DTranspose(2, 2)(x)))

    return haiku(draw, call, draw(B, 6, 6, 2))


@architecture
def haiku_lstm(draw):
    def call(x):
        core = hk.LSTM(3)
        return hk.dynamic_unroll(core, x, core.initial_state(None))[0]

    return haiku(draw, call, draw(B, 5, 4))
