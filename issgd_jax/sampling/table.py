"""Draws of weighted minibatches from a table on the device, exact at any number of examples."""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from issgd_jax.sampling import sum_tree, uniform

# Indices of examples, nodes and padding are i32.
MAX_EXAMPLES = 2**30
METHODS = ("systematic", "independent", "without_replacement")


class Draw(NamedTuple):
    """A drawn minibatch.

    Attributes:
      indices: i32[B].
      importance_weights: f32[B], `mean(v) / v_n`; the mean of `importance_weights * loss` is the unbiased loss.
    """

    indices: jax.Array
    importance_weights: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Table:
    """Sampling table: the unnormalised probabilities v, ready to be drawn from.

    Attributes:
      sums: the `sum_tree` of v, 4.3 bytes an example; None for the uniform proposal, which needs none.
      population: f32[], the number of examples that the mean of v is taken over: N, unless a proposal leaves some out.
      num_examples: N.

    Example:
      >>> table = build_table(jnp.array([1.0, 3.0]))
      >>> float(table.mean_v), table.write(jnp.array([0]), jnp.array([5.0])).v().tolist()
      (2.0, [5.0, 3.0])
    """

    sums: jax.Array | None
    population: jax.Array
    num_examples: int = dataclasses.field(metadata={"static": True})

    @property
    def mean_v(self) -> jax.Array:
        """Mean of v, f32[]."""
        return jnp.float32(1) if self.sums is None else self.total / self.population

    @property
    def total(self) -> jax.Array:
        """Sum of v, f32[]."""
        return jnp.float32(self.num_examples) if self.sums is None else sum_tree.total(self.sums)

    def v(self, indices: jax.Array | None = None) -> jax.Array:
        """Returns the unnormalised probabilities drawn from, f32[N], or those of `indices`."""
        if self.sums is None:
            return jnp.ones(self.num_examples if indices is None else indices.shape, jnp.float32)
        return self.sums[: self.num_examples] if indices is None else self.sums[indices]

    def write(self, indices: jax.Array, v: jax.Array) -> "Table":
        """Returns the table with other probabilities for some examples; O(m log N).

        Args:
          indices: i32[m]; those outside [0, N) are ignored. Where one occurs twice, its v must be the same both times.
          v: f32[m], finite and >= 0.

        Guarantees:
          Sums are recomputed from their children, so that no error grows with the number of writes. Examples that the
          proposal has left out (v = 0 and population < N) stay out until the table is rebuilt. A uniform table does not
          change.
        """
        if self.sums is None:
            return self
        sums = sum_tree.write(
            self.sums, indices, v, num_leaves=self.num_examples, keep_zeros=self.population < self.num_examples
        )
        return dataclasses.replace(self, sums=sums)


def uniform_table(num_examples: int) -> Table:
    """Returns the table of `v = 1` for all examples, which takes no memory.

    Example:
      >>> draw(jax.random.key(0), uniform_table(100), batch_size=3).importance_weights.tolist()
      [1.0, 1.0, 1.0]
    """
    return Table(sums=None, population=jnp.float32(num_examples), num_examples=num_examples)


@jax.jit
def build_table(v: jax.Array, population: jax.Array | None = None) -> Table:
    """Returns the table of unnormalised probabilities; O(N).

    Args:
      v: f32[N], finite and >= 0; zero everywhere counts as 1 everywhere.
      population: f32[], the number of examples that the mean of v is taken over; None: N.

    Raises:
      ValueError: N < 1 or N > 2^30.

    Example:
      >>> build_table(jnp.array([1.0, 0.0, 3.0])).v().tolist()
      [1.0, 0.0, 3.0]
    """
    num_examples = v.shape[0]
    if not 1 <= num_examples <= MAX_EXAMPLES:
        raise ValueError(f"a table holds between 1 and {MAX_EXAMPLES} examples, got {num_examples}: split the data")
    all_zero = ~jnp.any(v > 0)
    sums = sum_tree.build(jnp.where(all_zero, 1, v).astype(jnp.float32))
    population = num_examples if population is None else jnp.where(all_zero, num_examples, population)
    return Table(sums, jnp.asarray(population, jnp.float32), num_examples)


def effective_sample_size(table: Table, batch_size: int) -> jax.Array:
    """Returns Kish's effective size of a minibatch, f32[]: `B / E[importance_weight^2]`; B for uniform v, else less.

    Example:
      >>> float(effective_sample_size(build_table(jnp.array([1.0, 3.0])), batch_size=8))
      6.0
    """
    if table.sums is None:
        return jnp.float32(batch_size)
    v = table.v()
    positive = v > 0
    mean_inverse = jnp.sum(jnp.where(positive, 1 / jnp.where(positive, v, 1), 0)) / table.population
    return batch_size / (table.mean_v * mean_inverse)


