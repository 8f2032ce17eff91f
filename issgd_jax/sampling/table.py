"""Weighted minibatches: inverse transform sampling by a tree of sums, exact at any number of examples."""

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from issgd_jax.sampling import sum_tree, uniform
from issgd_jax.sampling.checks import MAX_EXAMPLES, NO_EXAMPLE, as_indices, as_numbers, as_whole

METHODS = ("systematic", "independent", "without_replacement")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Draw:
    """Minibatch. A pytree, which also unpacks into its two arrays.

    Attributes:
      indices: i32[B], of its examples.
      importance_weights: f32[B], `mean(v) / v_n`; the mean of `importance_weights * losses` is an unbiased estimate of
        the mean loss. Of a sampler with a limit `LimitedWeights`, which `value_grad_and_norms` takes and lowers.
      num_examples: N, of the table that was drawn from; None: unknown.

    Example:
      >>> indices, importance_weights = draw(jax.random.key(0), uniform_table(100), batch_size=2)
      >>> importance_weights.tolist()
      [1.0, 1.0]
    """

    indices: jax.Array
    importance_weights: Any  # not a union: most code may take it for an array
    num_examples: int | None = dataclasses.field(default=None, metadata={"static": True})

    def __iter__(self) -> Iterator[Any]:
        yield self.indices
        yield self.importance_weights


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Table:
    """Unnormalised probabilities v in the form that `draw` needs. A pytree; made by `build_table` or `uniform_table`.

    Attributes:
      sums: f32[M], the `sum_tree` of v, 4.3 bytes an example; None for a uniform table.
      population: f32[], number of examples that the mean of v is taken over: N, unless a proposal excludes some.
      num_examples: N.
      rejected: i32[], how many v `write` has rejected; None: not counted, as in the state of a sampler, which counts
        rejected scores.
    """

    sums: jax.Array | None
    population: jax.Array
    num_examples: int = dataclasses.field(metadata={"static": True})
    rejected: jax.Array | None = None

    @property
    def mean_v(self) -> jax.Array:
        """f32[], mean of v."""
        return jnp.float32(1) if self.sums is None else self.total / self.population

    @property
    def total(self) -> jax.Array:
        """f32[], sum of v."""
        return jnp.float32(self.num_examples) if self.sums is None else sum_tree.total(self.sums)

    def v(self, indices: jax.Array | None = None) -> jax.Array:
        """Returns the unnormalised probabilities f32[N], or f32[m] of the examples `indices` i[m]; 0 outside [0, N)."""
        if indices is None:
            return jnp.ones(self.num_examples, jnp.float32) if self.sums is None else self.sums[: self.num_examples]
        indices = as_indices(indices, self.num_examples)
        inside = (indices >= 0) & (indices < self.num_examples)
        return jnp.where(inside, jnp.float32(1) if self.sums is None else self.sums[jnp.where(inside, indices, 0)], 0)

    def write(self, indices: jax.Array, v: jax.Array) -> "Table":
        """Returns the table with new v of some examples; O(m log N). A uniform table stays as it is.

        Args:
          indices: i[...]; those outside [0, N) are ignored. Where one occurs twice, one of its v counts.
          v: f[...] of the same shape, or one for all; as in `build_table`, but that an example whose v is NaN, infinite
            or negative keeps the one it has, and is counted.

        Raises:
          TypeError: indices are not whole numbers, or v not real numbers.
          ValueError: indices and v differ in shape.

        Guarantees:
          - The table equals, to the last bit, the one that `build_table` gives for the changed v: sums are recomputed
            from their children, so that errors do not accumulate with writes. If all v are 0 now, draws are uniform.
          - Examples that the proposal has excluded (v = 0 and population < N) stay excluded until the next
            `build_table`.

        Example:
          >>> table = build_table(jnp.array([1.0, 2.0, 3.0])).write(jnp.array([1, 2]), jnp.array([8.0, jnp.nan]))
          >>> table.v().tolist(), float(table.mean_v), int(table.rejected)
          ([1.0, 8.0, 3.0], 4.0, 1)
        """
        indices = as_indices(indices, self.num_examples)
        v = as_numbers("a v", v, indices.shape)
        self.check()
        if self.sums is None:
            return self
        sums, num_rejected = sum_tree.write(
            self.sums,
            indices.reshape(-1),
            v.reshape(-1),
            num_leaves=self.num_examples,
            keep_zeros=self.population < self.num_examples,
        )
        rejected = None if self.rejected is None else self.rejected + num_rejected
        return dataclasses.replace(self, sums=sums, rejected=rejected)

    def check(self) -> None:
        """Raises ValueError if the array of sums is not that of a table of N examples."""
        size = sum_tree.size(self.num_examples)
        if self.sums is not None and (self.sums.shape != (size,) or self.sums.dtype != jnp.float32):
            raise ValueError(
                f"sums of {self.num_examples:,} examples must be float32({size},), got {self.sums.dtype}"
                f"{self.sums.shape}: make tables with build_table(v)"
            )


