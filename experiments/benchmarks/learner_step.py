"""What importance sampling costs the learner: its step against the same step with uniform sampling.

    python -m experiments.benchmarks.learner_step

Prints, for two sizes of network and data, medians over pairs of blocks (A B A B ... in one process) of

- `step`: draw, gather, weigh, update, against the same with uniform draws and importance weights of one;
- `step + take_in`: the same with one round of scores entering the store every 32 steps (the scoring itself is the
workers');
- memory on the learner's device that the uniform program does not need, in bytes an example, beside one copy of the
parameters.

Images are random bytes: times do not depend on their values. Writes results/learner_step.json.
"""

import json
import os
import pathlib
import platform
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
from tqdm import tqdm

from issgd_jax import learner, losses, models, proposal
from issgd_jax.metrics import versions

RESULTS = pathlib.Path(__file__).parent / "results" / "learner_step.json"
STEPS_PER_ROUND, CHUNK_SIZE = 32, 3 * 2048

CASES = {
    "digits 64-128x2-10, N = 1,437, B = 16": ((8, 8, 1), (128, 128), 1437, 16, 256, 101),
    "svhn 3072-2048x4-10, N = 573,000, B = 128": ((32, 32, 3), (2048,) * 4, 573_000, 128, 32, 7),
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
    step = learner.make_train_step(loss_fn, optimizer, batch_size=batch_size, seed=0)
    uniform, weighted = proposal.Uniform(), jax.device_put(proposal.Calibrated())
    scores = rng.lognormal(0, 1.5, num_examples).astype(np.float32)
    sampler = learner.init_sampler(weighted, num_examples)
    sampler = learner.take_in(
        weighted, sampler, jnp.arange(num_examples), scores, scored_at=jnp.int32(0), step=jnp.int32(1)
    )
    chunk = min(CHUNK_SIZE, num_examples // 4)
    round_ = jnp.arange(chunk), jnp.asarray(scores[:chunk])
    uniform_table = learner.init_sampler(uniform, num_examples).table

    def new_state():
        return learner.init_train_state(jax.tree.map(jnp.copy, params), optimizer)

    def block_uniform(state):
        for _ in range(steps_per_block):
            state, _ = step(state, uniform_table, examples)
        return state

    def block_weighted(state):
        for _ in range(steps_per_block):
            state, _ = step(state, sampler.table, examples)
        return state

    def block_with_rounds(state):
        nonlocal sampler
        for i in range(steps_per_block):
            if i % STEPS_PER_ROUND == 0:
                sampler = learner.take_in(weighted, sampler, *round_, scored_at=jnp.int32(i), step=jnp.int32(i + 1))
            state, _ = step(state, sampler.table, examples)
        return state

    seconds = paired_blocks(
        {"uniform": block_uniform, "step": block_weighted, "rounds": block_with_rounds}, new_state, num_pairs
    )
    per_step = {name: 1e6 * statistics.median(times) / steps_per_block for name, times in seconds.items()}
    return {
        "step": statistics.median(a / b for a, b in zip(seconds["step"], seconds["uniform"], strict=True)),
        "step + take_in": statistics.median(a / b for a, b in zip(seconds["rounds"], seconds["uniform"], strict=True)),
        "uniform_us": per_step["uniform"],
        "step_us": per_step["step"],
        "step_take_in_us": per_step["rounds"],
        "pairs": num_pairs,
        "steps_per_block": steps_per_block,
        **memory(step, new_state(), sampler, uniform_table, examples, weighted, round_, num_examples),
    }


def paired_blocks(blocks, new_state, num_pairs) -> dict[str, list[float]]:
    """Seconds of each block, the blocks in turn, the order rotated, after one warm-up of each."""
    seconds = {name: [] for name in blocks}
    states = {name: jax.block_until_ready(block(new_state())) for name, block in blocks.items()}
    names = list(blocks)
    for i in tqdm(range(num_pairs), leave=False):
        for name in names[i % len(names) :] + names[: i % len(names)]:
            start = time.perf_counter()
            states[name] = jax.block_until_ready(blocks[name](states[name]))
            seconds[name].append(time.perf_counter() - start)
    return seconds


def memory(step, state, sampler, uniform_table, examples, weighted, round_, num_examples) -> dict:
    """Bytes an example: what the sampler holds, what a take_in needs beside it, and how much the highest peak grows."""
    held = sum(leaf.nbytes for leaf in jax.tree.leaves(sampler))
    in_uniform_step = beside_arguments(step, state, uniform_table, examples)
    in_step = beside_arguments(step, state, sampler.table, examples)
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
        "hardware": {
            "device": jax.devices()[0].device_kind,
            "machine": platform.machine(),
            "cores": len(os.sched_getaffinity(0)),
        },
        "versions": versions(),
        "results": results,
    }
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
