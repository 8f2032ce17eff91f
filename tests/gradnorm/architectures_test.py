"""Norms of many architectures against a float64 loop of `jax.grad`.

Red for an architecture if a primitive in it has a wrong rule, if a use of a parameter is missed or lacks its cross
terms with the other uses, or if a padding, stride, token or time step is out of place.
"""

import functools

import equinox as eqx
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx
from jax import lax

from issgd_jax.gradnorm import per_example_grad_norms
from tests.gradnorm.helpers import assert_close, normalized, reference, scalar_loss, transformed
from tests.helpers import soak

B = 3
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


# Dense layers and normalisation.


@architecture
def mlp(draw):
    params = [{"w": draw(i, o), "b": draw(o)} for i, o in [(5, 6), (6, 4), (4, 2)]]
    return lambda p, x: dense(p[2], jnp.tanh(dense(p[1], jnp.tanh(dense(p[0], x))))), params, draw(B, 5)


@architecture
def matrix_left_of_the_vector(draw):
    return lambda p, x: p["w"] @ jnp.tanh(p["u"] @ x), {"u": draw(6, 5), "w": draw(2, 6)}, draw(B, 5)


@architecture
def layer_norm(draw):
    params = {"layer": {"w": draw(5, 6), "b": draw(6)}, "scale": draw(6), "shift": draw(6), "head": draw(6, 2)}

    def apply(p, x):
        return jnp.tanh(normalized(dense(p["layer"], x)) * p["scale"] + p["shift"]) @ p["head"]

    return apply, params, draw(B, 4, 5)


@architecture
def rms_norm(draw):
    def apply(p, x):
        for w, scale in zip(p["w"], p["scale"]):
            x = x + jnp.tanh(x * lax.rsqrt(jnp.mean(x**2, -1, keepdims=True) + 0.1) * (1 + scale)) @ w
        return x

    return apply, {"w": [draw(5, 5), draw(5, 5)], "scale": [draw(5), draw(5)]}, draw(B, 4, 5)


@architecture
def group_norm(draw):
    def apply(p, x):
        groups = normalized(dense(p["layer"], x).reshape(5, 2, 3), (0, 2))
        return jnp.tanh(groups.reshape(5, 6) * p["scale"] + p["shift"]) @ p["head"]

    params = {"layer": {"w": draw(4, 6), "b": draw(6)}, "scale": draw(6), "shift": draw(6), "head": draw(6, 2)}
    return apply, params, draw(B, 5, 4)


@architecture
def weight_normalisation(draw):
    def apply(p, x):
        return x @ (p["gain"] * p["w"] / jnp.linalg.norm(p["w"], axis=0))

    return apply, {"gain": draw(4), "w": draw(5, 4)}, draw(B, 3, 5)


@architecture
def spectral_normalisation(draw):
    def apply(w, x):
        v = jnp.ones(4, w.dtype)
        for _ in range(3):
            u = w @ v / jnp.linalg.norm(w @ v)
            v = u @ w / jnp.linalg.norm(u @ w)
        u, v = lax.stop_gradient((u, v))
        return x @ (w / (u @ w @ v))

    return apply, draw(5, 4), draw(B, 5)


@architecture
def bilinear(draw):
    return lambda p, x, y: jnp.einsum("i,kij,j->k", x, p, y), draw(2, 4, 3), draw(B, 4), draw(B, 3)


@architecture
def one_matrix_twice_in_a_product(draw):
    return lambda w, x: w @ (w @ x) + x @ w.T @ w + (w @ w) @ x, draw(4, 4), draw(B, 4)


@architecture
def a_layer_used_twice(draw):
    def apply(p, x):
        h = jnp.tanh(dense(p, x[:4]))
        return jnp.tanh(dense(p, h)) + dense(p, x[4:])

    return apply, {"w": draw(4, 4), "b": draw(4)}, draw(B, 8)


@architecture
def autoencoder_with_tied_weights(draw):
    params = {"w": draw(5, 3), "b": draw(3), "c": draw(5)}
    return lambda p, x: jnp.tanh(dense(p, x)) @ p["w"].T + p["c"], params, draw(B, 5)


