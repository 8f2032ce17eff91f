"""A byte-level transformer of plain functions on Python's docstrings: causal and padding masks, sample weights.

python examples/transformer.py

A paragraph's weight is its number of bytes, so that every byte counts the same. The gradient norms are nearly equal,
and importance sampling gains little.
"""
# Importance sampling: 4 lines added (# +), 7 changed (# was: the ordinary line).

import ast
import pathlib
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax

import issgd_jax  # +

LENGTH, WIDTH, HEADS, LAYERS = 64, 32, 4, 2


def make_data(num_examples):
    """Returns paragraphs u8[N, LENGTH + 1], padded with 0, and weights f32[N] with mean 1: their numbers of bytes."""
    texts = []
    for path in sorted(pathlib.Path(ast.__file__).parent.glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.Module):
                texts += (ast.get_docstring(node) or "").split("\n\n")
    rows = [list(text.encode()[: LENGTH + 1]) for text in sorted(set(texts)) if text.isascii() and len(text) > 1]
    rows = np.random.default_rng(0).permutation(np.array(rows, object))[:num_examples]
    tokens = np.zeros((len(rows), LENGTH + 1), np.uint8)
    for row, text in zip(tokens, rows):
        row[: len(text)] = text
    num_targets = np.sum(tokens[:, 1:] > 0, axis=1)
    return jnp.asarray(tokens), jnp.asarray(num_targets / num_targets.mean(), jnp.float32)


def init(key):
    def normal(*shape):
        nonlocal key
        key, this = jax.random.split(key)
        return jax.random.normal(this, shape) / np.sqrt(shape[0])

    def block():
        names = {"qkv": (WIDTH, 3 * WIDTH), "out": (WIDTH, WIDTH), "up": (WIDTH, 4 * WIDTH), "down": (4 * WIDTH, WIDTH)}
        return {name: normal(*shape) for name, shape in names.items()}

    blocks = [block() for _ in range(LAYERS)]
    return {
        "embed": normal(256, WIDTH),
        "position": normal(LENGTH, WIDTH),
        "blocks": blocks,
        "head": normal(WIDTH, 256),
    }


def layer_norm(x):
    return (x - x.mean(-1, keepdims=True)) * jax.lax.rsqrt(x.var(-1, keepdims=True) + 1e-6)


def attention(block, x, mask):
    query, key, value = jnp.split((x @ block["qkv"]).reshape(LENGTH, HEADS, -1), 3, axis=-1)
    scores = jnp.einsum("qhd,khd->hqk", query, key) / np.sqrt(query.shape[-1])
    weights = jax.nn.softmax(jnp.where(mask, scores, -1e9))
    return jnp.einsum("hqk,khd->qhd", weights, value).reshape(LENGTH, WIDTH) @ block["out"]


def loss_fn(params, tokens, weight):
    """Returns the weighted mean loss of the bytes of one paragraph."""
    inputs, targets = tokens[:-1], tokens[1:]
    mask = jnp.tril(jnp.ones((LENGTH, LENGTH), bool)) & (inputs > 0)
    x = params["embed"][inputs] + params["position"]
    for block in params["blocks"]:
        x = x + attention(block, layer_norm(x), mask)
        x = x + jax.nn.gelu(layer_norm(x) @ block["up"]) @ block["down"]
    losses = optax.softmax_cross_entropy_with_integer_labels(layer_norm(x) @ params["head"], targets)
    return weight * jnp.mean(losses, where=targets > 0)


def batch_loss(params, tokens, weights):
    return jnp.mean(jax.vmap(loss_fn, (None, 0, 0))(params, tokens, weights))


def train(steps, learning_rate=0.006, num_examples=2000, **options):
    tokens, weights = make_data(num_examples)
    params = init(jax.random.key(0))
    optimizer = optax.adam(learning_rate)
    grad_fn = issgd_jax.value_grad_and_norms(loss_fn)  # was: grad_fn = jax.grad(batch_loss)
    sampler = issgd_jax.Sampler(len(tokens), batch_size=16, **options)  # +

    @jax.jit
    def step(key, params, opt_state, state):  # was: def step(key, params, opt_state):
        state, drawn = sampler.draw(state)  # was: indices = jax.random.randint(key, (16,), 0, len(tokens))
        batch = tokens[drawn.indices], weights[drawn.indices]  # was: batch = tokens[indices], weights[indices]
        _, grads, norms = grad_fn(params, drawn.importance_weights, *batch)  # was: grads = grad_fn(params, *batch)
        state = sampler.update(state, drawn, norms)  # +
        updates, opt_state = optimizer.update(grads, opt_state)
        params = optax.apply_updates(params, updates)
        return params, opt_state, state  # was: return params, opt_state

    carry = params, optimizer.init(params), sampler.init(seed=0)  # was: carry = params, optimizer.init(params)
    for key in jax.random.split(jax.random.key(1), steps):
        carry = step(key, *carry)
    params, *_ = carry
    chunks = zip(jnp.split(tokens, 20), jnp.split(weights, 20))
    figures = {"loss": float(np.mean([jax.jit(batch_loss)(params, *chunk) for chunk in chunks]))}
    figures |= sampler.metrics(carry[-1])  # +
    return figures


def main(steps=1000, **sizes):
    begin = time.perf_counter()
    ours = train(steps, **sizes)
    middle = time.perf_counter()
    uniform = train(steps, **sizes, proposal=issgd_jax.Uniform())
    print(f"{steps:,} steps                   importance sampling      uniform")
    print(f"loss of a training byte   {ours['loss']:22.5f} {uniform['loss']:12.5f}")
    print(f"seconds, with compilation {middle - begin:21.1f} {time.perf_counter() - middle:12.1f}")
    ratio, equivalent = ours["loss"] / uniform["loss"], ours["equivalent_batch"]
    print(f"Loss: {ratio:.2f} times uniform's. Second moment: that of {equivalent:.0f} uniform examples, not 16.")
    return ours | {"uniform_loss": uniform["loss"]}


if __name__ == "__main__":
    main()
