"""The sampler's cycle at several numbers of examples: draw a minibatch, write scores, renew the table."""

import functools
import statistics
from collections.abc import Callable

import jax
import jax.numpy as jnp

from experiments.benchmarks.accelerator.roofline import Rates, row
from experiments.benchmarks.accelerator.sizes import Size
from experiments.benchmarks.measuring import paired_seconds
from issgd_jax.sampling import Sampler, ScoreStore

DRAWN, WRITTEN = 256, 1024
# Calls that are timed together, so that the next is dispatched while one runs, as in a loop.
BLOCK = {"draw": 50, "write": 50, "draw and update": 50, "renew": 2}


def parts(size: Size) -> dict[str, Callable[[Size, Rates], dict]]:
    """Returns a part for each number of examples."""
    return {f"sampler, N = {number:,}": functools.partial(measure, number) for number in size.sampler}


def measure(num_examples: int, size: Size, rates: Rates) -> dict:
    """Returns a row of each operation. Of a renewal the floor is one pass over all that the sampler holds."""
    sampler = Sampler(num_examples, min(DRAWN, num_examples), rebuild_every=0)
    new = jax.random.randint(jax.random.key(1), (WRITTEN,), 0, num_examples)
    scores = jnp.exp(jax.random.normal(jax.random.key(2), (WRITTEN,)))
    state = sampler.rebuild(_scored(sampler))
    held = sum(x.nbytes for x in jax.tree.leaves(state))

    def draw(state):
        return sampler.draw(state)[0]

    def draw_and_update(state):
        state, drawn = sampler.draw(state)
        return sampler.update(state, drawn, scores[: sampler.batch_size])

    operations = {
        "draw": draw,
        "write": lambda state: sampler.ingest(state, new, scores, 0, rebuild=False),
        "draw and update": draw_and_update,
        "renew": sampler.rebuild,
    }

    def block(name):
        nonlocal state
        for _ in range(BLOCK[name]):
            state = operations[name](state)
        jax.block_until_ready(state)

    blocks = {name: functools.partial(block, name) for name in operations}
    seconds = paired_seconds(blocks, size.num_pairs, size.seconds)
    rows = {}
    for name, times in seconds.items():
        num_bytes = held if name == "renew" else 0
        rows[name] = row(statistics.median(times) / BLOCK[name], rates, num_bytes=num_bytes) | {"calls": len(times)}
    return rows | {"held_bytes_an_example": held / num_examples}


def _scored(sampler: Sampler):
    """Returns a state in which every example has a score; made on the device."""
    scores = jnp.exp(jax.random.normal(jax.random.key(0), (sampler.num_examples,)))
    return sampler.init(0).with_store(ScoreStore(scores, jnp.zeros(sampler.num_examples, jnp.int32)))
