"""Linear regression in plain JAX: a few large rows carry most of the gradient, and importance sampling finds them.

python examples/regression.py
"""
# Importance sampling: 4 lines added (# +), 5 changed (# was: the ordinary line).

import time

import jax
import jax.numpy as jnp
import numpy as np

import issgd_jax  # +


def make_data(num_examples=10_000, num_features=16):
    rng = np.random.default_rng(0)
    scale = rng.lognormal(0, 1.25, (num_examples, 1))  # heavy tails
    x = scale * rng.normal(size=(num_examples, num_features)) / np.sqrt(num_features)
    y = x @ rng.normal(size=num_features) + 0.1 * rng.normal(size=num_examples)
    return jnp.asarray(x, jnp.float32), jnp.asarray(y, jnp.float32)


@jax.jit
def loss_fn(params, x, y):
    return jnp.mean((x @ params - y) ** 2)


def train(steps, learning_rate=0.005, **options):
    x, y = make_data()
    params = jnp.zeros(x.shape[1])
    grad_fn = issgd_jax.value_grad_and_norms(issgd_jax.per_example(loss_fn))  # was: grad_fn = jax.grad(loss_fn)
    sampler = issgd_jax.Sampler(len(x), batch_size=32, **options)  # +
    state = sampler.init(seed=0)  # was: rng = np.random.default_rng(0)
    for _ in range(steps):
        state, drawn = sampler.draw(state)  # was: indices = rng.integers(len(x), size=32)
        batch = x[drawn.indices], y[drawn.indices]  # was: batch = x[indices], y[indices]
        _, grads, norms = grad_fn(params, drawn.importance_weights, *batch)  # was: grads = grad_fn(params, *batch)
        params = params - learning_rate * grads
        state = sampler.update(state, drawn, norms)  # +
    least_squares, *_ = jnp.linalg.lstsq(x, y)
    figures = {"loss": float(loss_fn(params, x, y) - loss_fn(least_squares, x, y))}
    figures |= sampler.metrics(state)  # +
    return figures


def main(steps=2000):
    begin = time.perf_counter()
    ours = train(steps)
    middle = time.perf_counter()
    uniform = train(steps, proposal=issgd_jax.Uniform())
    print(f"{steps:,} steps                   importance sampling      uniform")
    print(f"loss above least squares {ours['loss']:22.1e} {uniform['loss']:12.1e}")
    print(f"seconds, with compilation {middle - begin:21.1f} {time.perf_counter() - middle:12.1f}")
    ratio, equivalent = ours["loss"] / uniform["loss"], ours["equivalent_batch"]
    print(f"Loss: {ratio:.2f} times uniform's. Second moment: that of {equivalent:.0f} uniform examples, not 32.")
    return ours | {"uniform_loss": uniform["loss"]}


if __name__ == "__main__":
    main()
