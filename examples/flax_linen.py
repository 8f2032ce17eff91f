"""Digits with flax linen: dropout with a random key for each example, batches that are dicts, the whole step in `jit`.

python examples/flax_linen.py
"""
# Importance sampling: 5 lines added (# +), 7 changed (# was: the ordinary line).

import time

import jax
import jax.numpy as jnp
import optax
import sklearn.datasets
from flax import linen as nn

import issgd_jax  # +


class Model(nn.Module):
    @nn.compact
    def __call__(self, image, train):
        x = image.reshape(len(image), -1)
        for _ in range(2):
            x = nn.relu(nn.Dense(128)(x))
            x = nn.Dropout(0.1, deterministic=not train)(x)
        return nn.Dense(10)(x)


def make_data():
    digits = sklearn.datasets.load_digits()
    return {"image": jnp.asarray(digits.images / 16, jnp.float32), "label": jnp.asarray(digits.target, jnp.int32)}


def take(data, indices):
    return jax.tree.map(lambda x: x[indices], data)


def train(steps, learning_rate=0.004, **options):
    data, model = make_data(), Model()
    num_examples = len(data["label"])
    params = model.init(jax.random.key(0), data["image"][:1], train=False)
    optimizer = optax.adam(learning_rate)

    def loss(params, batch, key=None):
        rngs = None if key is None else {"dropout": key}
        logits = model.apply(params, batch["image"], train=key is not None, rngs=rngs)
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"]).mean()

    grad_fn = issgd_jax.value_grad_and_norms(issgd_jax.per_example(loss), keyed=True)  # was: grad_fn = jax.grad(loss)
    sampler = issgd_jax.Sampler(num_examples, batch_size=64, **options)  # +

    @jax.jit
    def step(key, params, opt_state, state):  # was: def step(key, params, opt_state):
        state, drawn = sampler.draw(state)  # was: indices = jax.random.randint(key, (64,), 0, num_examples)
        weights = drawn.importance_weights  # +
        batch = take(data, drawn.indices)  # was: batch = take(data, indices)
        _, grads, norms = grad_fn(params, weights, batch, key=key)  # was: grads = grad_fn(params, batch, key)
        state = sampler.update(state, drawn, norms)  # +
        updates, opt_state = optimizer.update(grads, opt_state)
        params = optax.apply_updates(params, updates)
        return params, opt_state, state  # was: return params, opt_state

    carry = params, optimizer.init(params), sampler.init(seed=0)  # was: carry = params, optimizer.init(params)
    for key in jax.random.split(jax.random.key(1), steps):
        carry = step(key, *carry)
    params, *_ = carry
    figures = {"loss": float(loss(params, data))}
    figures |= sampler.metrics(carry[-1])  # +
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
