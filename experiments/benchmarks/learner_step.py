"""What importance sampling costs the learner: its step against the same step with uniform sampling.

    python -m experiments.benchmarks.learner_step

Prints, for two sizes of network and data, medians over pairs of blocks (A B A B ... in one process) of

- `step`: draw, gather, weigh, update, against the same with uniform draws and importance weights of one;
- `step + refresh`: the same with the norms of the minibatch computed and entering the store;
- `step + refresh + take_in`: the same with one round of scores entering the store every 32 steps (the scoring itself is
the workers');
- memory on the learner's device that the uniform program does not need, in bytes an example, beside one copy of the
parameters.

Images are random bytes: times do not depend on their values. Writes results/learner_step.json.
"""

import json
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
from tqdm import tqdm

from experiments.benchmarks.environment import RESULTS, hardware
from experiments.benchmarks.measuring import median_ratio
from issgd_jax.learning import learner
from issgd_jax.provenance import versions
from issgd_jax.sampling import proposal
from issgd_jax.sampling.calibrated import Calibrated
from issgd_jax.task import losses, models

STEPS_PER_ROUND, CHUNK_SIZE = 32, 3 * 2048

CASES = {
    "digits 64-128x2-10, N = 1,437, B = 16": ((8, 8, 1), (128, 128), 1437, 16, 256, 101),
    "svhn 3072-2048x4-10, N = 573,000, B = 128": ((32, 32, 3), (2048,) * 4, 573_000, 128, 8, 25),
}


def measure(shape, hidden_sizes, num_examples, batch_size, steps_per_block, num_pairs) -> dict:
    """Medians of pairwise ratios and times for one size."""
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (num_examples, *shape), np.uint8)
    examples = jax.device_put((images, rng.integers(0, 10, num_examples, np.int32)))
    model = models.mlp(10, hidden_sizes=hidden_sizes)
    params = model.init(jax.random.key(0), jnp.zeros(shape))

    def loss_fn(params, image, label):
        return losses.example_loss(model.apply(params, (image - 128.0) / 64.0), label)

    optimizer = optax.sgd(1e-4, momentum=0.9, nesterov=True)
    options = {"batch_size": batch_size, "seed": 0}
    step = learner.make_train_step(loss_fn, optimizer, refresh=False, **options)
    refreshing = learner.make_train_step(loss_fn, optimizer, **options)
    uniform, weighted = proposal.Uniform(), jax.device_put(proposal.Mixture(Calibrated()))
    scores = rng.lognormal(0, 1.5, num_examples).astype(np.float32)
    scored = learner.init_sampler(weighted, num_examples)
    scored = learner.take_in(
        weighted, scored, jnp.arange(num_examples), scores, scored_at=jnp.int32(0), step=jnp.int32(1)
    )
    chunk = min(CHUNK_SIZE, num_examples // 4)
    round_ = jnp.arange(chunk), jnp.asarray(scores[:chunk])

    def new_state(drawn_from):
        sampler = jax.tree.map(
            jnp.copy, learner.init_sampler(uniform, num_examples) if drawn_from is uniform else scored
        )
        return learner.init_train_state(jax.tree.map(jnp.copy, params), optimizer), sampler

    def block(step, drawn_from, rounds=False):
        def run(states):
            state, sampler = states
            for i in range(steps_per_block):
                if rounds and i % STEPS_PER_ROUND == 0:
                    times = {"scored_at": jnp.int32(i), "step": jnp.int32(i + 1)}
                    sampler = learner.take_in(drawn_from, sampler, *round_, **times)
                state, sampler, _ = step(state, sampler, drawn_from, examples)
            return state, sampler

        return run, new_state(drawn_from)

    blocks = {
        "uniform": block(step, uniform),
        "step": block(step, weighted),
        "step + refresh": block(refreshing, weighted),
        "step + refresh + take_in": block(refreshing, weighted, rounds=True),
    }
    seconds = paired_blocks(blocks, num_pairs)
    return {
        **{name: median_ratio(seconds, name, "uniform") for name in blocks if name != "uniform"},
        **{f"{name}, us": 1e6 * statistics.median(times) / steps_per_block for name, times in seconds.items()},
        "pairs": num_pairs,
        "steps_per_block": steps_per_block,
        **memory(
            refreshing, new_state(weighted), new_state(uniform), examples, weighted, uniform, round_, num_examples
        ),
    }


def paired_blocks(blocks, num_pairs) -> dict[str, list[float]]:
    """Seconds of each block, the blocks in turn, the order rotated, after one warm-up of each."""
    seconds = {name: [] for name in blocks}
    states = {name: jax.block_until_ready(run(start)) for name, (run, start) in blocks.items()}
    names = list(blocks)
    for i in tqdm(range(num_pairs), leave=False):
        for name in names[i % len(names) :] + names[: i % len(names)]:
            start = time.perf_counter()
            states[name] = jax.block_until_ready(blocks[name][0](states[name]))
            seconds[name].append(time.perf_counter() - start)
    return seconds


def memory(step, weighted_states, uniform_states, examples, weighted, uniform, round_, num_examples) -> dict:
    """Bytes an example: what the sampler holds, what a take_in needs beside it, and how much the highest peak grows."""
    _, sampler = weighted_states
    held = sum(leaf.nbytes for leaf in jax.tree.leaves(sampler))
    in_uniform_step = beside_arguments(step, *uniform_states, uniform, examples)
    in_step = beside_arguments(step, *weighted_states, weighted, examples)
    now = jnp.int32(1)
    in_take_in = beside_arguments(learner.take_in, weighted, sampler, *round_, scored_at=now, step=now)
    return {
        "held_bytes_an_example": held / num_examples,
        "beside_in_take_in_bytes_an_example": in_take_in / num_examples,
        "peak_growth_bytes_an_example": (held + max(in_step, in_take_in) - in_uniform_step) / num_examples,
    }


def beside_arguments(function, *arguments, **keywords) -> int:
    """Bytes that a compiled program needs beside its arguments: temporaries, and outputs without a donated place."""
    memory = function.lower(*arguments, **keywords).compile().memory_analysis()
    return memory.temp_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes


def main():
    results = {}
    for name, case in CASES.items():
        results[name] = measure(*case)
        print(name)
        for key, value in results[name].items():
            print(f"  {key:<40}{value:10.3f}" if isinstance(value, float) else f"  {key:<40}{value:10d}")
    record = {
        "command": "python -m experiments.benchmarks.learner_step",
        "hardware": hardware(),
        "versions": versions(),
        "results": results,
    }
    (RESULTS / "learner_step.json").write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
