"""Cost of evenly spaced visits: draw 256 examples and write their new v, against the same with a table of sums.

    python -m experiments.benchmarks.visits [--sizes=60000,573000,10000000,100000000] [--pairs=25]

Prints medians of microseconds a cycle over pairs of blocks in one process, their ratio, and bytes an example. Writes
results/visits.json.
"""

import argparse
import functools
import itertools
import sys

import jax
import jax.numpy as jnp
import numpy as np

from experiments.benchmarks.environment import RESULTS, path_argument, save_results
from experiments.benchmarks.measuring import median_ratio, paired_seconds
from issgd_jax import sampling
from issgd_jax.sampling import visits as visits_lib
from issgd_jax.sampling.in_place import order_after

DRAWN, BLOCK = 256, 100  # examples in a cycle, cycles timed together
SIZES = (60_000, 573_000, 10**7, 10**8)


@functools.partial(jax.jit, donate_argnums=0)
def table_cycle(table, v, number):
    """Draws systematically from the table, and writes v of what was drawn."""
    indices, importance_weights = sampling.draw(jax.random.key(number), table, DRAWN)
    return table.write(order_after(indices, importance_weights), v), importance_weights


@functools.partial(jax.jit, donate_argnums=0)
def visits_cycle(visits, v, number):
    """Visits the examples that are due, and writes their deadlines by v."""
    indices, importance_weights = visits_lib.draw(visits, number.astype(jnp.uint32), DRAWN)
    return visits_lib.write(visits_lib.visit(visits, indices), indices, v, arrived=True), importance_weights


def repeated(cycle, state, minibatches):
    """Returns a function that does BLOCK cycles."""
    minibatches = itertools.cycle(minibatches)

    def run():
        nonlocal state
        for _ in range(BLOCK):
            state, importance_weights = cycle(state, *next(minibatches))
        importance_weights.block_until_ready()

    return run


def measure(num_examples: int, num_pairs: int) -> dict:
    """Returns microseconds, their ratio, and bytes an example at one size."""
    rng = np.random.default_rng(0)
    v = jnp.asarray(rng.lognormal(0, 1, num_examples).astype(np.float32))
    new = [(jnp.asarray(rng.lognormal(0, 1, DRAWN).astype(np.float32)), jnp.int32(k)) for k in range(16)]
    states = {
        "table": sampling.build_table(v),
        "visits": visits_lib.rebuild(visits_lib.init(jax.random.key(0), num_examples), v),
    }
    num_bytes = {name: sum(x.nbytes for x in jax.tree.leaves(state)) for name, state in states.items()}
    cycles = {"table": table_cycle, "visits": visits_cycle}
    runs = {name: repeated(cycles[name], state, new) for name, state in states.items()}
    seconds = paired_seconds(runs, num_pairs)
    return {
        **{f"{name}_microseconds": 1e6 * float(np.median(times)) / BLOCK for name, times in seconds.items()},
        "visits_to_table": median_ratio(seconds, "visits", "table"),
        "pairs": len(seconds["table"]),
        **{f"{name}_bytes_an_example": size / num_examples for name, size in num_bytes.items()},
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=lambda text: [int(size) for size in text.split(",")], default=SIZES)
    parser.add_argument("--pairs", type=int, default=25)
    parser.add_argument("--results", type=path_argument, default=RESULTS / "visits.json")
    options = parser.parse_args()
    results = {}
    for size in options.sizes:
        results[f"N = {size:,}"] = result = measure(size, options.pairs)
        print(f"N = {size:,}", *(f"  {name:<28}{value:10.2f}" for name, value in result.items()), sep="\n", flush=True)
    command = " ".join(["python -m experiments.benchmarks.visits", *sys.argv[1:]])
    save_results(options.results, command, results)


if __name__ == "__main__":
    main()