@architecture
def elementwise_parameters(draw):
    def apply(p, x):
        return jnp.exp(p["log_scale"]) * x**2 + jnp.maximum(x, p["slope"] * x) + p["shift"] * p["shift"][::-1]

    return apply, {"log_scale": draw(5), "slope": draw(5), "shift": draw(5)}, draw(B, 4, 5)


@architecture
def scalar_parameters(draw):
    params = {"scale": draw(), "shift": draw(), "power": draw()}
    return lambda p, x: p["scale"] * jnp.abs(x) ** (2 + p["power"]) + p["shift"], params, draw(B, 2, 3)


@architecture
def low_rank(draw):
    frozen = draw(5, 4)
    return lambda p, x: x @ (frozen + 2 * p["a"] @ p["b"]), {"a": draw(5, 2), "b": draw(2, 4)}, draw(B, 3, 5)


@architecture
def hypernetwork(draw):
    def apply(p, x, context):
        w = (context @ p["maker"] + p["base"]).reshape(4, 3)
        return jnp.tanh(x @ w) @ p["head"]

    return apply, {"maker": draw(2, 12), "base": draw(12), "head": draw(3, 2)}, draw(B, 5, 4), draw(B, 2)


@architecture
def equilibrium(draw):
    def apply(p, x):
        z = jnp.zeros_like(x)
        for _ in range(4):
            z = jnp.tanh(0.5 * z @ p["w"] + x @ p["u"])
        return z

    return apply, {"w": draw(4, 4), "u": draw(4, 4)}, draw(B, 4)


@architecture
def parameters_used_in_part(draw):
    params = {"w": draw(5, 6), "never": draw(3), "multiplied_by_zero": draw(2), "stopped": draw(4), "row": draw(3, 4)}

    def apply(p, x):
        y = x @ p["w"][:, 1:5] + p["row"][1] + jnp.sum(0 * p["multiplied_by_zero"])
        return y * lax.stop_gradient(p["stopped"])

    return apply, params, draw(B, 5)


@architecture
def a_penalty_in_the_loss(draw):
    return lambda w, x: jnp.append(x @ w, jnp.sum(w**2)), draw(4, 3), draw(B, 4)


@architecture
def ellipsis(draw):
    return lambda w, x: jnp.einsum("...i,...ij->...j", x, w), draw(3, 4, 5), draw(B, 2, 3, 4)


@architecture
def ensemble_by_vmap(draw):
    params = {"w": draw(3, 5, 4), "b": draw(3, 4)}
    return lambda p, x: jax.vmap(lambda q: jnp.tanh(dense(q, x)))(p), params, draw(B, 2, 5)


@architecture
def mixer(draw):
    def apply(p, x):
        x = x + jnp.tanh(normalized(x).T @ p["tokens"]).T
        return x + jnp.tanh(normalized(x) @ p["channels"])

    return apply, {"tokens": draw(4, 4), "channels": draw(5, 5)}, draw(B, 4, 5)


@architecture
def fft_mixing(draw):
    def apply(p, x):
        spectrum = jnp.fft.rfft(x * p["scale"], axis=0) * (p["real"] + 1j * p["imaginary"])
        return jnp.fft.irfft(spectrum, axis=0) + jnp.fft.fft2(x @ p["w"]).real

    return apply, {"scale": draw(3), "real": draw(5, 3), "imaginary": draw(5, 3), "w": draw(3, 3)}, draw(B, 8, 3)


@architecture
def sort_and_top_k(draw):
    def apply(p, x):
        h = x @ p["w"]
        return jnp.sort(h, 0) @ p["u"] + jnp.sum(lax.top_k(h.T, 2)[0]) + jnp.max(h * p["scale"], 0)

    return apply, {"w": draw(5, 4), "u": draw(4, 4), "scale": draw(4)}, draw(B, 6, 5)


@architecture
def straight_through_code_book(draw):
    def apply(p, x):
        z = x @ p["encoder"]
        code = p["codes"][jnp.argmin(jnp.sum((z[:, None] - p["codes"]) ** 2, -1), -1)]
        return jnp.concatenate([(z + lax.stop_gradient(code - z)) @ p["decoder"], code - lax.stop_gradient(z)], -1)

    return apply, {"encoder": draw(4, 3), "codes": draw(6, 3), "decoder": draw(3, 4)}, draw(B, 5, 4)


