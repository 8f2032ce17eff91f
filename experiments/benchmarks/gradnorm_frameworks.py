"""Losses as in gradnorm_models, of the same sizes, made of the layers of flax and Equinox.

    python -m experiments.benchmarks.gradnorm --models=linen_gru,equinox_lstm --peers=none

Users have the frameworks' own cells, whose gates are parameters by themselves. The makers import their framework: the
environment of the other libraries has none.
"""

import jax
import jax.numpy as jnp
import numpy as np

from experiments.benchmarks.gradnorm_models import HEADS, NUM_CLASSES, cross_entropy, max_pool

SEQUENCE, IMAGE = (64, 256), (32, 32, 3)
UNITS, CHANNELS, DEPTH = 256, (32, 32, 64, 64), 2


def random_batch(batch_size, *shape):
    rng = np.random.default_rng(0)
    inputs = rng.standard_normal((batch_size, *shape)).astype(np.float32)
    return inputs, rng.integers(0, NUM_CLASSES, batch_size, np.int32)


def linen_problem(module, batch_size, *shape):
    """Returns `(params, batch, loss_fn)` of `module(dtype)`, since a cell does not take its state's type from x."""
    batch = random_batch(batch_size, *shape)
    params = jax.device_get(module(np.float32).init(jax.random.key(0), batch[0][0]))
    return params, batch, lambda p, x, label: cross_entropy(module(x.dtype).apply(p, x), label)


def linen_recurrent(cell, batch_size):
    from flax import linen as nn

    class Network(nn.Module):
        dtype: type

        @nn.compact
        def __call__(self, x):
            return nn.Dense(NUM_CLASSES)(nn.RNN(getattr(nn, cell)(UNITS, param_dtype=self.dtype))(x)[-1])

    return linen_problem(Network, batch_size, *SEQUENCE)


def linen_gru(batch_size=64):
    return linen_recurrent("GRUCell", batch_size)


def linen_lstm(batch_size=64):
    return linen_recurrent("LSTMCell", batch_size)


def linen_optimized_lstm(batch_size=64):
    return linen_recurrent("OptimizedLSTMCell", batch_size)


def linen_attention(batch_size=16):
    """Makes two pre-LN blocks of `MultiHeadDotProductAttention` and an MLP."""
    from flax import linen as nn

    class Network(nn.Module):
        dtype: type

        @nn.compact
        def __call__(self, x):
            for _ in range(DEPTH):
                x = x + nn.MultiHeadDotProductAttention(num_heads=HEADS)(nn.LayerNorm()(x))
                x = x + nn.Dense(UNITS)(nn.gelu(nn.Dense(4 * UNITS)(nn.LayerNorm()(x))))
            return nn.Dense(NUM_CLASSES)(jnp.mean(x, axis=0))

    return linen_problem(Network, batch_size, *SEQUENCE)


def linen_convnet(batch_size=64):
    from flax import linen as nn

    class Network(nn.Module):
        dtype: type

        @nn.compact
        def __call__(self, x):
            for i, channels in enumerate(CHANNELS):
                x = nn.relu(nn.Conv(channels, (3, 3))(x))
                x = nn.max_pool(x, (2, 2), (2, 2)) if i % 2 else x
            return nn.Dense(NUM_CLASSES)(nn.relu(nn.Dense(256)(x.reshape(-1))))

    return linen_problem(Network, batch_size, *IMAGE)


def equinox_problem(layers, call, batch_size, *shape):
    """Returns `(params, batch, loss_fn)` of `call(layers, x)`, a pytree of modules."""
    import equinox as eqx

    params, static = eqx.partition(layers, eqx.is_inexact_array)
    batch = random_batch(batch_size, *shape)
    params = jax.device_get(params)
    return params, batch, lambda p, x, label: cross_entropy(call(eqx.combine(p, static), x), label)


def keys(num):
    return iter(jax.random.split(jax.random.key(0), num))


def equinox_recurrent(cell, start, batch_size):
    """Makes a cell that is scanned from `start(zeros)`, classified from its last state."""
    import equinox as eqx

    key = keys(2)
    layers = getattr(eqx.nn, cell)(SEQUENCE[1], UNITS, key=next(key)), eqx.nn.Linear(UNITS, NUM_CLASSES, key=next(key))

    def call(layers, x):
        cell, head = layers
        state, _ = jax.lax.scan(lambda state, token: (cell(token, state), None), start(jnp.zeros(UNITS, x.dtype)), x)
        return head(jax.tree.leaves(state)[0])

    return equinox_problem(layers, call, batch_size, *SEQUENCE)


def equinox_gru(batch_size=64):
    return equinox_recurrent("GRUCell", lambda zeros: zeros, batch_size)


def equinox_lstm(batch_size=64):
    return equinox_recurrent("LSTMCell", lambda zeros: (zeros, zeros), batch_size)


def equinox_attention(batch_size=16):
    """Makes two pre-LN blocks of `MultiheadAttention` and an MLP."""
    import equinox as eqx

    key = keys(3 * DEPTH + 1)
    blocks = [
        (
            eqx.nn.LayerNorm(UNITS),
            eqx.nn.MultiheadAttention(HEADS, UNITS, key=next(key)),
            eqx.nn.LayerNorm(UNITS),
            eqx.nn.Linear(UNITS, 4 * UNITS, key=next(key)),
            eqx.nn.Linear(4 * UNITS, UNITS, key=next(key)),
        )
        for _ in range(DEPTH)
    ]

    def call(layers, x):
        blocks, head = layers
        for norm_0, attention, norm_1, wide, narrow in blocks:
            normed = jax.vmap(norm_0)(x)
            x = x + attention(normed, normed, normed)
            x = x + jax.vmap(lambda token: narrow(jax.nn.gelu(wide(norm_1(token)))))(x)  # noqa: B023
        return head(jnp.mean(x, axis=0))

    return equinox_problem((blocks, eqx.nn.Linear(UNITS, NUM_CLASSES, key=next(key))), call, batch_size, *SEQUENCE)


def equinox_convnet(batch_size=64):
    import equinox as eqx

    key, channels = keys(6), (IMAGE[-1], *CHANNELS)
    convs = [eqx.nn.Conv2d(channels[i], channels[i + 1], 3, padding=1, key=next(key)) for i in range(len(CHANNELS))]
    flat = (IMAGE[0] // 4) * (IMAGE[1] // 4) * CHANNELS[-1]
    dense = eqx.nn.Linear(flat, 256, key=next(key)), eqx.nn.Linear(256, NUM_CLASSES, key=next(key))

    def call(layers, image):
        convs, (hidden, head) = layers
        x = jnp.moveaxis(image, -1, 0)
        for i, conv in enumerate(convs):
            x = jax.nn.relu(conv(x))
            x = max_pool(x[..., None])[..., 0] if i % 2 else x
        return head(jax.nn.relu(hidden(x.reshape(-1))))

    return equinox_problem((convs, dense), call, batch_size, *IMAGE)


FRAMEWORKS = {
    "linen_gru": linen_gru,
    "linen_lstm": linen_lstm,
    "linen_optimized_lstm": linen_optimized_lstm,
    "linen_attention": linen_attention,
    "linen_convnet": linen_convnet,
    "equinox_gru": equinox_gru,
    "equinox_lstm": equinox_lstm,
    "equinox_attention": equinox_attention,
    "equinox_convnet": equinox_convnet,
}