def uniform_table(num_examples: int) -> Table:
    """Returns the table of v = 1, which takes no memory.

    Example:
      >>> uniform_table(3).v().tolist()
      [1.0, 1.0, 1.0]
    """
    return Table(sums=None, population=jnp.float32(num_examples), num_examples=num_examples)


def build_table(v: jax.Array, population: jax.Array | None = None) -> Table:
    """Builds the table of unnormalised probabilities; O(N), compiled.

    Args:
      v: f[N], finite and >= 0. Those that are not 0 count as at least 2^-64 and at most 2^64. If all are 0, the table
        is that of v = 1.
      population: number of examples that the mean of v is taken over, in [1, N]; None: N.

    Raises:
      TypeError: v are not real numbers.
      ValueError: N < 1 or N > 2^30, a v is NaN, infinite or negative, or population is out of range. Inside `jit`,
        where values cannot raise, such a v counts as the mean of the others, with which draws are as unbiased.

    Example:
      >>> table = build_table(jnp.array([1.0, 2.0, 3.0]))
      >>> table.num_examples, float(table.total), float(table.mean_v)
      (3, 6.0, 2.0)
    """
    if jnp.ndim(v) != 1 or not 1 <= jnp.shape(v)[0] <= MAX_EXAMPLES:
        raise ValueError(f"v must have shape [N], with N between 1 and {MAX_EXAMPLES}, got {jnp.shape(v)}")
    num_examples = jnp.shape(v)[0]
    v = as_numbers("a v", v, (num_examples,))
    if not isinstance(v, jax.core.Tracer):
        _check_v(np.asarray(v))
    is_known = population is not None and not isinstance(population, jax.core.Tracer)
    if is_known and (jnp.ndim(population) or not 1 <= population <= num_examples):
        raise ValueError(f"population must be one number between 1 and N = {num_examples:,}, got {population}")
    return _build_table(v, population)


def _check_v(v: np.ndarray) -> None:
    bad = np.flatnonzero(~(np.isfinite(v) & (v >= 0)))
    if len(bad):
        more = f" and {len(bad) - 1:,} more" if len(bad) > 1 else ""
        raise ValueError(f"v must be finite and >= 0, got {v[bad[0]]} of example {bad[0]}{more}")


@functools.partial(jax.jit, inline=True)
def _build_table(v: jax.Array, population: jax.Array | None) -> Table:
    num_examples = v.shape[0]
    leaves, all_zero = sum_tree.repair(v)
    population = num_examples if population is None else jnp.clip(population, 1, num_examples)
    population = jnp.where(all_zero, num_examples, population).astype(jnp.float32)
    return Table(sum_tree.build(leaves), population, num_examples, rejected=jnp.int32(0))


def effective_sample_size(table: Table, batch_size: int) -> jax.Array:
    """Returns Kish's effective size f32[] of a minibatch, `B / E[importance_weight^2]`; B if v is uniform, else less.

    Example:
      >>> float(effective_sample_size(build_table(jnp.array([1.0, 1.0, 2.0, 4.0])), batch_size=11))
      8.0
    """
    if table.sums is None:
        return jnp.float32(batch_size)
    v = table.v()
    positive = v > 0
    mean_inverse = jnp.sum(jnp.where(positive, 1 / jnp.where(positive, v, 1), 0)) / table.population
    product = table.mean_v * mean_inverse
    return batch_size / jnp.where(product > 0, product, 1)  # all v are zero: draws are uniform


def draw(key: jax.Array, table: Table, batch_size: int, method: str = "systematic") -> Draw:
    """Draws a minibatch in proportion to the table's v; O(B log N).

    Args:
      key: random key.
      table: as returned by `build_table`, `uniform_table` or `Table.write`.
      batch_size: B.
      method: one of
        - "systematic" (Madow 1949): B equally spaced positions with one random offset, over the examples in a random
          order. Example n is drawn `B v_n / sum(v)` times, rounded up or down, and on average exactly so: minibatches
          vary less than independent draws. From a uniform table: one independent draw from each of B equal parts.
        - "independent": B draws with replacement, as in the paper.
        - "without_replacement": B different examples; n is one of them with probability `p_n = min(1, c v_n)`, where c
          makes the sum of these B, and its importance weight is `B / (N p_n)`. Where some example is certain
          (`B v_n >= sum(v)`), it costs a copy of the table. If fewer than B examples have v > 0, the remaining places
          hold example 0 with an importance weight of 0.

    Returns:
      The indices i32[B] and importance weights f32[B], `mean(v) / v_n` with replacement.

    Guarantees, for a uniformly random key:
      - Unbiased: `mean_b(importance_weights[b] * f[indices[b]])` has expectation `mean_n(f[n])` for any f (paper,
        Corollary 1).
      - An example with `v_n = 0` is never drawn. The probability of one whose share of the sum of v is s is exact to a
        factor of 1 +- (2^-19 + 2^-47 / s), so that shares below 2^-47 may be missed.
      - A uniform table gives importance weights of exactly 1.

    Raises:
      TypeError: table or key is something else, such as a `ScoreStore`, or batch_size no whole number.
      ValueError: batch_size < 1 or > 2^30, method is unknown, or batch_size > N without replacement.

    Example:
      >>> table = build_table(jnp.array([6.0, 1.0, 1.0, 0.0]))
      >>> drawn = draw(jax.random.key(0), table, batch_size=4)
      >>> sorted(zip(drawn.indices.tolist(), drawn.importance_weights.tolist()))[:3]  # a share of 3/4: three of four
      [(0, 0.3333333432674408), (0, 0.3333333432674408), (0, 0.3333333432674408)]
    """
    if not isinstance(table, Table):
        raise TypeError(f"table must be a Table, got {type(table).__name__}: make one with build_table(v)")
    batch_size = as_whole("batch_size", batch_size)
    if batch_size < 1:
        raise ValueError(f"batch_size must be >= 1, got {batch_size}")
    if batch_size > MAX_EXAMPLES:
        raise ValueError(f"batch_size must be <= {MAX_EXAMPLES}, got {batch_size}")
    is_key = isinstance(key, jax.Array) and (jnp.issubdtype(key.dtype, jax.dtypes.prng_key) or key.dtype == jnp.uint32)
    if not is_key:
        raise TypeError(f"key must be a random key, such as jax.random.key(0), got {key!r}")
    table.check()
    if method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}, got {method!r}")
    if method == "without_replacement" and batch_size > table.num_examples:
        raise ValueError(
            f"batch_size is {batch_size}, but there are {table.num_examples} examples to draw without replacement: "
            "lower it, or draw with replacement"
        )
    return _draw(key, table, batch_size, method)