@architecture
def linear_solve_and_log_determinant(draw):
    def apply(w, x):
        a = w @ w.T + jnp.eye(4, dtype=w.dtype)
        return jnp.append(jnp.linalg.solve(a, w @ x), jnp.linalg.slogdet(a)[1])

    return apply, draw(4, 4), draw(B, 4)


@architecture
def gradient_penalty(draw):
    def apply(p, x):
        value, slope = jax.value_and_grad(lambda y: jnp.tanh(y @ p["w"]) @ p["v"])(x)
        return jnp.append(slope, value)

    return apply, {"w": draw(4, 5), "v": draw(5)}, draw(B, 4)


@architecture
def graph_network(draw):
    def apply(p, nodes, edges):
        for w in p:
            messages = jnp.tanh(nodes[edges[:, 0]] @ w)
            nodes = nodes + jax.ops.segment_sum(messages, edges[:, 1], num_segments=5)
        return nodes

    edges = np.random.default_rng(1).integers(0, 5, (B, 7, 2))
    return apply, [draw(4, 4), draw(4, 4)], draw(B, 5, 4), edges


@architecture
def dropout(draw):
    def apply(p, x, key):
        # The rate's dtype decides the bits drawn: float32 gives both precisions the same mask.
        kept = jax.random.bernoulli(key, np.float32(0.7), (6,))
        return jnp.where(kept, jnp.tanh(dense(p["a"], x)) / 0.7, 0) @ p["b"]

    params = {"a": {"w": draw(5, 6), "b": draw(6)}, "b": draw(6, 3)}
    return apply, params, draw(B, 5), jax.random.split(jax.random.key(0), B)


# Functions with derivatives of their own.


@jax.custom_jvp
def swish(x):
    return x * jax.nn.sigmoid(x)


swish.defjvps(lambda t, y, x: t * (jax.nn.sigmoid(x) + y * (1 - jax.nn.sigmoid(x))))


@architecture
def custom_jvp(draw):
    return lambda p, x: swish(swish(x @ p["a"]) @ p["b"]), {"a": draw(5, 4), "b": draw(4, 3)}, draw(B, 5)


@jax.custom_vjp
def sign(x):
    return jnp.sign(x)


sign.defvjp(lambda x: (jnp.sign(x), x), lambda x, t: (t * (jnp.abs(x) < 1),))


@architecture
def custom_vjp_of_weights_and_activations(draw):
    return lambda p, x: sign(x @ sign(p["a"])) @ p["b"], {"a": draw(5, 4), "b": draw(4, 3)}, draw(B, 2, 5)


@jax.custom_vjp
def scaled_linear(w, x):
    return x @ w


# Twice the true gradient of w: the rule given is the one to follow.
scaled_linear.defvjp(lambda w, x: (x @ w, (w, x)), lambda saved, t: (2 * saved[1].T @ t, t @ saved[0].T))


@architecture
def custom_vjp_layer(draw):
    def apply(p, x):
        return scaled_linear(p["b"], jnp.tanh(scaled_linear(p["a"], x)))

    return apply, {"a": draw(5, 4), "b": draw(4, 3)}, draw(B, 2, 5)


@architecture
def nested_jit(draw):
    layer = jax.jit(lambda p, x: jax.jit(jnp.tanh)(jax.jit(dense)(p, x)))
    params = [{"w": draw(4, 4), "b": draw(4)} for _ in range(2)]
    return jax.jit(lambda p, x: layer(p[1], layer(p[0], layer(p[1], x)))), params, draw(B, 4)


@architecture
def vmap_over_tokens(draw):
    params = {"w": draw(5, 4), "b": draw(4)}
    return lambda p, x: jax.vmap(lambda token: jnp.tanh(dense(p, token)))(x), params, draw(B, 6, 5)


# Attention and experts.


@architecture
def einsum_attention(draw):
    def apply(p, x):
        q, k, v = (jnp.einsum("td,dhk->thk", x, p[name]) for name in "qkv")
        return attention(q, k, v) @ p["out"]

    return apply, {**{name: draw(4, 2, 3) for name in "qkv"}, "out": draw(6, 4)}, draw(B, 5, 4)


