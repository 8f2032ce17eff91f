"""Sums over pairs of uses on NVIDIA Hopper, by Pallas on Mosaic GPU: `wgmma` from shared memory."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from issgd_jax.kernels.tiles import padded, pairs_of_tiles

# Two warpgroups multiply 64 rows each, whose inner products take half of their registers; a third copies.
TILE, MULTIPLYING = 128, 2
# Bytes of a row in one copy: the widest swizzle. Four of them, of two tiles each, are 128 KiB of shared memory.
CHUNK_BYTES, STAGES = 128, 4
# Registers of a thread that copies, and of one that multiplies: together not above those of a multiprocessor.
REGISTERS = {"decrease": 40, "increase": 232}


def gram_sums(
    left: jax.Array, right: jax.Array, *, precision: lax.Precision | None, least: float, interpret: Any = None
) -> jax.Array:
    """Returns f32[2, B], see `gradnorm.gram_sums`.

    Each block of threads takes one pair of tiles. It multiplies chunks of the columns of left, then those of right,
    while the next ones are copied. Products of float32 are those of TensorFloat-32, as XLA's at the default precision.

    Args:
      left, right, least: See `gradnorm.gram_sums`.
      precision: None or the default; any for bfloat16, whose products are exact.
      interpret: Of `plgpu.kernel`.
    """
    del precision
    chunk = CHUNK_BYTES // left.dtype.itemsize
    left, right = padded(left, TILE, chunk), padded(right, TILE, chunk)
    rows, columns, counts = pairs_of_tiles(left.shape[1] // TILE)
    transforms = plgpu.TilingTransform((8, chunk)), plgpu.SwizzleTransform(CHUNK_BYTES)
    tiles = plgpu.SMEM((STAGES, TILE, chunk), left.dtype, transforms=transforms)
    sums = plgpu.kernel(
        functools.partial(_multiply, chunk=chunk, least=least),
        out_type=jax.ShapeDtypeStruct((left.shape[0], len(rows), 2, TILE), jnp.float32),
        grid=(left.shape[0] * len(rows),),  # of one axis: the others are short on GPUs
        grid_names=("block",),
        num_threads=MULTIPLYING + 1,
        thread_name="warpgroup",
        scratch_types=[
            tiles,
            tiles,
            plgpu.Barrier(num_arrivals=2, num_barriers=STAGES),  # both tiles are copied
            plgpu.Barrier(num_arrivals=MULTIPLYING, num_barriers=STAGES),
        ],
        kernel_name="gram_sums",
        interpret=interpret,
    )(rows, columns, left, right)
    return jnp.einsum("bpkt,p->kb", sums, counts.astype(jnp.float32), precision=lax.Precision.HIGHEST)


def _multiply(rows, columns, left, right, sums, row_tiles, column_tiles, copied, multiplied, *, chunk, least):
    block, warpgroup = lax.axis_index("block"), lax.axis_index("warpgroup")
    example, pair = lax.div(block, sums.shape[1]), lax.rem(block, sums.shape[1])
    left_chunks, right_chunks = (x.shape[2] // chunk for x in (left, right))
    # Chunks of both factors go through one ring of STAGES places.
    factors = (left, 0, left_chunks), (right, left_chunks, right_chunks)

    @pl.when(warpgroup == MULTIPLYING)
    def _():
        plgpu.set_max_registers(REGISTERS["decrease"], action="decrease")
        tiles = (rows[pair], row_tiles), (columns[pair], column_tiles)

        def copy(factor, first, index, _):
            place = lax.rem(first + index, STAGES)

            @pl.when(first + index >= STAGES)
            def _():
                plgpu.barrier_wait(multiplied.at[place])

            for tile, memory in tiles:
                source = factor.at[example, pl.ds(tile * TILE, TILE), pl.ds(index * chunk, chunk)]
                plgpu.copy_gmem_to_smem(source, memory.at[place], copied.at[place])

        for factor, first, chunks in factors:
            lax.fori_loop(0, chunks, functools.partial(copy, factor, first), None)

    @pl.when(warpgroup < MULTIPLYING)
    def _():
        plgpu.set_max_registers(REGISTERS["increase"], action="increase")
        own_rows = pl.ds(warpgroup * (TILE // MULTIPLYING), TILE // MULTIPLYING)

        def multiply(products, first, index, _):
            place = lax.rem(first + index, STAGES)
            plgpu.barrier_wait(copied.at[place])
            plgpu.wgmma(products, row_tiles.at[place, own_rows], _transposed(column_tiles.at[place]))
            plgpu.wgmma_wait(1)  # the product before this one is done, and its place is free

            @pl.when(first + index > 0)
            def _():
                plgpu.barrier_arrive(multiplied.at[lax.rem(first + index + STAGES - 1, STAGES)])

        def sum_products(*products):
            for accumulator, (_, first, chunks) in zip(products, factors):
                lax.fori_loop(0, chunks, functools.partial(multiply, accumulator, first), None)
            left, right = (accumulator[...] for accumulator in products)
            signed, absolute = left * right, jnp.maximum(jnp.abs(left), least) * jnp.maximum(jnp.abs(right), least)
            sums[example, pair, 0, own_rows] = jnp.sum(signed, axis=1)
            sums[example, pair, 1, own_rows] = jnp.sum(absolute, axis=1)

        pl.run_scoped(sum_products, *[plgpu.ACC((TILE // MULTIPLYING, TILE), jnp.float32)] * len(factors))


def _transposed(tile):
    # JAX 0.12 deprecates the function that 0.10 has alone.
    return tile.T if hasattr(tile, "T") else plgpu.transpose_ref(tile, (1, 0))
