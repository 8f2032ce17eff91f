"""Euclidean norms whose squares neither overflow nor underflow."""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax

# Largest share of a squared norm that may have underflowed.
LARGEST_LOSS = 1e-6


def accumulator(dtype) -> jnp.dtype:
    """Returns the data type in which sums are kept: float32 or wider."""
    return jnp.dtype(dtype) if jnp.dtype(dtype).itemsize >= 4 else jnp.dtype(jnp.float32)


def length(parts: Sequence[jax.Array], axis: int | tuple[int, ...] | None = None) -> jax.Array:
    """Returns √Σx² over axes of all parts, in float32 or wider.

    Numbers are divided by a power of two near the largest, which is exact, before they are squared.

    Guarantees:
      - The norm is as exact as its type allows wherever it is a normal number of that type.
      - It is nan if any number is, otherwise infinite if any number is.
      - The derivative at 0 is 0.
    """
    parts = [part.astype(accumulator(part.dtype)) for part in parts]
    largest = functools.reduce(jnp.maximum, (jnp.max(jnp.abs(part), axis, keepdims=True, initial=0) for part in parts))
    scale = lax.stop_gradient(_power_of_two(largest))
    squares = sum(jnp.sum(jnp.square(part * (1 / scale)), axis) for part in parts)
    return root(squares) * scale.reshape(squares.shape)


def plain_length(parts: Sequence[jax.Array], axis: int | tuple[int, ...] | None = None) -> tuple[jax.Array, jax.Array]:
    """Returns √Σx² as `length` does, but of squares of unscaled numbers, and whether it is as exact, bool[...].

    It takes one pass over the numbers instead of two. It is not as exact where squares overflow or underflow, and not
    known to be where all numbers are 0.
    """
    parts = [part.astype(accumulator(part.dtype)) for part in parts]
    squares = sum(jnp.sum(jnp.square(part), axis) for part in parts)
    count = sum(part.size for part in parts) / max(1, squares.size)
    return root(squares), jnp.isfinite(squares) & (squares >= count * underflow(squares.dtype))


def underflow(dtype) -> float:
    """Returns the least number beside which one that underflows does not matter."""
    return float(jnp.finfo(dtype).tiny) / LARGEST_LOSS


def root(x: jax.Array) -> jax.Array:
    """Returns √x with derivative 0, not infinity, at 0."""
    is_zero = x == 0
    return jnp.where(is_zero, 0, jnp.sqrt(jnp.where(is_zero, 1, x)))


def _power_of_two(x: jax.Array) -> jax.Array:
    """Returns the power of two next to x, or one by which small x can be divided and squared; nan for nan.

    The square of its reciprocal is finite: where x is a constant, XLA squares both factors and would give 0 * infinity.
    """
    finfo = jnp.finfo(x.dtype)
    return jnp.clip(lax.reduce_precision(x, finfo.nexp, 0), 2.0 ** (finfo.minexp // 2), 2.0**-finfo.minexp)
