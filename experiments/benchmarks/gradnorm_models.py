"""Four losses on which per-example gradient norms are compared: plain functions of JAX and NumPy alone.

Each maker takes a batch size and returns `(params, batch, loss_fn)`: parameters and batch are NumPy arrays, random but
the same in every process; `loss_fn(params, *example)` is the loss of one example. Matrices are [in, out].
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

NUM_CLASSES = 10
HEADS = 4


@dataclasses.dataclass(frozen=True)
class Init:
    """Random parameters; biases and offsets are not zero, so that a method that mixes them up has another loss."""

    rng: np.random.Generator

    def normal(self, *shape, scale) -> np.ndarray:
        return (scale * self.rng.standard_normal(shape)).astype(np.float32)

    def dense(self, *shape, gain=2.0) -> dict:
        """Returns a bias and a kernel of variance gain / fan-in (2: He's for ReLU), whose last axis is the output."""
        scale = np.sqrt(gain / np.prod(shape[:-1]))
        return {"kernel": self.normal(*shape, scale=scale), "bias": self.normal(shape[-1], scale=0.01)}

    def layer_norm(self, features) -> dict:
        return {"scale": 1 + self.normal(features, scale=0.01), "bias": self.normal(features, scale=0.01)}


def dense(layer, x):
    return x @ layer["kernel"] + layer["bias"]


def cross_entropy(logits, label):
    """Returns the softmax cross-entropy of one example, or the mean over leading dimensions."""
    log_probs = jax.nn.log_softmax(logits)
    return -jnp.mean(jnp.take_along_axis(log_probs, label[..., None], axis=-1))


def mlp(batch_size=256):
    """Makes an MLP 3072-2048×4-10 with ReLU."""
    rng = np.random.default_rng(0)
    init, sizes = Init(rng), (3072, 2048, 2048, 2048, 2048, NUM_CLASSES)
    params = {f"dense_{i}": init.dense(*sizes[i : i + 2]) for i in range(len(sizes) - 1)}
    batch = init.normal(batch_size, sizes[0], scale=1), rng.integers(0, NUM_CLASSES, batch_size, np.int32)
    return params, batch, mlp_loss


def mlp_loss(params, features, label):
    x = features
    for i in range(len(params) - 1):
        x = jax.nn.relu(dense(params[f"dense_{i}"], x))
    return cross_entropy(dense(params[f"dense_{len(params) - 1}"], x), label)


def convnet(batch_size=64):
    """Makes a ConvNet: 3→32→32→64→64, 3×3, ReLU, pooled after layers 2 and 4; dense 256, dense 10; images 32×32×3."""
    rng = np.random.default_rng(0)
    init, channels = Init(rng), (3, 32, 32, 64, 64)
    params = {f"conv_{i}": init.dense(3, 3, *channels[i : i + 2]) for i in range(4)}
    params |= {"dense_0": init.dense(8 * 8 * 64, 256), "dense_1": init.dense(256, NUM_CLASSES)}
    batch = init.normal(batch_size, 32, 32, 3, scale=1), rng.integers(0, NUM_CLASSES, batch_size, np.int32)
    return params, batch, convnet_loss


def convnet_loss(params, image, label):
    x = image[None]
    for i in range(4):
        x = jax.nn.relu(conv(params[f"conv_{i}"], x))
        if i % 2:
            x = max_pool(x)
    x = jax.nn.relu(dense(params["dense_0"], x.reshape(-1)))
    return cross_entropy(dense(params["dense_1"], x), label)


def conv(layer, x):
    layout = ("NHWC", "HWIO", "NHWC")
    return jax.lax.conv_general_dilated(x, layer["kernel"], (1, 1), "SAME", dimension_numbers=layout) + layer["bias"]


def max_pool(x):
    n, height, width, channels = x.shape
    return x.reshape(n, height // 2, 2, width // 2, 2, channels).max(axis=(2, 4))


def gru(batch_size=64, steps=64, features=256, units=256):
    """Makes a GRU of 256 units over 64 steps of 256 features, classified from its last state."""
    rng = np.random.default_rng(0)
    init = Init(rng)
    gates = {"input": init.dense(features, 3 * units, gain=1.0), "state": init.dense(units, 3 * units, gain=1.0)}
    params = {"gru": gates, "dense": init.dense(units, NUM_CLASSES, gain=1.0)}
    batch = init.normal(batch_size, steps, features, scale=1), rng.integers(0, NUM_CLASSES, batch_size, np.int32)
    return params, batch, gru_loss


def gru_loss(params, sequence, label):
    state = jnp.zeros(params["gru"]["state"]["kernel"].shape[0], sequence.dtype)
    state, _ = jax.lax.scan(lambda state, x: (gru_cell(params["gru"], state, x), None), state, sequence)
    return cross_entropy(dense(params["dense"], state), label)


def gru_cell(gates, state, x):
    """Returns the next state of PyTorch's GRU, whose reset gate acts after the state's matrix."""
    reset_x, update_x, new_x = jnp.split(dense(gates["input"], x), 3)
    reset_h, update_h, new_h = jnp.split(dense(gates["state"], state), 3)
    reset, update = jax.nn.sigmoid(reset_x + reset_h), jax.nn.sigmoid(update_x + update_h)
    return (1 - update) * jnp.tanh(new_x + reset * new_h) + update * state


def transformer(batch_size=16, length=64, width=256, depth=4, vocabulary=8192):
    """Makes a causal pre-LN transformer: 4 layers of width 256, 4 heads; the head is the embedding transposed."""
    rng = np.random.default_rng(0)
    init, scale = Init(rng), width**-0.5
    params = {
        "embedding": init.normal(vocabulary, width, scale=scale),
        "positions": init.normal(length, width, scale=scale),
        **{f"block_{i}": block_params(init, width) for i in range(depth)},
        "norm": init.layer_norm(width),
    }
    return params, (rng.integers(0, vocabulary, (batch_size, length + 1), np.int32),), transformer_loss


def block_params(init, width) -> dict:
    return {
        "norm_0": init.layer_norm(width),
        "query_key_value": init.dense(width, 3 * width, gain=1.0),
        "attention_out": init.dense(width, width, gain=1.0),
        "norm_1": init.layer_norm(width),
        "dense_0": init.dense(width, 4 * width, gain=1.0),
        "dense_1": init.dense(4 * width, width, gain=1.0),
    }


def transformer_loss(params, tokens):
    return cross_entropy(transformer_logits(params, tokens[:-1]), tokens[1:])


def transformer_logits(params, tokens):
    """Returns the logits f32[T, vocabulary] of the token after each of one sequence."""
    x = params["embedding"][tokens] + params["positions"]
    for i in range(len(params) - 3):
        x = block(params[f"block_{i}"], x)
    return layer_norm(params["norm"], x) @ params["embedding"].T


def block(layers, x):
    x = x + attention(layers, layer_norm(layers["norm_0"], x))
    hidden = jax.nn.gelu(dense(layers["dense_0"], layer_norm(layers["norm_1"], x)))
    return x + dense(layers["dense_1"], hidden)


def attention(layers, x):
    """Returns causal self-attention of one sequence f32[T, width]."""
    length, width = x.shape
    query_key_value = dense(layers["query_key_value"], x).reshape(length, 3, HEADS, width // HEADS)
    query, key, value = jnp.moveaxis(query_key_value, 1, 0)
    logits = jnp.einsum("thd,shd->hts", query, key) / np.sqrt(width // HEADS).astype(x.dtype)
    causal = jnp.tril(jnp.ones((length, length), bool))
    attended = jax.nn.softmax(jnp.where(causal, logits, -jnp.inf))
    return dense(layers["attention_out"], jnp.einsum("hts,shd->thd", attended, value).reshape(length, width))


def layer_norm(layer, x):
    centered = x - jnp.mean(x, axis=-1, keepdims=True)
    variance = jnp.mean(centered**2, axis=-1, keepdims=True)
    return centered * jax.lax.rsqrt(variance + 1e-5) * layer["scale"] + layer["bias"]


def batch_loss(loss_fn):
    """Returns `(params, *batch) -> f32[]`, the mean of the examples' losses."""

    def mean_loss(params, *batch):
        return jnp.mean(jax.vmap(lambda *example: loss_fn(params, *example))(*batch))

    return mean_loss


MODELS = {"mlp": mlp, "convnet": convnet, "gru": gru, "transformer": transformer}