@architecture
def fused_qkv_then_split(draw):
    def apply(p, x):
        q, k, v = jnp.split(dense(p["qkv"], x).reshape(5, 6, 2), 3, axis=1)
        return attention(q, k, v) @ p["out"]

    return apply, {"qkv": {"w": draw(4, 12), "b": draw(12)}, "out": draw(4, 4)}, draw(B, 5, 4)


@architecture
def fused_qkv_weights_sliced(draw):
    def apply(p, x):
        q, k, v = (jnp.einsum("td,dhk->thk", x, p["qkv"][i]) for i in range(3))
        return attention(q, k, v) @ p["out"]

    return apply, {"qkv": draw(3, 4, 2, 2), "out": draw(4, 4)}, draw(B, 5, 4)


@architecture
def linen_attention(draw):
    return linen(draw, lambda _: nn.MultiHeadDotProductAttention(num_heads=2, qkv_features=6), draw(B, 5, 4))


@architecture
def relative_position_bias(draw):
    def apply(p, x):
        i, j = np.indices((5, 5))
        q = jnp.einsum("td,dhk->thk", x, p["w"])
        return attention(q, q, q, p["by_distance"][:, i - j + 4] + p["by_pair"][i % 2, j % 3])

    return apply, {"w": draw(4, 2, 3), "by_distance": draw(2, 9), "by_pair": draw(2, 3)}, draw(B, 5, 4)


@architecture
def class_token_and_positions(draw):
    def apply(p, x):
        x = jnp.concatenate([p["token"][None], x @ p["w"]]) + p["positions"][: len(x) + 1]
        return attention(*(jnp.tanh(x)[:, None],) * 3)

    return apply, {"token": draw(4), "w": draw(3, 4), "positions": draw(8, 4)}, draw(B, 5, 3)


@architecture
def experts_mixed(draw):
    def apply(p, x):
        h = jnp.tanh(jnp.einsum("td,edf->etf", x, p["up"]))
        return jnp.einsum("te,etf,efd->td", jax.nn.softmax(x @ p["gate"]), h, p["down"])

    return apply, {"gate": draw(4, 3), "up": draw(3, 4, 5), "down": draw(3, 5, 4)}, draw(B, 6, 4)


@architecture
def experts_top_1_by_gather(draw):
    def apply(p, x):
        gates = jax.nn.softmax(x @ p["gate"])
        expert = jnp.argmax(gates, -1)
        return jnp.einsum("td,tdf->tf", x, p["w"][expert]) * jnp.max(gates, -1, keepdims=True)

    return apply, {"gate": draw(4, 3), "w": draw(3, 4, 5)}, draw(B, 6, 4)


@architecture
def experts_top_1_by_dispatch(draw):
    def apply(p, x):
        gates = jax.nn.softmax(x @ p["gate"])
        dispatch = jax.nn.one_hot(jnp.argmax(gates, -1), 3, dtype=x.dtype)
        experts = jnp.einsum("etd,edf->etf", jnp.einsum("te,td->etd", dispatch, x), p["w"])
        return jnp.einsum("etf,te->tf", experts, dispatch * gates)

    return apply, {"gate": draw(4, 3), "w": draw(3, 4, 5)}, draw(B, 6, 4)


# Convolutions: the scale in front makes the gradient of each layer's input count.


def convolution(image, kernel, padding="SAME", **options):
    axes = "DHW"[1 - len(image) :]
    options |= {"padding": padding, "dimension_numbers": (f"N{axes}C", f"{axes}IO", f"N{axes}C")}
    options.setdefault("window_strides", (1,) * len(axes))

    def apply(p, x):
        return lax.conv_general_dilated(x[None] * p["scale"], p["kernel"], **options)[0] + p["bias"]

    def build(draw):
        return apply, {"scale": draw(image[-1]), "kernel": draw(*kernel), "bias": draw(kernel[-1])}, draw(B, *image)

    return build


