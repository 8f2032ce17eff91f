"""Weighted minibatches: a blocked inverse CDF on the device, exact at any number of examples.

The unnormalised probabilities v are the leaves of a tree in which every node holds the sum of its 8 children. A draw
walks down from the root and at each node compares a position with 8 numbers, so that float32 is enough at any N: there
is no running sum over millions of terms, and an example with v = 0 is never drawn.
"""

import dataclasses
import itertools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

# Children of a node: few, so that a draw reads little at each level.
RADIX = 8


class Draw(NamedTuple):
    """A minibatch: which examples, and what corrects each for having been preferred.

    indices: i32[B].
    importance_weights: f32[B], `mean(v) / v_n`; the mean of `importance_weights * loss` is the unbiased loss.
    """

    indices: jax.Array
    importance_weights: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Table:
    """What a draw needs of the proposal.

    levels: v and its partial sums, leaves first: f32[ceil(N / 8), 8], f32[ceil(N / 64), 8], ..., f32[1, 8]; about
      4.6 bytes an example. Empty for the uniform proposal, which needs none.
    population: f32[], the number of examples that the mean of v is taken over: N, unless a proposal leaves some out.
    num_examples: N.
    """

    levels: tuple[jax.Array, ...]
    population: jax.Array
    num_examples: int = dataclasses.field(metadata={"static": True})

    @property
    def mean_v(self) -> jax.Array:
        """f32[]: the mean of v."""
        return jnp.sum(self.levels[-1]) / self.population if self.levels else jnp.float32(1)

    def v(self, indices: jax.Array | None = None) -> jax.Array:
        """The unnormalised probabilities drawn from: f32[N], or those of `indices`."""
        if not self.levels:
            return jnp.ones(self.num_examples if indices is None else indices.shape, jnp.float32)
        flat = self.levels[0].reshape(-1)
        return flat[: self.num_examples] if indices is None else flat[indices]


def uniform_table(num_examples: int) -> Table:
    """The table of `v = 1` for all: takes no memory."""
    return Table(levels=(), population=jnp.float32(num_examples), num_examples=num_examples)


def build_table(v: jax.Array, population: jax.Array | None = None) -> Table:
    """The table of the unnormalised probabilities v, f32[N], finite and >= 0; O(N).

    If v is zero everywhere there is nothing to prefer, and the table is that of `v = 1`.
    """
    num_examples = v.shape[0]
    all_zero = ~jnp.any(v > 0)
    v = jnp.where(all_zero, 1, v).astype(jnp.float32)
    levels, sums = [], v
    while not levels or levels[-1].shape[0] > 1:
        num_nodes = math.ceil(sums.shape[0] / RADIX)
        children = jnp.pad(sums, (0, num_nodes * RADIX - sums.shape[0])).reshape(num_nodes, RADIX)
        levels.append(children)
        sums = jnp.sum(children, axis=1)
    population = num_examples if population is None else jnp.where(all_zero, num_examples, population)
    population = jnp.asarray(population, jnp.float32)
    return Table(levels=tuple(levels), population=population, num_examples=num_examples)


def effective_sample_size(table: Table, batch_size: int) -> jax.Array:
    """f32[]: Kish's effective size of a minibatch, `B / E[importance_weight^2]`; B for uniform, less for uneven v."""
    if not table.levels:
        return jnp.float32(batch_size)
    v = table.v()
    positive = v > 0
    mean_inverse = jnp.sum(jnp.where(positive, 1 / jnp.where(positive, v, 1), 0)) / table.population
    return batch_size / (table.mean_v * mean_inverse)


