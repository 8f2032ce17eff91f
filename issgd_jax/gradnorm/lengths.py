"""Euclidean norms whose squares neither overflow nor underflow."""

import dataclasses
import functools
import itertools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

# Largest share of a squared norm that may have underflowed.
LARGEST_LOSS = 1e-6


def accumulator(dtype) -> jnp.dtype:
    """Returns the data type in which sums are kept: float32 or wider."""
    return jnp.dtype(dtype) if jnp.dtype(dtype).itemsize >= 4 else jnp.dtype(jnp.float32)


def promoted(*dtypes) -> jnp.dtype:
    """Returns the type that numbers of these types become together, also where promotion is strict."""
    with jax.numpy_dtype_promotion("standard"):
        return jnp.result_type(*dtypes)


def length(parts: Sequence[jax.Array], axis: int | tuple[int, ...] | None = None) -> jax.Array:
    """Returns √Σx² over axes of all parts, in float32 or wider.

    Numbers are divided by a power of two near the largest, which is exact, before they are squared.

    Guarantees:
      - The norm is as exact as its type allows wherever it is a normal number of that type.
      - It is nan if any number is, otherwise infinite if any number is.
      - The derivative at 0 is 0.
    """
    dtype = promoted(*(accumulator(part.dtype) for part in parts))
    parts = [lax.convert_element_type(part, dtype) for part in parts]
    axes = [_axes(part, axis) for part in parts]
    # Operations of lax: those of jnp take several times as long to trace.
    maxima = [lax.reduce_max(lax.abs(part), over) for part, over in zip(parts, axes)]
    largest = functools.reduce(lax.max, maxima, lax.full_like(maxima[0], 0))
    scale = lax.stop_gradient(_power_of_two(largest))
    scaled = [part * lax.expand_dims(1 / scale, over) for part, over in zip(parts, axes)]
    squares = functools.reduce(lax.add, (lax.reduce_sum(lax.square(x), over) for x, over in zip(scaled, axes)))
    return lax.mul(root(squares), scale)


def of_wholes(norms: Sequence[jax.Array], num_examples: int) -> jax.Array:
    """Returns the norms f[B] of B gradients, given the norms [B] of each leaf or group; 0 if there are none."""
    norms = norms or [jnp.zeros(num_examples, jnp.float32)]
    return length([lax.expand_dims(norm, [1]) for norm in norms], axis=1)  # not stacked: XLA fuses this whole


def _axes(x: jax.Array, axis: int | tuple[int, ...] | None) -> tuple[int, ...]:
    """Returns the axes of x that are meant, as in NumPy."""
    axes = range(x.ndim) if axis is None else np.atleast_1d(axis)
    return tuple(int(a) % x.ndim for a in axes)


@functools.partial(jax.tree_util.register_dataclass, data_fields=["sums"], meta_fields=["counts", "dtypes"])
@dataclasses.dataclass(frozen=True)
class Squares:
    """Sums of squares, which take one pass over the numbers where `length` takes two.

    Attributes:
      sums: f32[..., K], or wider.
      counts: Number of squares in each of K sums.
      dtypes: The type that each of K sums was added in.
    """

    sums: jax.Array
    counts: tuple[int, ...]
    dtypes: tuple[str, ...]

    def are_exact(self) -> jax.Array:
        """Returns for which sums no square that underflowed matters, bool[..., K]; not for sums of zeros."""
        return (self.sums >= self._least) & (self.sums < jnp.inf)

    def scales(self) -> jax.Array:
        """Returns powers of two f32[..., K] to multiply the numbers with, for sums that are all exact."""
        exponents = np.array([5 * int(jnp.finfo(dtype).minexp) // 8 for dtype in self.dtypes])
        small, large = (lax.convert_element_type(2.0**x, self.sums.dtype) for x in (-exponents, exponents))
        small, large = (x.reshape(self._least.shape) for x in (small, large))
        ones = lax.full_like(self.sums, 1)
        scales = lax.select(self.sums < jnp.inf, ones, large * ones)
        return lax.stop_gradient(lax.select(self.sums < self._least, small * ones, scales))

    @property
    def _least(self) -> np.ndarray:
        """The least sum in which no square that underflowed matters."""
        least = np.array([count * underflow(dtype) for count, dtype in zip(self.counts, self.dtypes)])
        return least.astype(self.sums.dtype).reshape((1,) * (self.sums.ndim - 1) + (-1,))


def side_by_side(parts: Sequence[Squares]) -> Squares:
    """Returns the sums of all parts, along K; in the widest of their types."""
    sums = [part.sums for part in parts]
    if len(sums) > 1:
        dtype = promoted(*(x.dtype for x in sums))
        sums = [lax.concatenate([lax.convert_element_type(x, dtype) for x in sums], sums[0].ndim - 1)]
    return Squares(sums[0], *(tuple(itertools.chain(*x)) for x in zip(*((part.counts, part.dtypes) for part in parts))))


def squares(parts: Sequence[jax.Array], scales: jax.Array | None = None) -> Squares:
    """Returns the sums of squares of the parts, each [K, ...], over all axes but the first.

    Args:
      parts: Arrays of one K.
      scales: f32[K], powers of two that the numbers are multiplied with.
    """
    parts = [lax.convert_element_type(part, accumulator(part.dtype)) for part in parts]
    parts = [lax.reshape(part, (len(part), math.prod(part.shape[1:]))) for part in parts]
    if scales is not None:
        # Where a part is a constant, XLA would square part and scale each by itself: 0 · ∞.
        parts = [lax.optimization_barrier(part * lax.expand_dims(scales, [1])) for part in parts]
    # XLA's CPU backend has faster kernels for products than for reductions, and then does not compute again what is
    # squared.
    products = (((1,), (1,)), ((0,), (0,)))
    sums = [lax.dot_general(part, part, products, precision=lax.Precision.HIGHEST) for part in parts]
    num_sums, count = len(parts[0]), sum(part.shape[1] for part in parts)
    return Squares(functools.reduce(lax.add, sums), (count,) * num_sums, (str(sums[0].dtype),) * num_sums)


def underflow(dtype) -> float:
    """Returns the least number beside which one that underflows does not matter."""
    return float(jnp.finfo(dtype).tiny) / LARGEST_LOSS


def root(x: jax.Array) -> jax.Array:
    """Returns √x with derivative 0, not infinity, at 0."""
    is_zero = x == 0
    roots = lax.sqrt(lax.select(is_zero, lax.full_like(x, 1), x))
    return lax.select(is_zero, lax.full_like(x, 0), roots)


def _power_of_two(x: jax.Array) -> jax.Array:
    """Returns the power of two next to x, or one by which small x can be divided and squared; nan for nan.

    The square of its reciprocal is finite: where x is a constant, XLA squares both factors and would give 0 * infinity.
    """
    finfo = jnp.finfo(x.dtype)
    least, largest = (np.asarray(limit, x.dtype) for limit in (2.0 ** (finfo.minexp // 2), 2.0**-finfo.minexp))
    return lax.clamp(least, lax.reduce_precision(x, finfo.nexp, 0), largest)