@functools.partial(jax.jit, static_argnames=("batch_size", "method"))
def _draw(key: jax.Array, table: Table, batch_size: int, method: str) -> Draw:
    if table.sums is None:
        indices = uniform.draw(key, table.num_examples, batch_size, method)
        return Draw(indices, jnp.ones(batch_size, jnp.float32), table.num_examples)
    if method == "without_replacement":
        return _draw_without_replacement(key, table, batch_size)
    count = batch_size if method == "systematic" else None
    indices, v = sum_tree.draw(key, table.sums, num_leaves=table.num_examples, batch_size=batch_size, count=count)
    importance_weights = jnp.where(v > 0, _quotient(table.mean_v, v), 1)  # all v are zero: draws are uniform
    return Draw(indices, importance_weights, table.num_examples)


def _quotient(x: jax.Array, y: jax.Array) -> jax.Array:
    """Returns x / y where y > 0, at most the largest f32; else 0."""
    return jnp.where(y > 0, jnp.minimum(x / jnp.where(y > 0, y, 1), jnp.finfo(jnp.float32).max), 0)


def _draw_without_replacement(key: jax.Array, table: Table, batch_size: int) -> Draw:
    """Sets the certain examples of a draw apart, and draws again for the remaining places, until none is certain.

    A certain example is drawn at least once, so that none is missed.
    """
    places = jnp.arange(batch_size, dtype=jnp.int32)

    def attempt(table, num_certain):
        count = jnp.maximum(batch_size - num_certain, 1)
        attempt_key = jax.random.fold_in(key, num_certain)
        indices, v = sum_tree.draw(
            attempt_key, table.sums, num_leaves=table.num_examples, batch_size=batch_size, count=count
        )
        total = table.total
        first = jnp.concatenate([jnp.ones(1, bool), indices[1:] != indices[:-1]]) & (places < count)
        # Nearly certain is certain: rounding could draw it twice.
        is_certain = count.astype(jnp.float32) * v >= total * (1 - 2.0**-20)
        newly = first & is_certain & (v > 0) & (num_certain < batch_size)
        return indices, v, total, newly

    def unfinished(state):
        return jnp.any(state[-1][-1])

    def set_apart(state):
        table, certain, num_certain, (indices, _, _, newly) = state
        place = num_certain + jnp.cumsum(newly, dtype=jnp.int32) - 1
        certain = certain.at[jnp.where(newly, place, batch_size)].set(indices, mode="drop")
        table = table.write(jnp.where(newly, indices, NO_EXAMPLE), jnp.zeros(batch_size, jnp.float32))
        num_certain = num_certain + jnp.sum(newly, dtype=jnp.int32)
        return table, certain, num_certain, attempt(table, num_certain)

    certain, num_certain = jnp.zeros(batch_size, jnp.int32), jnp.int32(0)
    state = table, certain, num_certain, attempt(table, num_certain)
    _, certain, num_certain, (indices, v, total, _) = jax.lax.while_loop(unfinished, set_apart, state)
    # Certain ones first, then the others in the order in which they were drawn; zeros where there are no others.
    is_certain = places < num_certain
    is_uniform = (num_certain == 0) & (v[0] == 0)  # all v are zero
    indices, v = jnp.roll(indices, num_certain), jnp.roll(v, num_certain)
    indices = jnp.where(is_certain, certain, jnp.where((v > 0) | is_uniform, indices, 0))
    count = (batch_size - num_certain).astype(jnp.float32)
    inverse_probability = jnp.where(is_certain, 1, _quotient(total, count * v))
    importance_weights = _quotient(inverse_probability * batch_size, table.population)
    return Draw(indices, jnp.where(is_uniform, 1, importance_weights), table.num_examples)
