"""One size of the sampler's benchmark; started by `experiments.benchmarks.sampler`, prints one line of JSON.

A cycle is what a learner needs in one step: m scores are written, B examples are drawn in proportion to all scores, and
the probability of each is computed.
"""

import argparse
import itertools
import json
import math
import statistics

import jax
import jax.numpy as jnp
import numpy as np
from scipy import stats

from experiments.benchmarks.measuring import median_ratio, paired_seconds
from issgd_jax import sampling
from issgd_jax.sampling.store import ScoreStore

WRITTEN, DRAWN, BULK = 1024, 256, 100_000
TORCH_LIMIT = 2**24
BLOCK = 2e-2  # seconds of cycles timed together, so that each method has warm caches, as in a loop of its own


def ours(score, rounds):
    """Returns a cycle of this library: scores are written to store and table, and a minibatch is drawn."""
    num_examples = len(score)

    def cycle(store, table, indices, score, step, key):
        store, _ = store.write(indices, score, step)
        table = table.write(indices, store.at(indices)[0])
        return store, table, sampling.draw(key, table, DRAWN)

    cycle = jax.jit(cycle, donate_argnums=(0, 1))
    state = ScoreStore(jnp.array(score), jnp.zeros(num_examples, jnp.int32)), sampling.build_table(jnp.array(score))
    rounds = itertools.cycle(
        [(jnp.asarray(i), jnp.asarray(s), jnp.int32(k), jax.random.key(k)) for k, (i, s) in enumerate(rounds)]
    )

    def run():
        nonlocal state
        *state, drawn = cycle(*state, *next(rounds))
        drawn.importance_weights.block_until_ready()

    return run


def numpy_choice(score, rounds):
    rng, score, rounds = np.random.default_rng(0), score.astype(np.float64), itertools.cycle(rounds)

    def run():
        indices, new = next(rounds)
        score[indices] = new
        p = score / score.sum()
        drawn = rng.choice(len(score), DRAWN, p=p)
        return drawn, p[drawn]

    return run


def torch_multinomial(score, rounds):
    import torch

    score = torch.tensor(score)
    rounds = itertools.cycle([(torch.tensor(i, dtype=torch.int64), torch.tensor(s)) for i, s in rounds])

    def run():
        indices, new = next(rounds)
        score[indices] = new
        drawn = torch.multinomial(score, DRAWN, replacement=True)
        return drawn, score[drawn] / score.sum()

    return run