ARCHITECTURES |= {
    "conv_1d": convolution((7, 3), (3, 3, 4)),
    "conv_2d": convolution((5, 6, 3), (3, 2, 3, 4)),
    "conv_3d": convolution((3, 4, 5, 2), (2, 3, 2, 2, 3)),
    "conv_stride": convolution((7, 8, 2), (3, 3, 2, 4), window_strides=(2, 3)),
    "conv_dilation": convolution((7, 8, 2), (3, 2, 2, 4), rhs_dilation=(2, 3)),
    "conv_input_dilation": convolution((4, 3, 2), (3, 3, 2, 4), [(1, 2), (2, 0)], lhs_dilation=(2, 3)),
    "conv_everything": convolution(
        (7, 8, 4), (3, 2, 2, 6), [(2, 1), (-1, 3)], window_strides=(2, 1), rhs_dilation=(2, 1), lhs_dilation=(1, 2),
        feature_group_count=2,
    ),
    "conv_grouped": convolution((5, 5, 6), (3, 3, 2, 9), feature_group_count=3),
    "conv_depthwise": convolution((5, 5, 4), (3, 3, 1, 4), feature_group_count=4),
    "conv_depthwise_multiplier": convolution((5, 5, 3), (3, 3, 1, 6), feature_group_count=3),
    "conv_valid": convolution((6, 5, 2), (3, 2, 2, 4), "VALID"),
    "conv_same_lower": convolution((6, 5, 2), (2, 4, 2, 4), "SAME_LOWER"),
    "conv_patches": convolution((8, 8, 3), (4, 4, 3, 5), "VALID", window_strides=(4, 4)),
    "conv_1x1": convolution((4, 4, 3), (1, 1, 3, 5)),
    "conv_of_a_large_image": convolution((24, 24, 2), (3, 3, 2, 2)),
    "conv_of_many_channels": convolution((2, 2, 24), (3, 3, 24, 20)),
    "conv_kernel_larger_than_the_image": convolution((2, 3, 2), (5, 5, 2, 3)),
}  # fmt: skip


@architecture
def conv_transpose(draw):
    return linen(draw, lambda _: nn.ConvTranspose(3, (3, 3), strides=(2, 2)), draw(B, 3, 4, 2))


@architecture
def conv_circular(draw):
    return linen(draw, lambda _: nn.Conv(3, (3, 3), padding="CIRCULAR"), draw(B, 4, 5, 2))


@architecture
def conv_separable(draw):
    def module(_):
        return nn.Sequential([nn.Conv(4, (3, 3), feature_group_count=4), jnp.tanh, nn.Conv(3, (1, 1))])

    return linen(draw, module, draw(B, 5, 5, 4))


@architecture
def conv_standardised_weights(draw):
    def apply(kernel, x):
        return lax.conv(x[None], normalized(kernel, (1, 2, 3)), (1, 1), "SAME")[0]

    return apply, draw(4, 3, 3, 3), draw(B, 3, 5, 5)


@architecture
def conv_by_patches(draw):
    def apply(p, x):
        return jnp.einsum("cxy,co->oxy", lax.conv_general_dilated_patches(x[None], (3, 3), (1, 1), "VALID")[0], p)

    return apply, draw(18, 4), draw(B, 2, 5, 5)


@architecture
def conv_with_pooling(draw):
    def apply(p, x):
        x = nn.max_pool(nn.relu(lax.conv(x[None], p["a"], (1, 1), "SAME")).transpose(0, 2, 3, 1), (2, 2), (2, 2))
        return nn.avg_pool(x, (2, 2)).mean((1, 2)) @ p["b"]

    return apply, {"a": draw(4, 2, 3, 3), "b": draw(4, 3)}, draw(B, 2, 6, 6)


@architecture
def conv_unet(draw):
    def apply(p, x):
        down = jnp.tanh(lax.conv(x[None], p["down"], (2, 2), "SAME"))
        up = jax.image.resize(down, (1, 3, 6, 6), "bilinear")
        return lax.conv(jnp.concatenate([x[None], up], 1), p["up"], (1, 1), "SAME")

    return apply, {"down": draw(3, 2, 3, 3), "up": draw(2, 5, 3, 3)}, draw(B, 2, 6, 6)


# Embeddings.

