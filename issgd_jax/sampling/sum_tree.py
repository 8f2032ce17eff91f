"""Tree of partial sums over the leaves v: a write changes one sum a level, a draw descends from the root.

A sum is that of the 16 children of a node, see `levels`, padded with zeros, added in pairs: k and k + 8, then k and
k + 4, and so on. Sums are f32 and recomputed from their children,
never changed by a difference, so that errors do not accumulate. Positions have twice the digits of f32: they are not
rounded over millions of leaves, and a leaf of zero is never drawn. Leaves are 0 or in [2^-64, 2^64], so that neither a
sum of 2^30 of them nor the low digits of a position leave the range of f32.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from issgd_jax import kernels
from issgd_jax.sampling import double_float, levels, uniform
from issgd_jax.sampling.checks import NO_EXAMPLE
from issgd_jax.sampling.double_float import Double
from issgd_jax.sampling.levels import BITS, RADIX

SMALLEST, LARGEST = 2.0**-64, 2.0**64


def is_valid(values: jax.Array) -> jax.Array:
    """Returns bool[...], whether each value can be a leaf, if need be clipped: finite and >= 0."""
    return jnp.isfinite(values) & (values >= 0)


def clip(values: jax.Array) -> jax.Array:
    """Returns valid values f[...] as leaves f32[...]: those that are not 0 in [2^-64, 2^64]."""
    values = values.astype(jnp.float32)
    is_positive = jax.lax.bitcast_convert_type(values, jnp.int32) > 0  # XLA compares subnormal numbers as zeros
    return jnp.where(is_positive, jnp.clip(values, SMALLEST, LARGEST), 0)


def repair(values: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns values f[N] as leaves f32[N], and whether they say nothing, bool[].

    Those that are not valid count as the mean of the others, with which draws are as unbiased. If the others are all 0,
    nothing is said, and every leaf is 1.
    """
    valid = is_valid(values)
    leaves = jnp.where(valid, clip(values), 0)
    mean = jnp.sum(leaves) / jnp.maximum(jnp.sum(valid, dtype=jnp.int32), 1).astype(jnp.float32)
    return jnp.where(mean == 0, 1, jnp.where(valid, leaves, mean)), mean == 0


def size(num_leaves: int) -> int:
    """Returns M, the length of the tree of N leaves."""
    return levels.starts(num_leaves)[-1]


def build(values: jax.Array) -> jax.Array:
    """Returns the tree f32[M], M about N 16 / 15, of the leaves `values` f32[N], N >= 1; O(N)."""
    return levels.build(values.astype(jnp.float32), _combine)


def total(sums: jax.Array) -> jax.Array:
    """Returns the sum f32[] of all leaves."""
    return _sum_children(sums[-RADIX:])


def write(
    sums: jax.Array, indices: jax.Array, values: jax.Array, *, num_leaves: int, keep_zeros=False
) -> tuple[jax.Array, jax.Array]:
    """Writes some leaves; O(m log N).

    Args:
      sums: f32[M], the tree.
      indices: i32[m], of leaves; those outside [0, num_leaves) are ignored. Where one occurs twice, one of its values
        is written.
      values: f32[m]; those that are not valid leave their leaf as it was, the others are clipped.
      num_leaves: N.
      keep_zeros: bool[], whether leaves of zero stay zero.

    Returns:
      The tree, and i32[], the number of leaves with a value that is not valid.
    """
    results = jax.ShapeDtypeStruct(sums.shape, sums.dtype), jax.ShapeDtypeStruct((), jnp.int32)
    args = sums, indices.astype(jnp.int32), values.astype(jnp.float32), jnp.asarray(keep_zeros)
    return kernels.on_cpu("write_tree", plain_write, results, *args, aliases={0: 0}, num_leaves=np.int64(num_leaves))


def draw(key: jax.Array, sums: jax.Array, *, num_leaves: int, batch_size: int, count=None):
    """Draws leaves in proportion to their values; O(B log N).

    Args:
      key: random key.
      sums: f32[M], the tree.
      num_leaves: N.
      batch_size: B.
      count: None: independent draws with replacement. i32[] <= B: number of equally spaced positions over the leaves in
        a random order, another one in each node. Equal leaves are adjacent; places from `count` on repeat the last.

    Returns:
      Indices of leaves i32[B], in [0, N) whatever the tree holds, and their values f32[B]. If all leaves are zero:
      every leaf with the same probability, and zeros.
    """
    results = jax.ShapeDtypeStruct((batch_size,), jnp.int32), jax.ShapeDtypeStruct((batch_size,), jnp.float32)
    count, equally_spaced = (batch_size, False) if count is None else (count, True)
    plain = functools.partial(plain_draw, impl=jax.random.key_impl(key), batch_size=batch_size)
    args = jax.random.key_data(key), sums, jnp.asarray(count, jnp.int32)
    attributes = {"num_leaves": np.int64(num_leaves), "equally_spaced": np.bool_(equally_spaced)}
    if not kernels.supports_key(key):
        return plain(*args, **attributes)
    return kernels.on_cpu("draw_leaves", plain, results, *args, **attributes)


