"""Checkpoints with Orbax: the sampler's state beside parameters and optimizer; a run that stops continues unchanged.

python examples/orbax_checkpoint.py
"""
# Importance sampling: 4 lines added (# +), 7 changed (# was: the ordinary line).

import tempfile
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import sklearn.datasets

import issgd_jax  # +


def make_data():
    x, y = sklearn.datasets.load_breast_cancer(return_X_y=True)
    x = (x - x.mean(0)) / x.std(0)
    return jnp.asarray(x, jnp.float32), jnp.asarray(y, jnp.float32)


def init(key, sizes=(30, 32, 1)):
    keys = jax.random.split(key, len(sizes))
    return [
        {"w": jax.random.normal(k, (m, n)) / np.sqrt(m), "b": jnp.zeros(n)} for k, m, n in zip(keys, sizes, sizes[1:])
    ]


@jax.jit
def loss_fn(params, x, y):
    for layer in params[:-1]:
        x = jax.nn.tanh(x @ layer["w"] + layer["b"])
    logits = x @ params[-1]["w"] + params[-1]["b"]
    return optax.sigmoid_binary_cross_entropy(logits[:, 0], y).mean()


def train(steps, manager=None, learning_rate=0.4, **options):
    """Trains from the last checkpoint of the manager, if it has one."""
    x, y = make_data()
    params = init(jax.random.key(0))
    optimizer = optax.sgd(learning_rate, momentum=0.9)
    grad_fn = issgd_jax.value_grad_and_norms(issgd_jax.per_example(loss_fn))  # was: grad_fn = jax.grad(loss_fn)
    sampler = issgd_jax.Sampler(len(x), batch_size=16, **options)  # +

    @jax.jit
    def step(key, params, opt_state, state):  # was: def step(key, params, opt_state):
        state, drawn = sampler.draw(state)  # was: indices = jax.random.randint(key, (16,), 0, len(x))
        batch = x[drawn.indices], y[drawn.indices]  # was: batch = x[indices], y[indices]
        _, grads, norms = grad_fn(params, drawn.importance_weights, *batch)  # was: grads = grad_fn(params, *batch)
        state = sampler.update(state, drawn, norms)  # +
        updates, opt_state = optimizer.update(grads, opt_state)
        params = optax.apply_updates(params, updates)
        return params, opt_state, state  # was: return params, opt_state

    carry = params, optimizer.init(params), sampler.init(seed=0)  # was: carry = params, optimizer.init(params)
    last = manager.latest_step() if manager else None
    if last is not None:
        carry = manager.restore(last, args=ocp.args.StandardRestore(carry))
    for number in range(last or 0, steps):
        carry = step(jax.random.key(number), *carry)
        if manager:
            manager.save(number + 1, args=ocp.args.StandardSave(carry))
    figures = {"loss": float(loss_fn(carry[0], x, y)), "restored_step": last or 0}
    figures |= sampler.metrics(carry[-1])  # +
    return figures


def main(steps=1500):
    begin = time.perf_counter()
    ours = train(steps)
    middle = time.perf_counter()
    uniform = train(steps, proposal=issgd_jax.Uniform())
    end = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        options = ocp.CheckpointManagerOptions(save_interval_steps=max(1, steps // 4), max_to_keep=2)
        with ocp.CheckpointManager(folder, options=options) as manager:
            train(int(0.6 * steps), manager)
        with ocp.CheckpointManager(folder, options=options) as manager:
            continued = train(steps, manager)
    if {**continued, "restored_step": 0} != ours:
        raise AssertionError(f"the continued run differs: {continued}, uninterrupted: {ours}")
    print(f"{steps:,} steps                   importance sampling      uniform")
    print(f"loss of the training set {ours['loss']:22.5f} {uniform['loss']:12.5f}")
    print(f"seconds, with compilation {middle - begin:21.1f} {end - middle:12.1f}")
    ratio, equivalent = ours["loss"] / uniform["loss"], ours["equivalent_batch"]
    print(f"Loss: {ratio:.2f} times uniform's. Second moment: that of {equivalent:.0f} uniform examples, not 16.")
    print(f"Stopped, and continued from step {continued['restored_step']:,}: the same loss and figures, bit by bit.")
    return continued | {"uniform_loss": uniform["loss"]}


if __name__ == "__main__":
    main()