TOKENS = np.array([[1, 4, 4, 0, 4], [2, 2, 2, 2, 2], [0, 1, 2, 3, 5]])
OUT_OF_RANGE = np.array([[1, 7, -1, 0, 6], [-7, 9, 2, 2, 2], [6, 6, -6, 3, 5]])  # of 6 tokens


@architecture
def embedding(draw):
    return lambda p, i: jnp.tanh(p["table"][i]) @ p["w"], {"table": draw(6, 4), "w": draw(4, 3)}, TOKENS


@architecture
def embedding_tied_with_the_head(draw):
    def apply(p, i):
        logits = jnp.tanh(p["table"][i[:-1]] @ p["w"]) @ p["table"].T
        return jnp.take_along_axis(jax.nn.log_softmax(logits), i[1:, None], -1)

    return apply, {"table": draw(6, 4), "w": draw(4, 4)}, TOKENS


@architecture
def embedding_of_tokens_out_of_range(draw):
    def apply(p, i):
        return jnp.stack([
            p["clipped"].at[i].get(mode="clip"),
            p["filled"].at[i].get(mode="fill", fill_value=0),
            jnp.take(p["wrapped"], i, axis=0, mode="wrap"),
        ])  # fmt: skip

    return apply, {"clipped": draw(6, 3), "filled": draw(6, 3), "wrapped": draw(6, 3)}, OUT_OF_RANGE


@architecture
def embedding_bag_of_two_axes(draw):
    return lambda p, i, j: jnp.tanh(p[i, :, j].sum(0)), draw(6, 3, 6), TOKENS, TOKENS[:, ::-1]


@architecture
def embedding_of_one_token(draw):
    def apply(p, i, x):
        return (p["scale"][i] * x) @ p["experts"][i] + lax.dynamic_slice(p["window"], (i,), (3,))

    params = {"scale": draw(4), "experts": draw(4, 5, 3), "window": draw(6)}
    return apply, params, np.array([0, 3, 1]), draw(B, 2, 5)


@architecture
def embedding_by_one_hot(draw):
    return lambda p, i: jnp.tanh(jax.nn.one_hot(i, 6, dtype=p.dtype) @ p), draw(6, 4), TOKENS


# Recurrence.


@architecture
def linen_gru(draw):
    return linen(draw, lambda dtype: nn.RNN(nn.GRUCell(4, param_dtype=dtype)), draw(B, 5, 3))


@architecture
def linen_lstm(draw):
    return linen(draw, lambda dtype: nn.RNN(nn.LSTMCell(3, param_dtype=dtype)), draw(B, 5, 3))


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


# Other libraries.


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


# In float32, the kinds of rules, sums of unlike terms and control flow once; the others only in a soak.
IN_FLOAT32 = (
    "mlp", "bilinear", "a_layer_used_twice", "ensemble_by_vmap", "fft_mixing", "custom_vjp_layer", "linen_attention",
    "experts_mixed", "conv_everything", "conv_transpose", "conv_of_many_channels", "embedding_tied_with_the_head",
    "embedding_of_tokens_out_of_range", "linen_gru", "scan_in_scan", "scan_over_layers",
    "scan_with_embedding_and_convolution", "checkpoint", "cond_with_parameters_in_both", "fori_loop",
)  # fmt: skip


@functools.cache
def expected(name):
    return reference(*problem(name))


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_equals_a_loop_in_float64(name):
    assert_close(transformed(*problem(name), np.float64), expected(name), 1e-10, 16 * np.finfo(np.float64).eps)


@pytest.mark.parametrize("name", soak(IN_FLOAT32, ARCHITECTURES))
def test_equals_a_loop_in_float32(name):
    assert_close(transformed(*problem(name), np.float32), expected(name), 1e-5, 16 * np.finfo(np.float32).eps)


def test_a_parameter_without_effect_has_norm_zero():
    loss_fn, params, _, batch = problem("parameters_used_in_part")
    per_leaf = per_example_grad_norms(loss_fn, per_leaf=True)(params, *batch)
    for name in "never", "multiplied_by_zero", "stopped":
        np.testing.assert_array_equal(per_leaf[name], np.zeros(B))
