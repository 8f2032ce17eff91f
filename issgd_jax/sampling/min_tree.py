"""Tree of minima over deadlines, see `levels`, in plain JAX: the earliest leaves are found by descending from the root.

Deadlines are i32 that wrap around, and are compared by their distance from `now`: all lie within 2^31 of it. So no
number could stand for the padding, which is told by its place.
"""

import functools

import jax
import jax.numpy as jnp

from issgd_jax.sampling import levels
from issgd_jax.sampling.levels import BITS, RADIX

_LATEST = jnp.iinfo(jnp.int32).max


def build(deadlines: jax.Array, now: jax.Array) -> jax.Array:
    """Returns the tree i32[M] of the deadlines i32[N] at the time `now` i32[]; O(N)."""
    return levels.build(deadlines, functools.partial(_earlier, now=now))


def write(tree: jax.Array, indices: jax.Array, deadlines: jax.Array, now: jax.Array, *, num_leaves: int) -> jax.Array:
    """Returns the tree with some deadlines written; O(m log N).

    Args:
      tree: i32[M].
      indices: i32[m], of leaves; those outside [0, num_leaves) are ignored.
      deadlines: i32[m].
      now: i32[].
      num_leaves: N.
    """
    combine = functools.partial(_earlier, now=now)
    return levels.write(tree, indices, deadlines, num_leaves=num_leaves, combine=combine)


def earliest(tree: jax.Array, now: jax.Array, salt: jax.Array, *, num_leaves: int, count: int) -> jax.Array:
    """Returns the `count` <= N leaves with the earliest deadlines, i32[count], in their order; O(count log N).

    The B nodes of a level with the earliest minima are above the B earliest leaves. Among equal deadlines, the order is
    that of the exclusive or of index and salt, which is also one of nodes, by their leading digits.

    Args:
      tree: i32[M].
      now: i32[].
      salt: u32[], random bits.
      num_leaves: N.
      count: B.
    """
    sizes, starts = levels.sizes(num_leaves), levels.starts(num_leaves)
    node = jnp.zeros(1, jnp.int32)
    for level in reversed(range(len(sizes) - 1)):
        child = (RADIX * node[:, None] + jnp.arange(RADIX, dtype=jnp.int32)[None]).reshape(-1)
        inside = child < sizes[level]  # neither are the children of a node that is not
        start = starts[level] + RADIX * jnp.minimum(node, sizes[level + 1] - 1)
        distance = jnp.where(inside, levels.children(tree, start).reshape(-1) - now, _LATEST)
        rank = child.astype(jnp.uint32) ^ (salt & jnp.uint32(2**31 - 1)) >> (BITS * level)
        rank = jnp.where(inside, rank, jnp.uint32(2**32 - 1))
        *_, node = jax.lax.sort((distance, rank, child), num_keys=2)
        node = node[:count]
    return node


def _earlier(children: jax.Array, inside: jax.Array, *, now: jax.Array) -> jax.Array:
    """Returns the earliest deadline [...] of children [..., 16]."""
    return now + jnp.min(jnp.where(inside, children - now, _LATEST), axis=-1)
