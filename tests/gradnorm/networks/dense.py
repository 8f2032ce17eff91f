"""Dense layers, normalisation, shared and penalised parameters, functions with derivatives of their own."""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from tests.gradnorm.helpers import normalized
from tests.gradnorm.networks.registry import TOKENS, B, architecture, dense

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
def concatenated(draw):
    """Heads (a shared axis), outputs, inputs, and rows of a table; one part is used in two of them."""

    def apply(p, x, tokens):
        heads = jnp.concatenate([jnp.concatenate([p["a"], p["b"]]), p["c"]], axis=2)
        y = jnp.tanh(jnp.einsum("tkd,kde->tke", x, heads))[:, 0]
        return y @ jnp.concatenate([p["w"], p["u"]]) + jnp.concatenate([p["table"], p["u"]])[tokens]

    shapes = {"a": (1, 4, 2), "b": (2, 4, 2), "c": (3, 4, 4), "w": (4, 2), "u": (2, 2), "table": (4, 2)}
    return apply, {name: draw(*shape) for name, shape in shapes.items()}, draw(B, 5, 3, 4), TOKENS


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
