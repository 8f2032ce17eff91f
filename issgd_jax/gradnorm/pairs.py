"""Sums over all pairs of uses, in blocks: T uses take memory for a block of pairs, not for T² of them.

    Σ_st <left_s, left_t> <right_s, right_t>, of one term with itself or with another term

A block is taken with itself once, and one before it counts twice: half of the pairs are computed.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from issgd_jax.gradnorm.mapping import varying_like

# Largest number of uses in a block: the products of two blocks fit a CPU's cache.
BLOCK = 256
# Uses of so few blocks are one block: a quarter of the products is less than what a loop takes.
FEW_BLOCKS = 2


def sum_over_pairs(products: Callable[[Any, Any], jax.Array], first: Any, second: Any | None = None) -> jax.Array:
    """Returns the sum of `products(rows of first, rows of second)` over blocks of rows that hold all pairs.

    Args:
      products: Sums over all pairs of some rows, `(first, second) -> f32[...]`; the same for `(second, first)`. Rows of
        zeros must add nothing, as the last block may end with them.
      first: Pytree of arrays [K, S, ...], whose rows are along the second axis.
      second: Pytree of arrays [K, T, ...]; None: pairs of the rows of `first` with each other.

    Guarantees:
      No array of S × T is made if either is larger than two BLOCKs, nor by the derivative.

    Example:
      >>> a, b = jnp.ones((1, 600, 2)), jnp.full((1, 300, 2), 2.0)
      >>> inner_products = lambda x, y: jnp.sum(jnp.einsum("ksi,kti->kst", x, y))
      >>> float(sum_over_pairs(inner_products, a)), float(sum_over_pairs(inner_products, a, b))
      (720000.0, 720000.0)
    """
    num_first, num_second = _num_rows(first), _num_rows(first if second is None else second)
    if _num_blocks(num_first) == _num_blocks(num_second) == 1:
        return products(first, first if second is None else second)
    first, size = _padded(first, num_first)
    other, other_size = (first, size) if second is None else _padded(second, num_second)
    rows, columns, counts = _blocks(num_first, None if second is None else num_second)

    @functools.partial(jax.checkpoint, prevent_cse=False)
    def add(total, block):
        row, column, count = block
        return total + count * products(_cut(first, row * size, size), _cut(other, column * other_size, other_size))

    shape = jax.eval_shape(products, _cut(first, 0, size), _cut(other, 0, other_size))
    blocks = rows, columns, counts.astype(shape.dtype)
    start = varying_like(jnp.zeros(shape.shape, shape.dtype), shape)
    return lax.scan(lambda total, block: (add(total, block), None), start, blocks)[0]


def num_pairs(num_first: int, num_second: int | None = None) -> int:
    """Returns how many pairs `sum_over_pairs` computes."""
    return len(_blocks(num_first, num_second)[0]) * num_pairs_at_once(num_first, num_second)


def num_pairs_at_once(num_first: int, num_second: int | None = None) -> int:
    """Returns how many pairs are in memory at one time."""
    return _block_size(num_first) * _block_size(num_first if num_second is None else num_second)


def _blocks(num_first: int, num_second: int | None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns the row and the column of each block, and how often it counts."""
    if num_second is None:
        rows, columns = np.tril_indices(_num_blocks(num_first))
        return rows, columns, np.where(rows == columns, 1, 2)
    rows, columns = np.indices((_num_blocks(num_first), _num_blocks(num_second))).reshape(2, -1)
    return rows, columns, np.ones_like(rows)


def _num_blocks(num_rows: int) -> int:
    blocks = -(-num_rows // BLOCK)
    return blocks if blocks > FEW_BLOCKS else 1


def _block_size(num_rows: int) -> int:
    """Returns the rows in a block; blocks are of one size, and as few as can be."""
    return -(-num_rows // _num_blocks(num_rows))


def _num_rows(tree: Any) -> int:
    return jax.tree.leaves(tree)[0].shape[1]


def _padded(tree: Any, num_rows: int) -> tuple[Any, int]:
    """Returns arrays that end with zeros such that all blocks are whole, and the rows in a block."""
    size = _block_size(num_rows)
    missing = _num_blocks(num_rows) * size - num_rows
    pad = lambda x: jnp.pad(x, [(0, 0), (0, missing), *[(0, 0)] * (x.ndim - 2)])  # noqa: E731
    return (jax.tree.map(pad, tree) if missing else tree), size


def _cut(tree: Any, start: jax.Array | int, size: int) -> Any:
    return jax.tree.map(lambda x: lax.dynamic_slice_in_dim(x, start, size, axis=1), tree)