@functools.partial(jax.jit, static_argnames=("batch_size", "method"))
def draw(key: jax.Array, table: Table, batch_size: int, method: str = "systematic") -> Draw:
    """Draws a minibatch in proportion to the table's v, with the importance weights that undo the preference.

    Guarantees, for a uniformly random key:
    - unbiased: `mean_b(importance_weights[b] * f[indices[b]])` has expectation `mean_n(f[n])` for any f (paper,
      Corollary 1);
    - examples with `v_n = 0` are never drawn; the probability of one whose share of the sum of v is s is exact to a
      factor of 1 +- (2^-19 + 2^-47 / s), so that shares below 2^-47 may be missed;
    - the uniform table gives importance weights of exactly 1.

    Args:
      key: of the draw.
      table: what to draw from.
      batch_size: B >= 1.
      method: see below.

    Methods:
    - "systematic" (Madow 1949): one random offset and B equally spaced positions over the examples in a random order.
      Example n is drawn `B v_n / sum(v)` times, rounded up or down, and on the average exactly so: a minibatch covers
      the distribution more evenly than independent draws. Of the uniform table: one independent draw from each of B
      equal parts.
    - "independent": B draws with replacement, as in the paper.
    - "without_replacement": B different examples, n among them with probability `min(1, c v_n)`, where c makes the sum
      of these B; its importance weight is `B / (N min(1, c v_n))`, so that certain examples weigh less than
      `mean(v) / v_n`. Costs a copy of the table where some example is certain (`B v_n >= sum(v)`). If fewer than B
      examples have v > 0, the places left over hold example 0 with an importance weight of 0.

    Raises:
      ValueError: batch_size < 1, the method is unknown, or batch_size > N without replacement.

    Example:
      >>> drawn = draw(jax.random.key(0), build_table(jnp.array([0.0, 4.0])), batch_size=2)
      >>> drawn.indices.tolist(), drawn.importance_weights.tolist()
      ([1, 1], [0.5, 0.5])
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be >= 1, got {batch_size}")
    if method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}, got {method!r}")
    if method == "without_replacement" and batch_size > table.num_examples:
        raise ValueError(
            f"batch_size is {batch_size}, but there are {table.num_examples} examples to draw without replacement: "
            "lower it, or draw with replacement"
        )
    if table.sums is None:
        indices = uniform.draw(key, table.num_examples, batch_size, method)
        return Draw(indices, jnp.ones(batch_size, jnp.float32))
    if method == "without_replacement":
        return _draw_without_replacement(key, table, batch_size)
    count = batch_size if method == "systematic" else None
    indices, v = sum_tree.draw(key, table.sums, num_leaves=table.num_examples, batch_size=batch_size, count=count)
    return Draw(indices, table.mean_v / v)


def _draw_without_replacement(key: jax.Array, table: Table, batch_size: int) -> Draw:
    """Sets certain examples apart and draws the rest for the places that are left, until none is certain.

    An example that is certain is drawn at least once, so that none is missed.
    """
    places = jnp.arange(batch_size)

    def attempt(table, num_certain):
        count = jnp.maximum(batch_size - num_certain, 1)
        attempt_key = jax.random.fold_in(key, num_certain)
        indices, v = sum_tree.draw(
            attempt_key, table.sums, num_leaves=table.num_examples, batch_size=batch_size, count=count
        )
        total = table.total
        first = jnp.concatenate([jnp.ones(1, bool), indices[1:] != indices[:-1]]) & (places < count)
        # Nearly certain is certain: rounding could draw it twice.
        newly = first & (count * v >= total * (1 - 2.0**-20)) & (v > 0) & (num_certain < batch_size)
        return indices, v, total, newly

    def unfinished(state):
        return jnp.any(state[-1][-1])

    def set_apart(state):
        table, certain, num_certain, (indices, _, _, newly) = state
        place = num_certain + jnp.cumsum(newly) - 1
        certain = certain.at[jnp.where(newly, place, batch_size)].set(indices, mode="drop")
        table = table.write(jnp.where(newly, indices, -1), jnp.zeros(batch_size))
        num_certain = num_certain + jnp.sum(newly, dtype=jnp.int32)
        return table, certain, num_certain, attempt(table, num_certain)

    certain, num_certain = jnp.zeros(batch_size, jnp.int32), jnp.int32(0)
    state = table, certain, num_certain, attempt(table, num_certain)
    _, certain, num_certain, (indices, v, total, _) = jax.lax.while_loop(unfinished, set_apart, state)
    # Certain ones first, then the others in the order in which they were drawn.
    is_certain = places < num_certain
    indices, v = jnp.roll(indices, num_certain), jnp.roll(v, num_certain)
    indices = jnp.where(is_certain, certain, jnp.where(v > 0, indices, 0))
    count = (batch_size - num_certain).astype(jnp.float32)
    drawn_weights = jnp.where(v > 0, total / (count * jnp.where(v > 0, v, 1)), 0)
    return Draw(indices, jnp.where(is_certain, 1, drawn_weights) * batch_size / table.population)
