"""A rare class with equinox: `eqx.partition`, `eqx.combine`, and the whole step in `eqx.filter_jit`.

python examples/equinox_mlp.py
"""
# Importance sampling: 4 lines added (# +), 7 changed (# was: the ordinary line).

import time

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
import sklearn.datasets

import issgd_jax  # +


def make_data(num_examples=20_000):
    x, y = sklearn.datasets.make_classification(
        num_examples, n_features=20, n_informative=8, weights=[0.98], flip_y=0, class_sep=1.5, random_state=0
    )
    return jnp.asarray(x, jnp.float32), jnp.asarray(y, jnp.float32)


def train(steps, learning_rate=0.002, **options):
    x, y = make_data()
    model = eqx.nn.MLP(20, "scalar", width_size=64, depth=2, key=jax.random.key(0))
    params, static = eqx.partition(model, eqx.is_inexact_array)
    optimizer = optax.adam(learning_rate)

    def loss_fn(params, x, y):
        model = eqx.combine(params, static)
        return optax.sigmoid_binary_cross_entropy(jax.vmap(model)(x), y).mean()

    grad_fn = issgd_jax.value_grad_and_norms(issgd_jax.per_example(loss_fn))  # was: grad_fn = jax.grad(loss_fn)
    sampler = issgd_jax.Sampler(len(x), batch_size=64, **options)  # +

    @eqx.filter_jit
    def step(key, params, opt_state, state):  # was: def step(key, params, opt_state):
        state, drawn = sampler.draw(state)  # was: indices = jax.random.randint(key, (64,), 0, len(x))
        batch = x[drawn.indices], y[drawn.indices]  # was: batch = x[indices], y[indices]
        _, grads, norms = grad_fn(params, drawn.importance_weights, *batch)  # was: grads = grad_fn(params, *batch)
        state = sampler.update(state, drawn, norms)  # +
        updates, opt_state = optimizer.update(grads, opt_state)
        params = eqx.apply_updates(params, updates)
        return params, opt_state, state  # was: return params, opt_state

    carry = params, optimizer.init(params), sampler.init(seed=0)  # was: carry = params, optimizer.init(params)
    for key in jax.random.split(jax.random.key(1), steps):
        carry = step(key, *carry)
    params, *_ = carry
    figures = {"loss": float(loss_fn(params, x, y))}
    figures |= sampler.metrics(carry[-1])  # +
    return figures


def main(steps=1500):
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
