"""Evenly spaced visits: every example has a deadline, and a minibatch is the examples with the earliest ones.

Stride scheduling (Waldspurger and Weihl 1995), with probabilities that change, and the weighted counterpart of shuffled
epochs. Time is counted in visits: place b of minibatch k is the time `k B + b`. The stride of an example, `N mean(v) /
v_n`, is the time from one of its visits to its next deadline. Times are i32 that wrap around: only their differences
are used, so that nothing is rounded however long a run is: a deadline is less than 2^31 from the present, and what an
example has waited, its stride and the visits after its deadline, is counted to 2^32.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from issgd_jax import kernels
from issgd_jax.sampling import min_tree, uniform
from issgd_jax.sampling.checks import as_indices
from issgd_jax.sampling.in_place import order_after
from issgd_jax.sampling.sum_tree import is_valid, repair

# Longest stride, in epochs, and in visits: that, and N + B visits of waiting, are less than 2^32.
MAX_EPOCHS, MAX_STRIDE = 64, 7 * 2**28


class Visits(NamedTuple):
    """When each example was visited last, and when it is due.

    Attributes:
      deadlines: i32[M], their `min_tree`, 4.3 bytes an example.
      visited_at: i32[N], time of the last visit. Before the first, the visit in the epoch before the run.
      mean_v: f32[], mean of v over all examples, by which strides are computed.
      now: i32[], time of the first place of the next minibatch.
    """

    deadlines: jax.Array
    visited_at: jax.Array
    mean_v: jax.Array
    now: jax.Array

    @property
    def num_examples(self) -> int:
        """N."""
        return self.visited_at.shape[0]

    def last_strides(self) -> jax.Array:
        """Returns i32[N]: visits from the last one of each example to its deadline; see `in_flight`."""
        return self.deadlines[: self.num_examples] - self.visited_at

    def strides(self, indices: jax.Array | None = None) -> jax.Array:
        """Returns i32[N], or i32[m] of the examples `indices` i[m]: visits between two visits of each.

        Those outside [0, N), and those in flight, whose next stride is not known, have N.
        """
        strides = self.last_strides()
        strides = jnp.where(_is_flying(strides, self.num_examples), self.num_examples, strides)
        if indices is None:
            return strides
        indices = as_indices(indices, self.num_examples)
        inside = (indices >= 0) & (indices < self.num_examples)
        return jnp.where(inside, strides[jnp.where(inside, indices, 0)], self.num_examples)

    def v(self, indices: jax.Array | None = None) -> jax.Array:
        """Returns the unnormalised probabilities f32[N], or f32[m] of some examples, as rounded to whole strides."""
        return self.mean_v * (self.num_examples / self.strides(indices).astype(jnp.float32))


def init(key: jax.Array, num_examples: int) -> Visits:
    """Returns the visits before a run: every example is due once in the first epoch, in random order.

    Args:
      key: random key.
      num_examples: N.
    """
    order = uniform.permute(key, jnp.arange(num_examples, dtype=jnp.int32), num_examples)
    return Visits(min_tree.build(order, jnp.int32(0)), order - num_examples, jnp.float32(1), jnp.int32(0))


def longest(num_examples: int) -> int:
    """Returns the longest stride.

    Example:
      >>> longest(1000), longest(10**8)
      (64000, 1879048192)
    """
    return min(MAX_EPOCHS * num_examples, MAX_STRIDE)


def in_flight(num_examples: int) -> int:
    """Returns the stride of examples between a visit and its update, which no other example has.

    It is longer, and counted to 2^32, where one is owed time since.
    """
    return longest(num_examples) + 1


def _is_flying(strides: jax.Array, num_examples: int) -> jax.Array:
    """Returns which strides are those of examples in flight."""
    return strides.astype(jnp.uint32) >= jnp.uint32(in_flight(num_examples))


def stride(v: jax.Array, mean_v: jax.Array, num_examples: int) -> jax.Array:
    """Returns strides i32[m] of v f32[m]: whole visits, in [1, `longest`]; 0 where v is NaN, infinite or negative."""
    most = longest(num_examples)
    exact = num_examples * (mean_v / jnp.where(v > 0, v, 1))
    is_long = (v == 0) | (exact >= most)
    strides = jnp.maximum(jnp.where(is_long, 0, exact) + 0.5, 1).astype(jnp.int32)
    return jnp.where(is_valid(v), jnp.where(is_long, most, strides), 0)


def draw(
    visits: Visits, salt: jax.Array, batch_size: int, ahead: jax.Array | None = None
) -> tuple[jax.Array, jax.Array]:
    """Returns the indices i32[B] of the examples that are due first, and their importance weights f32[B]; O(B log N).

    Args:
      visits: unchanged, see `visit`.
      salt: u32[], random bits, which order examples of equal deadlines.
      batch_size: B <= N.
      ahead: i32[k, B], k minibatches that are visited before this one, which has none of their examples;
        `(k + 1) B <= N`. None: none.

    Returns:
      Indices in the order of their deadlines, none of them twice. The importance weight of a visit is the time that it
      stands for, since the last one, in epochs: `(time - visited_at) / N`.
    """
    num_ahead = 0 if ahead is None else ahead.size
    count = batch_size + num_ahead
    result = jax.ShapeDtypeStruct((count,), jnp.int32)
    args = visits.deadlines, visits.visited_at, visits.now, salt
    indices, elapsed = kernels.on_cpu("draw_earliest", _plain_draw(count), (result, result), *args)
    if num_ahead:
        free = jnp.all(indices[:, None] != ahead.reshape(-1), axis=1)
        order = jnp.argsort(~free, stable=True)[:batch_size]
        indices, waited = indices[order], elapsed[order] - order.astype(jnp.int32)
        elapsed = waited + num_ahead + jnp.arange(batch_size, dtype=jnp.int32)
    return indices, _epochs(elapsed, visits.num_examples)


def visit(visits: Visits, indices: jax.Array) -> Visits:
    """Returns the visits after a minibatch `indices` i32[B], now in flight; O(B log N)."""
    args = visits.deadlines, visits.visited_at, indices, visits.now
    deadlines, visited_at = kernels.on_cpu(
        "visit", plain_visit, _shapes(visits), *args, aliases={0: 0, 1: 1},
        in_flight=np.int64(in_flight(visits.num_examples)),
    )  # fmt: skip
    return visits._replace(deadlines=deadlines, visited_at=visited_at, now=visits.now + indices.size)


def visit_late(visits: Visits, indices: jax.Array, importance_weights: jax.Array) -> Visits:
    """Returns the visits after a minibatch that was drawn before others were updated; O(B log N).

    An example that was in flight when it was drawn may have been owed time since. Its importance weight is older and
    does not have that time, which stays owed.

    Args:
      indices, importance_weights: i32[B] and f32[B], of the draw.
    """
    elapsed = visits.now + jnp.arange(indices.size, dtype=jnp.int32) - visits.visited_at[indices]
    rest = _epochs(elapsed, visits.num_examples) - importance_weights
    return owe(visit(visits, order_after(indices, rest)), indices, rest)


def owe(visits: Visits, indices: jax.Array, epochs: jax.Array) -> Visits:
    """Returns the visits after a minibatch, in flight, some of whose importance weights were lowered.

    The time that a visit did not stand for is left to the next one: the last visit counts as so much earlier. It also
    is due so much earlier; `write` computes that.

    Args:
      indices: i32[B]; those outside [0, N) are ignored.
      epochs: f32[B], by how much each importance weight was lowered; 0 where it was not.
    """
    num_examples = visits.num_examples
    time = jnp.clip(jnp.round(epochs * num_examples), 0, longest(num_examples) // 2).astype(jnp.int32)
    target = jnp.where((indices >= 0) & (indices < num_examples), indices, num_examples)
    return visits._replace(visited_at=visits.visited_at.at[target].add(-time, mode="drop"))


def write(visits: Visits, indices: jax.Array, v: jax.Array, *, arrived: bool) -> Visits:
    """Returns the visits with new deadlines, last visit + stride, of some examples; O(m log N).

    Args:
      indices: i32[m]; those outside [0, N) are ignored. Where one occurs twice, one of its v counts.
      v: f32[m]; an example whose v is NaN, infinite or negative keeps its stride, or gets that of the mean if it was in
        flight.
      arrived: whether these examples are in flight no longer; else those that are remain so.
    """
    args = visits.deadlines, visits.visited_at, indices, stride(v, visits.mean_v, visits.num_examples), visits.now
    deadlines = kernels.on_cpu(
        "write_deadlines", plain_write, _shapes(visits)[0], *args, aliases={0: 0},
        in_flight=np.int64(in_flight(visits.num_examples)), arrived=np.bool_(arrived),
    )  # fmt: skip
    return visits._replace(deadlines=deadlines)


def rebuild(visits: Visits, v: jax.Array) -> Visits:
    """Returns the visits with deadlines by the v f32[N] of all examples, but of those in flight; O(N).

    A v that is NaN, infinite or negative counts as the mean of the others; if all are 0, strides are equal.
    """
    v, _ = repair(v)
    mean, old = jnp.mean(v), visits.last_strides()
    strides = jnp.where(_is_flying(old, v.size), old, stride(v, mean, v.size))
    return visits._replace(deadlines=min_tree.build(visits.visited_at + strides, visits.now), mean_v=mean)


def effective_sample_size(visits: Visits, batch_size: int) -> jax.Array:
    """Returns Kish's effective size f32[] of a minibatch: B over the mean stride in epochs."""
    return batch_size / jnp.mean(visits.strides().astype(jnp.float32) / visits.num_examples)


