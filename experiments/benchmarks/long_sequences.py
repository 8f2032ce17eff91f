"""Gradient norms of long sequences: time, and memory of the compiled programs.

    python -m experiments.benchmarks.long_sequences [--lengths=512,1024] [--models=dense]

Pairs of uses in blocks beside all pairs together, beside gradients that are formed, and beside `vmap(grad)`. Times are
medians over calls in turn in one process; memory is what XLA plans for temporaries. Prints a table and writes
results/long_sequences.json.
"""

import argparse
import contextlib
import statistics
import sys
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np

from experiments.benchmarks.environment import RESULTS, path_argument, save_results
from experiments.benchmarks.gradnorm import names_among
from experiments.benchmarks.gradnorm_models import transformer
from experiments.benchmarks.measuring import median_ratio, paired_seconds
from issgd_jax.gradnorm import cost, pairs, per_example_grad_norms, value_grad_and_norms

BATCH_SIZE, WIDTH = 2, 2048
LENGTHS = ("512", "1024", "2048", "4096")


def dense(length):
    """Makes one matrix 2048 × 2048 that is applied to each of T rows, which an earlier layer computes."""
    rng = np.random.default_rng(0)
    draw = lambda *shape: rng.standard_normal(shape).astype(np.float32)  # noqa: E731
    batch = draw(BATCH_SIZE, length, WIDTH), draw(BATCH_SIZE, length, WIDTH)
    return draw(WIDTH, WIDTH), batch, lambda w, x, slopes: jnp.sum((jnp.abs(x) @ w) * jnp.abs(slopes))


def two_layers(length):
    """Makes a transformer of 2 layers of width 256, with 4 heads; the head is the embedding transposed."""
    return transformer(BATCH_SIZE, length, width=256, depth=2)


MODELS = {"dense": dense, "transformer": two_layers}
# All pairs together: as if every sequence were one block.
TOGETHER = {"pairs.BLOCK": sys.maxsize}


def always(chosen):
    return lambda x, summed=False: chosen


# {method: (transformation, what is replaced in issgd_jax.gradnorm while it is traced)}
METHODS = {
    "norms": (per_example_grad_norms, {}),
    "norms, all pairs together": (per_example_grad_norms, TOGETHER),
    # Of one matrix, whatever is cheapest.
    "norms, pairs in blocks only": (per_example_grad_norms, {"cost.by_gram": always(True)}),
    "norms, all pairs together only": (per_example_grad_norms, {"cost.by_gram": always(True)} | TOGETHER),
    "norms, formed only": (per_example_grad_norms, {"cost.by_gram": always(False)}),
    "value_grad_and_norms": (value_grad_and_norms, {}),
    "value_grad_and_norms, by the norms' rules": (
        value_grad_and_norms,
        {"cost.by_gram": lambda x, summed=False: BY(x)},
    ),
    "vmap(grad)": (None, {}),
    "plain step": (None, {}),
}
BY = cost.by_gram


def vmap_grad(loss_fn):
    """Returns norms of gradients that are formed, one example at a time, the fastest for long sequences."""

    def norm(params, *example):
        return jnp.sqrt(sum(jnp.vdot(g, g) for g in jax.tree.leaves(jax.grad(loss_fn)(params, *example))))

    return lambda params, *batch: jax.lax.map(lambda example: norm(params, *example), batch)


def plain_step(loss_fn):
    def mean_loss(params, *batch):
        return jnp.mean(jax.lax.map(lambda example: loss_fn(params, *example), batch))

    return jax.value_and_grad(mean_loss)


def compiled(method, loss_fn, params, batch):
    """Returns a function without arguments that runs the compiled method, and its bytes of temporaries."""
    transform, replaced = METHODS[method]
    if transform is None:
        function, args = {"vmap(grad)": vmap_grad, "plain step": plain_step}[method](loss_fn), (params, *batch)
    else:
        # A loss of its own: what is traced for another method must not be used again.
        function = transform(lambda *args: loss_fn(*args))
        weights = (jnp.ones(BATCH_SIZE),) if transform is value_grad_and_norms else ()
        args = params, *weights, *batch
    with contextlib.ExitStack() as stack:
        for name, value in replaced.items():
            stack.enter_context(mock.patch(f"issgd_jax.gradnorm.{name}", value))
        program = jax.jit(function).lower(*args).compile()
    return lambda: jax.block_until_ready(program(*args)), program.memory_analysis().temp_size_in_bytes


def measure(model, length, options) -> dict:
    params, batch, loss_fn = jax.tree.map(
        lambda x: jnp.asarray(x) if isinstance(x, np.ndarray) else x, MODELS[model](length)
    )
    names = [name for name in METHODS if model == "dense" or not name.endswith("only")]
    programs = {name: compiled(name, loss_fn, params, batch) for name in names}
    results = {name: {"temporary_bytes": programs[name][1]} for name in names}
    if model == "transformer" and length > options.timed:
        return results
    seconds = paired_seconds({name: run for name, (run, _) in programs.items()}, options.pairs, options.seconds)
    for name in names:
        results[name]["ms"] = 1e3 * statistics.median(seconds[name])
        results[name]["ratio"] = median_ratio(seconds, name, "plain step")
        results[name]["calls"] = len(seconds[name])
    return results


def parse():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=names_among(MODELS), default=list(MODELS), help="separated by commas")
    parser.add_argument("--lengths", type=names_among(LENGTHS), default=list(LENGTHS), help="separated by commas")
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=60.0, help="limit on the calls, of which there are at least 3")
    parser.add_argument("--timed", type=int, default=4096, help="longest sequence of a transformer that is timed")
    parser.add_argument("--results", type=path_argument, default=RESULTS / "long_sequences.json")
    return parser.parse_args()


def main():
    options, results = parse(), {}
    for model in options.models:
        for length in map(int, options.lengths):
            results.setdefault(model, {})[length] = measure(model, length, options)
            print(f"{model}, T = {length}{'ms':>42}{'ratio':>8}{'MB':>10}", flush=True)
            for name, row in results[model][length].items():
                milliseconds, ratio = row.get("ms", np.nan), row.get("ratio", np.nan)
                print(f"  {name:<46}{milliseconds:10.1f}{ratio:8.2f}{row['temporary_bytes'] / 1e6:10.1f}", flush=True)
    command = " ".join(["python -m experiments.benchmarks.long_sequences", *sys.argv[1:]])
    save_results(options.results, command, results, batch_size=BATCH_SIZE, block=pairs.BLOCK)


if __name__ == "__main__":
    main()
