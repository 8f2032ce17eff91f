"""Digits with flax nnx: a model of batches with dropout and Rngs, split into parameters and the rest.

python examples/flax_nnx.py
"""
# Importance sampling: 7 lines added (# +), 4 changed (# was: the ordinary line).

import time

import jax
import jax.numpy as jnp
import optax
import sklearn.datasets
from flax import nnx

import issgd_jax  # +


class Model(nnx.Module):
    def __init__(self, rngs):
        self.conv = nnx.Conv(1, 16, (3, 3), strides=2, rngs=rngs)
        self.norm = nnx.LayerNorm(16, rngs=rngs)
        self.hidden = nnx.Linear(16 * 4 * 4, 64, rngs=rngs)
        self.dropout = nnx.Dropout(0.1, rngs=rngs)
        self.out = nnx.Linear(64, 10, rngs=rngs)

    def __call__(self, images):
        x = nnx.relu(self.norm(self.conv(images[..., None])))
        x = nnx.relu(self.hidden(x.reshape(len(images), -1)))
        return self.out(self.dropout(x))


def make_data():
    digits = sklearn.datasets.load_digits()
    return jnp.asarray(digits.images / 16, jnp.float32), jnp.asarray(digits.target, jnp.int32)


def cross_entropy(model, images, labels):
    return optax.softmax_cross_entropy_with_integer_labels(model(images), labels).mean()


def train(steps, learning_rate=0.004, **options):
    images, labels = make_data()
    graph, params, rest = nnx.split(Model(nnx.Rngs(0)), nnx.Param, ...)
    optimizer = optax.adam(learning_rate)
    opt_state = optimizer.init(params)

    def loss_fn(params, images, labels, key):
        model = nnx.merge(graph, params, rest, copy=True)
        nnx.reseed(model, default=key)  # the stream of nnx.Rngs(0): other names change nothing
        return cross_entropy(model, images, labels)

    @jax.jit
    def update(params, opt_state, grads):
        updates, opt_state = optimizer.update(grads, opt_state)
        return optax.apply_updates(params, updates), opt_state

    example_loss = issgd_jax.per_example(loss_fn)  # +
    grad_fn = issgd_jax.value_grad_and_norms(example_loss, keyed=True)  # was: grad_fn = jax.jit(jax.grad(loss_fn))
    sampler = issgd_jax.Sampler(len(images), batch_size=64, **options)  # +
    state = sampler.init(seed=0)  # +
    for key in jax.random.split(jax.random.key(1), steps):
        state, drawn = sampler.draw(state)  # was: indices = jax.random.randint(key, (64,), 0, len(images))
        batch = images[drawn.indices], labels[drawn.indices]  # was: batch = images[indices], labels[indices]
        weights = drawn.importance_weights  # +
        _, grads, norms = grad_fn(params, weights, *batch, key=key)  # was: grads = grad_fn(params, *batch, key)
        params, opt_state = update(params, opt_state, grads)
        state = sampler.update(state, drawn, norms)  # +
    model = nnx.merge(graph, params, rest, copy=True)
    model.eval()
    figures = {"loss": float(cross_entropy(model, images, labels))}
    figures |= sampler.metrics(state)  # +
    return figures


def main(steps=1000):
    begin = time.perf_counter()
    ours = train(steps)
    middle = time.perf_counter()
    uniform = train(steps, proposal=issgd_jax.Uniform())
    print(f"{steps:,} steps                   importance sampling      uniform")
    print(f"loss of the training set {ours['loss']:22.5f} {uniform['loss']:12.5f}")
    print(f"seconds, with compilation {middle - begin:21.1f} {time.perf_counter() - middle:12.1f}")
    ratio, equivalent = ours["loss"] / uniform["loss"], ours["equivalent_batch"]
    print(f"Loss: {ratio:.2f} times uniform's. Second moment: that of {equivalent:.0f} uniform examples, not 64.")
    return ours | {"uniform_loss": uniform["loss"]}


if __name__ == "__main__":
    main()
