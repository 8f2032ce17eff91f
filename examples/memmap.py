"""Rows in a file, read as NumPy memmap: `Prefetch` draws ahead and gathers minibatches while the step before computes.

python examples/memmap.py

At this rate uniform draws end lower.
"""
# Importance sampling: 8 lines added (# +), 4 changed (# was: the ordinary line).

import pathlib
import tempfile
import time

import jax
import jax.numpy as jnp
import numpy as np

import issgd_jax  # +

NUM_EXAMPLES, NUM_FEATURES = 200_000, 32


def write_data(path):
    """Returns rows f32[N, D + 1] in a file, features and target; a few rows have much larger features."""
    rng = np.random.default_rng(0)
    data = np.memmap(path, np.float32, "w+", shape=(NUM_EXAMPLES, NUM_FEATURES + 1))
    scale = rng.lognormal(0, 1, (NUM_EXAMPLES, 1))
    data[:, :-1] = scale * rng.normal(size=(NUM_EXAMPLES, NUM_FEATURES)) / np.sqrt(NUM_FEATURES)
    data[:, -1] = np.tanh(data[:, :-1] @ rng.normal(size=(NUM_FEATURES, 4))).sum(1)
    return data


def init(key):
    first, last = jax.random.split(key)
    return {"in": jax.random.normal(first, (NUM_FEATURES, 64)) / 4, "out": jax.random.normal(last, (64,)) / 8}


def loss_fn(params, row):
    return (jnp.tanh(row[:-1] @ params["in"]) @ params["out"] - row[-1]) ** 2


@jax.jit
def batch_loss(params, rows):
    return jnp.mean(jax.vmap(loss_fn, (None, 0))(params, rows))


def train(steps, learning_rate=0.8, score_at=(200, 1000, 2000), **options):
    folder = tempfile.TemporaryDirectory()
    data = write_data(pathlib.Path(folder.name) / "rows.f32")
    params = init(jax.random.key(0))
    grad_fn = issgd_jax.value_grad_and_norms(loss_fn)  # was: grad_fn = jax.grad(batch_loss)
    sampler = issgd_jax.Sampler(len(data), batch_size=64, **options)  # +
    state = sampler.init(seed=0)  # was: rng = np.random.default_rng(0)
    prefetch = issgd_jax.Prefetch(sampler, data, depth=2)  # +
    for number in range(steps):
        if number in score_at:  # +
            scores = issgd_jax.score_all(issgd_jax.per_example_grad_norms(loss_fn), params, data, progress=False)  # +
            state = sampler.ingest(state, np.arange(len(data)), scores, scored_at=number)  # +
        state, drawn, rows = prefetch.draw(state)  # was: rows = data[rng.integers(len(data), size=64)]
        _, grads, norms = grad_fn(params, drawn.importance_weights, rows)  # was: grads = grad_fn(params, rows)
        params = jax.tree.map(lambda p, g: p - learning_rate * g, params, grads)
        state = sampler.update(state, drawn, norms)  # +
    figures = {"loss": float(np.mean([batch_loss(params, rows) for rows in np.split(data, 20)]))}
    figures |= sampler.metrics(state)  # +
    folder.cleanup()
    return figures


def main(steps=3000):
    begin = time.perf_counter()
    ours = train(steps)
    middle = time.perf_counter()
    uniform = train(steps, score_at=(), proposal=issgd_jax.Uniform())
    print(f"{steps:,} steps                   importance sampling      uniform")
    print(f"loss of the training set {ours['loss']:22.2e} {uniform['loss']:12.2e}")
    print(f"seconds, with compilation {middle - begin:21.1f} {time.perf_counter() - middle:12.1f}")
    ratio, equivalent = ours["loss"] / uniform["loss"], ours["equivalent_batch"]
    print(f"Loss: {ratio:.2f} times uniform's. Second moment: that of {equivalent:.0f} uniform examples, not 64.")
    return ours | {"uniform_loss": uniform["loss"]}


if __name__ == "__main__":
    main()