def plain_write(sums: jax.Array, indices: jax.Array, values: jax.Array, keep_zeros: jax.Array, *, num_leaves: int):
    """`write` in plain JAX."""
    num_leaves = int(num_leaves)  # an attribute of a kernel is i64
    inside = (indices >= 0) & (indices < num_leaves)
    valid = is_valid(values)
    num_rejected = jnp.sum(inside & ~valid, dtype=jnp.int32)
    indices = jnp.where(inside & valid, indices, NO_EXAMPLE)
    present = sums[jnp.where(inside & valid, indices, 0)]
    values = jnp.where(keep_zeros & (present == 0), 0, clip(values))
    return levels.write(sums, indices, values, num_leaves=num_leaves, combine=_combine), num_rejected


def plain_draw(key_data, sums, count, *, num_leaves: int, equally_spaced: bool, impl, batch_size: int):
    """`draw` in plain JAX."""
    num_leaves = int(num_leaves)
    starts = levels.starts(num_leaves)
    num_positions = 1 if equally_spaced else batch_size
    key = jax.random.wrap_key_data(key_data, impl=impl)
    words = jax.random.bits(key, (num_positions + len(starts) - 1, 2), jnp.uint32)
    position = _uniform(*words[:num_positions].T)
    place = jnp.minimum(jnp.arange(batch_size, dtype=jnp.int32), count - 1)
    if equally_spaced:
        rank = place.astype(jnp.float32)
        position = double_float.add(position, Double(rank, jnp.zeros_like(rank)))
    root = total(sums)
    position = double_float.multiply(position, root / count.astype(jnp.float32) if equally_spaced else root)
    first = jnp.asarray(starts[-2::-1], jnp.int32)
    last = jnp.asarray([num_nodes - 1 for num_nodes in levels.sizes(num_leaves)[-2::-1]], jnp.int32)

    def descend(depth, state):
        node, position, sum_ = state
        multiplier, offset = words[num_positions + depth]
        mirrored = (multiplier * node.astype(jnp.uint32) + offset) >> (32 - BITS)
        parts = [levels.children(sums, first[depth] + RADIX * node).T]
        while len(parts[0]) > 2:
            parts.insert(0, parts[0][: len(parts[0]) // 2] + parts[0][len(parts[0]) // 2 :])
        branch = jnp.zeros_like(node)
        for bit, values in enumerate(parts):
            left, right = _select(values, branch), _select(values, branch + 2**bit)
            to_right, position, sum_ = _choose_half(left, right, position, sum_, (mirrored >> bit) & 1 > 0)
            branch += to_right.astype(jnp.int32) * 2**bit
        # Padding is zero and never chosen, unless the tree is not one that `build` and `write` made.
        return jnp.minimum(RADIX * node + branch, last[depth]), position, sum_

    node = jnp.zeros(batch_size, jnp.int32)
    state = node, position, jnp.full(batch_size, root)
    node, _, values = jax.lax.fori_loop(0, len(starts) - 1, descend, state)
    cells = uniform.below(num_leaves, *words[:num_positions].T)
    uniform_node = uniform.spread(cells, num_leaves, batch_size) if equally_spaced else cells
    # By the leaf, not by the root: if XLA read the tree once more here, it would copy it before the next write.
    is_drawable = (values > 0) & (values < jnp.inf)
    return jnp.where(is_drawable, node, uniform_node), jnp.where(is_drawable, values, 0)


def _combine(children: jax.Array, inside: jax.Array) -> jax.Array:
    del inside  # padding is zero
    return _sum_children(children)


def _sum_children(children: jax.Array) -> jax.Array:
    """Returns the sums f32[...] of f32[..., 16]."""
    parts = [children[..., k] for k in range(RADIX)]  # XLA vectorizes over nodes
    while len(parts) > 1:
        half = len(parts) // 2
        parts = [x + y for x, y in zip(parts[:half], parts[half:])]
    return parts[0]


def _uniform(high: jax.Array, low: jax.Array) -> Double:
    """Returns numbers uniform in [0, 1), with 48 bits, of two random words each."""
    high, low = ((word >> 8).astype(jnp.float32) for word in (high, low))
    return double_float.two_sum(high * 2.0**-24, low * 2.0**-48)


def _select(values: jax.Array, row: jax.Array) -> jax.Array:
    """Returns f32[B], element `row` i32[B] of each column of `values` f32[K, B], without a gather."""
    return functools.reduce(lambda x, k: jnp.where(row == k, values[k], x), range(1, len(values)), values[0])


def _choose_half(left, right, position: Double, sum_, mirrored) -> tuple[jax.Array, Double, jax.Array]:
    """Returns whether the position in [0, sum_) is in the right half, the position in its half, and that half's sum.

    Positions are counted from the end of the smaller half: its share is then as exact as its sum, however small it is
    beside the other.
    """
    from_end = double_float.subtract(Double(sum_, jnp.zeros_like(sum_)), position)
    position = jax.tree.map(lambda x, y: jnp.where(mirrored, x, y), from_end, position)
    # The sum is rounded: else positions beyond the halves would fall to a small leaf, or some would be missing.
    exact = double_float.two_sum(left, right)
    excess = ((exact.high - sum_) + exact.low) / jnp.where(sum_ > 0, sum_, 1)
    position = double_float.add(position, Double(position.high * excess, jnp.zeros_like(sum_)))
    smaller = Double(jnp.minimum(left, right), jnp.zeros_like(left))
    in_smaller = ~double_float.less_equal(smaller, position) & (smaller.high > 0)
    beyond = double_float.subtract(position, smaller)
    position = jax.tree.map(lambda x, y: jnp.where(in_smaller, x, y), position, beyond)
    to_right = in_smaller == (right < left)
    return to_right, position, jnp.where(to_right, right, left)
