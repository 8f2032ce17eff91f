"""Layout of a tree over N leaves: all levels in one flat array, leaves first, each padded to a multiple of 16.

A number of one level is combined from its 16 children, the numbers of the level below; the last level holds at most 16.
"""

import itertools
from collections.abc import Callable

import jax
import jax.numpy as jnp

# Children of a node: 64 bytes, one line of a processor's cache.
RADIX = 16
BITS = RADIX.bit_length() - 1
# Above a level that has at most this many numbers for each written leaf, all are computed again.
DENSE = 16

# From children [..., 16], and whether each is inside the level and no padding, to one number [...].
Combine = Callable[[jax.Array, jax.Array], jax.Array]


def sizes(num_leaves: int) -> list[int]:
    """Returns the number of leaves, of their parents, and so on, up to 1.

    Example:
      >>> sizes(300)
      [300, 19, 2, 1]
    """
    sizes = [num_leaves]
    while len(sizes) == 1 or sizes[-1] > 1:
        sizes.append(-(-sizes[-1] // RADIX))
    return sizes


def starts(num_leaves: int) -> list[int]:
    """Returns the start of each level, leaves first, and the end of the last, which is the length of the tree.

    Example:
      >>> starts(300)
      [0, 304, 336, 352]
    """
    starts = [0]
    for num_nodes in sizes(num_leaves)[1:]:
        starts.append(starts[-1] + RADIX * num_nodes)
    return starts


def children(tree: jax.Array, first: jax.Array) -> jax.Array:
    """Returns the 16 numbers [m, 16] of the tree from each place in `first` i32[m]."""
    return jax.vmap(lambda start: jax.lax.dynamic_slice(tree, (start,), (RADIX,)))(first)


def build(leaves: jax.Array, combine: Combine) -> jax.Array:
    """Returns the tree [M], M about N 16 / 15, of the leaves [N], N >= 1; O(N)."""
    levels = []
    for size in sizes(leaves.size)[:-1]:
        levels.append(jnp.pad(leaves, (0, -size % RADIX)))
        inside = (jnp.arange(levels[-1].size, dtype=jnp.int32) < size).reshape(-1, RADIX)
        leaves = combine(levels[-1].reshape(-1, RADIX), inside)
    return jnp.concatenate(levels)


def write(tree: jax.Array, indices: jax.Array, leaves: jax.Array, *, num_leaves: int, combine: Combine) -> jax.Array:
    """Returns the tree with some leaves written, and all that is combined from them computed again; O(m log N).

    Args:
      tree: [M].
      indices: i32[m], of leaves; those outside [0, num_leaves) are ignored.
      leaves: [m].
      num_leaves: N.
      combine: as in `build`.
    """
    inside = (indices >= 0) & (indices < num_leaves)
    node, values = jnp.where(inside, indices, 0), leaves
    for size, (start, end) in zip(sizes(num_leaves), itertools.pairwise(starts(num_leaves))):
        tree = tree.at[jnp.where(inside, start + node, tree.size)].set(values, mode="drop")
        if end - start <= DENSE * indices.size:
            return jax.lax.dynamic_update_slice(tree, build(tree[start : start + size], combine), (jnp.int32(start),))
        node = node // RADIX
        child = RADIX * node[:, None] + jnp.arange(RADIX, dtype=jnp.int32)[None]
        values = combine(children(tree, start + RADIX * node), child < size)
    return tree
