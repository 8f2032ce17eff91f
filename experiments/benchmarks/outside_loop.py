"""Cost of the sampler in a loop of one's own: against the trainer's step, and as the data grows.

    python -m experiments.benchmarks.outside_loop

Prints medians over pairs of blocks (A B A B ... in one process) of

- one step of the README's loop, compiled by the user's `jit`, against the trainer's own step, both with the learner's
  refresh, at the sizes of Fashion-MNIST with the study's MLP; and the same loop with the three calls made one by one;
- `draw` and `update` alone, compiled together, with N = 10^7 examples against 10^5, rebuilds of the table included.

Images are random bytes: times do not depend on their values. Writes results/outside_loop.json.
"""

import statistics

import jax
import jax.numpy as jnp
import numpy as np
import optax

import issgd_jax
from experiments.benchmarks.environment import RESULTS, save_results
from experiments.benchmarks.measuring import median_ratio, paired_seconds
from issgd_jax.learning.learner import Learner, TrainState
from issgd_jax.task import losses, models

NUM_EXAMPLES, BATCH_SIZE, STEPS_PER_ROUND = 60_000, 128, 32
STEPS_A_BLOCK, NUM_PAIRS = 64, 60
SIZES, CALLS_A_BLOCK = (10**5, 10**7), 5000


class Loops:
    """The same training, written three ways; each function runs one block of steps."""

    def __init__(self):
        rng = np.random.default_rng(0)
        images = rng.integers(0, 256, (NUM_EXAMPLES, 28, 28, 1), np.uint8)
        self._images, self._labels = jax.device_put((images, rng.integers(0, 10, NUM_EXAMPLES, np.int32)))
        model = models.mlp(10, hidden_sizes=(256,) * 4)
        params = model.init(jax.random.key(0), jnp.zeros((28, 28, 1)))
        optimizer = optax.sgd(0.001, momentum=0.9, nesterov=True)

        def loss_fn(params, image, label):
            return losses.example_loss(model.apply(params, (image - 128.0) / 64.0), label)

        def apply(params, opt_state, gradient):
            updates, opt_state = optimizer.update(gradient, opt_state, params)
            return optax.apply_updates(params, updates), opt_state

        grad_fn = issgd_jax.value_grad_and_norms(loss_fn)
        self._sampler = issgd_jax.Sampler(NUM_EXAMPLES, BATCH_SIZE, rebuild_every=STEPS_PER_ROUND)

        def step(params, opt_state, state, images, labels):
            state, drawn = self._sampler.draw(state)
            batch = images[drawn.indices], labels[drawn.indices]
            batch_losses, gradient, norms = grad_fn(params, drawn.importance_weights, *batch)
            params, opt_state = apply(params, opt_state, gradient)
            return params, opt_state, self._sampler.update(state, drawn, norms), jnp.mean(batch_losses)

        self._grad_fn, self._apply = grad_fn, jax.jit(apply, donate_argnums=(0, 1))
        self._step = jax.jit(step, donate_argnums=(0, 1, 2))
        self._trainer_step = Learner(loss_fn, optimizer).compile()
        # As the trainer does, its loop rebuilds the table itself.
        self._trainer_sampler = jax.device_put(issgd_jax.Sampler(NUM_EXAMPLES, BATCH_SIZE, rebuild_every=0))

        def start():
            return jax.tree.map(jnp.copy, (params, optimizer.init(params), self._sampler.init(0)))

        self._outside, self._eager, (first, opt_state, self._trainer_sampler_state) = start(), start(), start()
        self._train_state = TrainState(first, opt_state, jnp.int32(0))

    def outside(self) -> None:
        """A step of the user's own, compiled as a whole."""
        for _ in range(STEPS_A_BLOCK):
            *self._outside, loss = self._step(*self._outside, self._images, self._labels)
        jax.block_until_ready(loss)

    def eager(self) -> None:
        """The same calls, one by one."""
        params, opt_state, state = self._eager
        for _ in range(STEPS_A_BLOCK):
            state, drawn = self._sampler.draw(state)
            batch = self._images[drawn.indices], self._labels[drawn.indices]
            _, gradient, norms = self._grad_fn(params, drawn.importance_weights, *batch)
            params, opt_state = self._apply(params, opt_state, gradient)
            state = self._sampler.update(state, drawn, norms)
        self._eager = jax.block_until_ready((params, opt_state, state))

    def trainer(self) -> None:
        """The trainer's step."""
        examples, sampler = (self._images, self._labels), self._trainer_sampler
        for i in range(STEPS_A_BLOCK):
            if i % STEPS_PER_ROUND == 0:
                self._trainer_sampler_state = sampler.rebuild(self._trainer_sampler_state)
            self._train_state, self._trainer_sampler_state, metrics = self._trainer_step(
                self._train_state, self._trainer_sampler_state, sampler, examples
            )
        jax.block_until_ready(metrics)


def draws_and_updates(num_examples: int):
    """Returns a function that draws and updates as often as a block has calls."""
    sampler = issgd_jax.Sampler(num_examples, BATCH_SIZE)
    scores = np.random.default_rng(0).lognormal(0, 1.5, num_examples).astype(np.float32)

    def call(state):
        state, drawn = sampler.draw(state)
        return sampler.update(state, drawn, 1 + jnp.abs(jnp.sin(drawn.indices.astype(jnp.float32))))

    step = jax.jit(call, donate_argnums=0)
    states = [sampler.ingest(sampler.init(0), np.arange(num_examples), scores, 0)]

    def block() -> None:
        for _ in range(CALLS_A_BLOCK):
            states[0] = step(states[0])
        jax.block_until_ready(states[0])

    return block


def main():
    loops = Loops()
    steps = paired_seconds({name: getattr(loops, name) for name in ("trainer", "outside", "eager")}, NUM_PAIRS)
    draws = paired_seconds({f"N = {size:,}": draws_and_updates(size) for size in SIZES}, 20)
    small, large = draws
    results = {
        "outside / trainer": median_ratio(steps, "outside", "trainer"),
        "eager / trainer": median_ratio(steps, "eager", "trainer"),
        **{f"{name}, us a step": 1e6 * statistics.median(x) / STEPS_A_BLOCK for name, x in steps.items()},
        f"draw + update, {large} / {small}": median_ratio(draws, large, small),
        **{f"draw + update, {name}, us": 1e6 * statistics.median(x) / CALLS_A_BLOCK for name, x in draws.items()},
        "pairs": NUM_PAIRS,
        "steps_per_block": STEPS_A_BLOCK,
        "calls_per_block": CALLS_A_BLOCK,
    }
    for name, value in results.items():
        print(f"{name:<48}{value:12.3f}")
    command = "python -m experiments.benchmarks.outside_loop"
    save_results(RESULTS / "outside_loop.json", command, results)


if __name__ == "__main__":
    main()
