"""Tiles of arrays [B, T, I], and the pairs of tiles that hold all pairs of rows."""

import jax
import jax.numpy as jnp
import numpy as np


def padded(x: jax.Array, rows: int, columns: int) -> jax.Array:
    """Returns x [B, T, I] that ends with zeros, such that T is a multiple of rows and I of columns."""
    missing = [-length % multiple for length, multiple in zip(x.shape[1:], (rows, columns))]
    return jnp.pad(x, [(0, 0), *((0, count) for count in missing)]) if any(missing) else x


def tile_length(length: int, largest: int, multiple: int) -> int:
    """Returns the length of tiles: all of it if that is not above the largest, else of as few equal tiles as can be."""
    tiles = -(-length // largest)
    return length if tiles == 1 else -(-length // (tiles * multiple)) * multiple


def pairs_of_tiles(tiles: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns the row and the column of each pair of tiles, i32[P], and how often it counts: the lower half, twice."""
    rows, columns = np.tril_indices(tiles)
    return rows.astype(np.int32), columns.astype(np.int32), np.where(rows == columns, 1, 2).astype(np.int32)