def cpprb(score, rounds):
    from cpprb import PrioritizedReplayBuffer

    buffer = PrioritizedReplayBuffer(len(score), {"example": {"dtype": np.int32}}, alpha=1.0, eps=0.0)
    for part in np.array_split(np.arange(len(score), dtype=np.int32), max(1, len(score) // 100_000)):
        buffer.add(example=part, priorities=score[part])
    rounds = itertools.cycle(rounds)

    def run():
        indices, new = next(rounds)
        buffer.update_priorities(indices, new)
        drawn = buffer.sample(DRAWN, beta=1.0)
        return drawn["indexes"], drawn["weights"]

    return run


def flashbax(score, rounds):
    from flashbax.buffers import sum_tree

    def cycle(tree, indices, score, key):
        tree = sum_tree.set_batch_bincount(tree, indices, score)
        drawn = sum_tree.stratified_sample(tree, DRAWN, key)
        return tree, (drawn, sum_tree.get_batch(tree, drawn) / tree.nodes[0])

    tree = sum_tree.init(len(score))
    write = jax.jit(sum_tree.set_batch_bincount, donate_argnums=0)
    for part in np.array_split(np.arange(len(score), dtype=np.int32), max(1, len(score) // 100_000)):
        tree = write(tree, part, score[part])
    cycle = jax.jit(cycle, donate_argnums=0)
    rounds = itertools.cycle([(jnp.asarray(i), jnp.asarray(s), jax.random.key(k)) for k, (i, s) in enumerate(rounds)])

    def run():
        nonlocal tree
        tree, (_, probabilities) = cycle(tree, *next(rounds))
        probabilities.block_until_ready()

    return run


def methods(num_examples) -> dict:
    supported = {"ours": ours}
    if num_examples <= 10**7:
        supported |= {"cpprb": cpprb, "flashbax": flashbax, "numpy.random.choice": numpy_choice}
        supported |= {"torch.multinomial": torch_multinomial} if num_examples <= TORCH_LIMIT else {}
    return supported


def cycles(num_examples, num_pairs) -> dict:
    rng = np.random.default_rng(0)
    score = rng.lognormal(0, 1, num_examples).astype(np.float32)
    rounds = [
        (rng.integers(0, num_examples, WRITTEN, np.int32), rng.lognormal(0, 1, WRITTEN).astype(np.float32))
        for _ in range(16)
    ]
    runs = {name: make(score, rounds) for name, make in methods(num_examples).items()}
    first = {name: statistics.median(times) for name, times in paired_seconds(runs, 5).items()}
    cycles_of = {name: math.ceil(BLOCK / seconds) for name, seconds in first.items()}
    blocks = {name: _repeated(run, cycles_of[name]) for name, run in runs.items()}
    seconds = paired_seconds(blocks, num_pairs, max_seconds=120)
    seconds = {name: [time / cycles_of[name] for time in times] for name, times in seconds.items()}
    return {
        "microseconds": {name: 1e6 * statistics.median(times) for name, times in seconds.items()},
        "ratio_to_ours": {name: median_ratio(seconds, name, "ours") for name in seconds if name != "ours"},
        "pairs": len(seconds["ours"]),
        "cycles_in_a_block": cycles_of,
    }


def _repeated(run, times):
    def run_repeatedly():
        for _ in range(times):
            run()

    return run_repeatedly


def bulk_write(num_examples) -> dict:
    """Measures scores a second in writes of 100,000 to store and table, and bytes an example."""
    rng = np.random.default_rng(0)
    indices = jnp.asarray(rng.permutation(num_examples)[:BULK].astype(np.int32))
    score = jnp.asarray(rng.lognormal(0, 1, BULK).astype(np.float32))

    def write(store, table, indices, score, step):
        store, _ = store.write(indices, score, step)
        return store, table.write(indices, store.at(indices)[0])

    write = jax.jit(write, donate_argnums=(0, 1))
    state = ScoreStore.init(num_examples), sampling.build_table(jnp.ones(num_examples))

    def run():
        nonlocal state
        state = jax.block_until_ready(write(*state, indices, score, jnp.int32(1)))

    num_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    seconds = statistics.median(paired_seconds({"write": run}, 15)["write"])
    return {
        "bulk_scores_a_second": BULK / seconds,
        "store_bytes_an_example": sum(leaf.nbytes for leaf in jax.tree.leaves(state[0])) / num_examples,
        "store_and_table_bytes_an_example": num_bytes / num_examples,
    }


def exactness(num_examples, num_draws=2_000_000) -> dict:
    """Counts zeros drawn where every second v is 0, and computes chi-square over 1,000 blocks for independent draws."""
    v = jnp.asarray(np.resize(np.array([0, 1, 0, 3], np.float32), num_examples))
    table = sampling.build_table(v)
    sizes = np.add.reduceat(np.asarray(v, np.float64), np.arange(0, num_examples, -(-num_examples // 1000)))
    draw = jax.jit(lambda key, table: sampling.draw(key, table, 50_000, "independent").indices)
    counts, zeros = np.zeros(len(sizes)), 0
    for i in range(num_draws // 50_000):
        indices = np.asarray(draw(jax.random.key(i), table))
        zeros += int(np.sum(np.asarray(v[indices]) == 0))
        counts += np.bincount(indices // -(-num_examples // 1000), minlength=len(sizes))
    expected = sizes / sizes.sum() * counts.sum()
    return {"zeros_drawn": zeros, "draws": int(counts.sum()), "chi_square_p": stats.chisquare(counts, expected).pvalue}


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", type=int, required=True)
    parser.add_argument("--pairs", type=int, default=200)
    options = parser.parse_args()
    size = options.size
    print(json.dumps(cycles(size, options.pairs) | bulk_write(size) | exactness(size)))


if __name__ == "__main__":
    main()
