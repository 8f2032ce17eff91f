"""Cost of data on the host: steps with `Prefetch` against steps whose examples are all on the device.

    python -m experiments.benchmarks.prefetch [--pairs=41] [--steps=100]

One step is a draw, its batch, gradient and norms, SGD with momentum, and the update of the sampler: MLP 784-256x4-10,
batches of 128. Prints medians over pairs of blocks of steps, in one process, in alternating order:

- `resident`: one compiled function, which draws and gathers from arrays on the device;
- `prefetch`: `Prefetch.draw` with 2 draws ahead, then a compiled step;
- `depth 0`: the same without draws ahead, so that every step waits for its batch;
- `gather`: of the rows on the host alone.

Data are random bytes of the size of Fashion-MNIST, 60,000 images in memory, and 200,000 in a memory-mapped file. Times
do not depend on their values. Writes results/prefetch.json.
"""

import argparse
import functools
import pathlib
import statistics
import sys
import tempfile
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.benchmarks.environment import RESULTS, path_argument, save_results
from experiments.benchmarks.measuring import median_ratio, paired_seconds
from issgd_jax import Prefetch, Sampler, value_grad_and_norms
from issgd_jax.loading.source import as_source
from issgd_jax.task import losses, models

SHAPE, HIDDEN_SIZES, BATCH_SIZE = (28, 28, 1), (256,) * 4, 128
CASES = {"60,000 images in memory": 60_000, "200,000 images in a file": 200_000}

MODEL = models.mlp(10, hidden_sizes=HIDDEN_SIZES)
OPTIMIZER = optax.sgd(1e-4, momentum=0.9)


def loss_fn(params, image, label):
    return losses.example_loss(MODEL.apply(params, (image - 128.0) / 64.0), label)


def learn(sampler, train_state, sampler_state, drawn, batch):
    """Returns the states after one update."""
    params, opt_state = train_state
    _, gradient, norms = value_grad_and_norms(loss_fn)(params, drawn.importance_weights, *batch)
    updates, opt_state = OPTIMIZER.update(gradient, opt_state)
    return (optax.apply_updates(params, updates), opt_state), sampler.update(sampler_state, drawn, norms)


prefetched_step = jax.jit(learn, donate_argnums=(1, 2))


@functools.partial(jax.jit, donate_argnums=(1, 2))
def resident_step(sampler, train_state, sampler_state, data):
    sampler_state, drawn = sampler.draw(sampler_state)
    return learn(sampler, train_state, sampler_state, drawn, jax.tree.map(lambda x: x[drawn.indices], data))


def new_states(sampler):
    """Returns states of learner and sampler that may be donated; all examples are scored."""
    params = MODEL.init(jax.random.key(0), jnp.zeros(SHAPE))
    scores = np.random.default_rng(1).lognormal(0, 1.5, sampler.num_examples).astype(np.float32)
    state = sampler.ingest(sampler.init(0), np.arange(sampler.num_examples), scores, 0)
    return jax.tree.map(jnp.copy, ((params, OPTIMIZER.init(params)), state))


def measure(data, num_pairs: int, num_steps: int) -> dict:
    """Returns medians of times and pairwise ratios for arrays on the host."""
    num_examples = len(data[0])
    sampler, on_device = jax.device_put(Sampler(num_examples, BATCH_SIZE)), jax.device_put(data)
    source, rng = as_source(data), np.random.default_rng(2)
    names = ("resident", "prefetch", "depth 0")
    states = {name: new_states(sampler) for name in names}
    with Prefetch(sampler, source) as ahead, Prefetch(sampler, source, depth=0) as waiting:
        prefetches = {"prefetch": ahead, "depth 0": waiting}

        def block(name):
            train_state, sampler_state = states[name]
            for _ in range(num_steps):
                if name in prefetches:
                    sampler_state, drawn, batch = prefetches[name].draw(sampler_state)
                    train_state, sampler_state = prefetched_step(sampler, train_state, sampler_state, drawn, batch)
                else:
                    train_state, sampler_state = resident_step(sampler, train_state, sampler_state, on_device)
            states[name] = jax.block_until_ready((train_state, sampler_state))

        seconds = paired_seconds({name: functools.partial(block, name) for name in names}, num_pairs)
    return {
        **{f"{name} ÷ resident": median_ratio(seconds, name, "resident") for name in prefetches},
        **{f"{name}, us": 1e6 * statistics.median(times) / num_steps for name, times in seconds.items()},
        "gather, us": 1e6 * statistics.median(gather_seconds(source, rng) for _ in range(200)),
        "pairs": num_pairs,
        "steps_per_block": num_steps,
    }


def gather_seconds(source, rng) -> float:
    indices = rng.integers(0, source.num_examples, BATCH_SIZE)
    start = time.perf_counter()
    source.gather(indices)
    return time.perf_counter() - start


def make_data(num_examples: int, folder: pathlib.Path | None):
    """Returns images and labels; the images in a file of the folder, if there is one."""
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (num_examples, *SHAPE), np.uint8)
    if folder:
        images.tofile(folder / "images")
        images = np.memmap(folder / "images", np.uint8, "r", shape=images.shape)
    return images, rng.integers(0, 10, num_examples, np.int32)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=41)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--results", type=path_argument, default=RESULTS / "prefetch.json")
    options = parser.parse_args()
    results = {}
    for name, num_examples in CASES.items():
        with tempfile.TemporaryDirectory() as folder:
            data = make_data(num_examples, pathlib.Path(folder) if "file" in name else None)
            results[name] = measure(data, options.pairs, options.steps)
        print(name)
        for key, value in results[name].items():
            print(f"  {key:<24}{value:10.3f}" if isinstance(value, float) else f"  {key:<24}{value:10d}")
    command = " ".join(["python -m experiments.benchmarks.prefetch", *sys.argv[1:]])
    save_results(options.results, command, results)


if __name__ == "__main__":
    main()
