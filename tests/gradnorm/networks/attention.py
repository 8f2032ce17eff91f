"""Attention, experts and embeddings."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax import lax

from tests.gradnorm.networks.registry import TOKENS, B, architecture, attention, dense, linen

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


# Embeddings.

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
