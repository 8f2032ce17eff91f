"""Sums over pairs of uses on TPUs, by Pallas."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from issgd_jax.kernels.tiles import padded, pairs_of_tiles, tile_length

# Rows of a tile, and numbers of each row that are in fast memory together: 8 MiB of float32, of two tiles of either
# factor, each twice, as the next one is copied while one is multiplied.
LARGEST_TILE, LARGEST_CHUNK = 256, 1024
# Sublanes of a bfloat16 register, a multiple of those of float32; lanes.
SUBLANES, LANES = 16, 128


def gram_sums(
    left: jax.Array, right: jax.Array, *, precision: lax.Precision | None, least: float, interpret: Any = False
) -> jax.Array:
    """Returns f32[2, B], see `gradnorm.gram_sums`.

    Each step of the grid multiplies a chunk of the columns of two tiles: first those of left, then those of right.
    After the last step, the two squares of inner products are multiplied with each other; none leaves the fast memory.

    Args:
      left, right, precision, least: See `gradnorm.gram_sums`.
      interpret: Of `pallas_call`.
    """
    batch, uses, _ = left.shape
    tile = tile_length(uses, LARGEST_TILE, SUBLANES)
    left_chunk, right_chunk = (tile_length(x.shape[2], LARGEST_CHUNK, LANES) for x in (left, right))
    left, right = padded(left, tile, left_chunk), padded(right, tile, right_chunk)
    left_chunks, right_chunks = left.shape[2] // left_chunk, right.shape[2] // right_chunk
    pairs = pairs_of_tiles(left.shape[1] // tile)

    def of_left(chunk):
        return lax.min(chunk, jnp.int32(left_chunks - 1))

    def of_right(chunk):
        return lax.max(chunk - jnp.int32(left_chunks), jnp.int32(0))

    def tiles(side, columns, chunk_of):
        """Describes the tile of the pair's row (side 0) or column (side 1)."""
        return pl.BlockSpec((None, tile, columns), lambda b, p, chunk, *pairs: (b, pairs[side][p], chunk_of(chunk)))

    sums = pl.pallas_call(
        functools.partial(_multiply, left_chunks=left_chunks, precision=precision, least=least),
        out_shape=jax.typeof(left).update(shape=(batch, 2, tile), dtype=jnp.float32),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(pairs),
            grid=(batch, len(pairs[0]), left_chunks + right_chunks),
            in_specs=[
                *(tiles(side, left_chunk, of_left) for side in (0, 1)),
                *(tiles(side, right_chunk, of_right) for side in (0, 1)),
            ],
            out_specs=pl.BlockSpec((None, 2, tile), lambda b, *_: (b, jnp.int32(0), jnp.int32(0))),
            scratch_shapes=[pltpu.VMEM((tile, tile), jnp.float32)] * 2,
        ),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary", "arbitrary")),
        cost_estimate=_cost(left, right, len(pairs[0]), tile),
        interpret=interpret,
        name="gram_sums",
    )(*pairs, left, left, right, right)
    return jnp.sum(sums, axis=2).T


def _multiply(_rows, _columns, counts, *refs, left_chunks, precision, least):
    left_row, left_column, right_row, right_column, sums, left_products, right_products = refs
    pair, chunk = pl.program_id(1), pl.program_id(2)

    @pl.when(chunk == 0)
    def _():
        left_products[...] = jnp.zeros_like(left_products)
        right_products[...] = jnp.zeros_like(right_products)

    @pl.when((pair == 0) & (chunk == 0))
    def _():
        sums[...] = jnp.zeros_like(sums)

    def add(products, row, column):
        products[...] += lax.dot_general(
            row[...],
            column[...],
            (((1,), (1,)), ((), ())),
            precision=precision,
            preferred_element_type=jnp.float32,
        )

    @pl.when(chunk < left_chunks)
    def _():
        add(left_products, left_row, left_column)

    @pl.when(chunk >= left_chunks)
    def _():
        add(right_products, right_row, right_column)

    @pl.when(chunk == pl.num_programs(2) - 1)
    def _():
        left, right = left_products[...], right_products[...]
        count = counts[pair].astype(jnp.float32)
        signed, absolute = left * right, jnp.maximum(jnp.abs(left), least) * jnp.maximum(jnp.abs(right), least)
        sums[0, :] += count * jnp.sum(signed, axis=0)
        sums[1, :] += count * jnp.sum(absolute, axis=0)


def _cost(left: jax.Array, right: jax.Array, pairs: int, tile: int) -> pl.CostEstimate:
    batch, _, columns = left.shape
    columns += right.shape[2]
    return pl.CostEstimate(
        flops=batch * pairs * tile * tile * 2 * (columns + 3),
        bytes_accessed=batch * pairs * 2 * tile * columns * left.dtype.itemsize + math.prod((4, batch, 2, tile)),
        transcendentals=0,
    )