def draw(key: jax.Array, table: Table, batch_size: int) -> Draw:
    """Draws a minibatch in proportion to the table's v, with the importance weights that undo the preference.

    Guarantees, for a uniformly random key:
    - unbiased: example n is drawn `batch_size * v_n / sum(v)` times in expectation, so that
      `mean_b(importance_weights[b] * f[indices[b]])` has expectation `mean_n(f[n])` for any f (paper, Corollary 1);
    - examples with `v_n = 0` are never drawn; nor are those with less than 2^-24 of the v of the 8 examples (or of the
      8 subtrees) beside them, which float32 cannot tell from 0: keep v above 2^-16 of its maximum, as the proposals do;
    - the uniform table gives importance weights of exactly 1.

    Draws are systematic (Madow 1949): one random offset, `batch_size` equally spaced positions, so that a minibatch
    covers the distribution more evenly than independent draws. Those of the uniform table are stratified: one
    independent draw from each of `batch_size` equal parts.

    Raises: ValueError if batch_size < 1.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be >= 1, got {batch_size}")
    if not table.levels:
        return _draw_uniform(key, table.num_examples, batch_size)
    # Two random words a level. An affine hash of the node turns them into an offset for each node that is uniform,
    # shared by the draws inside that node, and different between nodes.
    words = jax.random.bits(key, (len(table.levels), 2))
    position = (jnp.arange(batch_size) + _unit(words[0, 1])) / batch_size
    node = jnp.zeros(batch_size, jnp.int32)
    for depth, children in enumerate(reversed(table.levels)):
        if depth > 0:
            # A position keeps few random bits below its parent. The rotation brings fresh ones and keeps equal spacing.
            multiplier, offset = words[depth]
            position = _fraction(position + _unit(multiplier * node.astype(jnp.uint32) + offset))
        branch, position, v = _descend(children[node], position)
        node = node * RADIX + branch
    return Draw(node, table.mean_v / v)


def _descend(values: jax.Array, position: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Inverse CDF inside B nodes: values f32[B, 8], position f32[B] in [0, 1] -> child, position in it, its value."""
    # Child by child: sums and selections of B numbers fuse into one loop, where a cumulative sum over an axis does not.
    children = [values[:, k] for k in range(RADIX)]
    cumulative = list(itertools.accumulate(children))
    total = cumulative[-1]
    # Strictly below the total, so that a child with cumulative > target exists, and its own value is positive.
    target = jnp.minimum(position * total, jnp.nextafter(total, jnp.float32(0)))
    branch, before, value = jnp.zeros_like(target, jnp.int32), jnp.zeros_like(target), children[0]
    for k in range(1, RADIX):
        passed = cumulative[k - 1] <= target
        branch = jnp.where(passed, k, branch)
        before = jnp.where(passed, cumulative[k - 1], before)
        value = jnp.where(passed, children[k], value)
    return branch, jnp.clip((target - before) / value, 0, 1), value


def _draw_uniform(key: jax.Array, num_examples: int, batch_size: int) -> Draw:
    """Of the N * B cells of a line, example n owns B and part b owns N: one cell from each part, in whole numbers."""
    starts = np.arange(batch_size, dtype=np.int64) * num_examples
    cell = _random_below(key, num_examples, batch_size)
    indices = (starts // batch_size).astype(np.int32) + (cell + (starts % batch_size).astype(np.int32)) // batch_size
    return Draw(indices, jnp.ones(batch_size, jnp.float32))


def _random_below(key: jax.Array, limit: int, size: int) -> jax.Array:
    """i32[size], uniform in [0, limit) up to limit / 2^64: the upper half of limit times 64 random bits.

    Fewer operations than `jax.random.randint`: a slow uniform draw would flatter importance sampling.
    """
    high, low = jax.random.bits(key, (2, size))
    limit = jnp.full(size, limit, jnp.uint32)
    middle = high * limit
    carry = (middle + jax.lax.mulhi(low, limit) < middle).astype(jnp.uint32)
    return (jax.lax.mulhi(high, limit) + carry).astype(jnp.int32)


def _unit(word: jax.Array) -> jax.Array:
    """uint32 -> f32 in [0, 1), from the upper 24 bits."""
    return (word >> 8).astype(jnp.float32) * 2.0**-24


def _fraction(x: jax.Array) -> jax.Array:
    return x - jnp.floor(x)