def append(visits: Visits, key: jax.Array, num_examples: int) -> Visits:
    """Returns the visits with more examples, due in random order within the next epoch; O(N).

    Args:
      key: random key.
      num_examples: how many more, >= 1.
    """
    total = visits.num_examples + num_examples
    place = uniform.permute(key, jnp.arange(num_examples, dtype=jnp.int32), num_examples)
    due = (place.astype(jnp.float32) * (total / num_examples)).astype(jnp.int32)
    visited_at = jnp.concatenate([visits.visited_at, visits.now + due - total])
    strides = jnp.concatenate([_rescale(visits, total), jnp.full(num_examples, total, jnp.int32)])
    return visits._replace(deadlines=min_tree.build(visited_at + strides, visits.now), visited_at=visited_at)


def select(visits: Visits, indices: jax.Array) -> Visits:
    """Returns the visits of the examples `indices` i[N'] alone, numbered by their place there; O(N)."""
    visited_at, strides = visits.visited_at[indices], _rescale(visits, indices.size)[indices]
    return visits._replace(deadlines=min_tree.build(visited_at + strides, visits.now), visited_at=visited_at)


def _epochs(elapsed: jax.Array, num_examples: int) -> jax.Array:
    """Returns times i32[m] in epochs f32[m]; exactly 1 after N visits, as the epochs and the rest are apart."""
    elapsed, size = elapsed.astype(jnp.uint32), jnp.uint32(num_examples)
    return (elapsed // size).astype(jnp.float32) + (elapsed % size).astype(jnp.float32) / num_examples


def _rescale(visits: Visits, num_examples: int) -> jax.Array:
    """Returns the strides i32[N], within the limits of another number of examples."""
    strides = visits.last_strides()
    flying = _is_flying(strides, visits.num_examples)
    return jnp.where(flying, in_flight(num_examples), jnp.minimum(strides, longest(num_examples)))


def _plain_draw(batch_size: int):
    """Returns the first half of `draw` in plain JAX: indices, and the time since their last visits."""

    def plain_draw(deadlines, visited_at, now, salt):
        indices = min_tree.earliest(deadlines, now, salt, num_leaves=visited_at.size, count=batch_size)
        return indices, now + jnp.arange(batch_size, dtype=jnp.int32) - visited_at[indices]

    return plain_draw


def plain_visit(deadlines, visited_at, indices, now, *, in_flight: int):
    """`visit` in plain JAX."""
    num_leaves, times = visited_at.size, now + jnp.arange(indices.size, dtype=jnp.int32)
    target = jnp.where((indices >= 0) & (indices < num_leaves), indices, num_leaves)
    visited_at = visited_at.at[target].set(times, mode="drop")
    deadlines = min_tree.write(deadlines, indices, times + jnp.int32(in_flight), now, num_leaves=num_leaves)
    return deadlines, visited_at


def plain_write(deadlines, visited_at, indices, strides, now, *, in_flight: int, arrived: bool):
    """`write` in plain JAX, of strides i32[m]."""
    num_leaves = visited_at.size
    place = jnp.where((indices >= 0) & (indices < num_leaves), indices, 0)
    old = deadlines[place] - visited_at[place]
    flying = old.astype(jnp.uint32) >= jnp.uint32(in_flight)
    kept = jnp.where(flying & bool(arrived), num_leaves, old)
    strides = jnp.where((strides > 0) & (bool(arrived) | ~flying), strides, kept)
    return min_tree.write(deadlines, indices, visited_at[place] + strides, now, num_leaves=num_leaves)


def _shapes(visits: Visits) -> tuple[jax.ShapeDtypeStruct, jax.ShapeDtypeStruct]:
    return tuple(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (visits.deadlines, visits.visited_at))
