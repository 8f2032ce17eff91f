"""Norms of one parameter leaf, and its sum over a batch, from its factored gradients."""

import functools
import itertools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from issgd_jax.gradnorm import algebra, cost, gram, windows
from issgd_jax.gradnorm.factors import Factored, Gradient
from issgd_jax.gradnorm.lengths import Squares, accumulator, length, root, side_by_side, squares
from issgd_jax.gradnorm.microbatches import in_microbatches
from issgd_jax.vmapped import for_all

# Memory for the gradients of one parameter that are formed together: fits a CPU's cache, and keeps an accelerator busy.
CPU_BYTES, ACCELERATOR_BYTES = 4 * 2**20, 256 * 2**20
# Gradients that are small enough to be kept until the norms of all parameters are checked together.
SMALL_BYTES = 2**21


class Unchecked(NamedTuple):
    """Norms of one leaf by one pass over unscaled numbers.

    Attributes:
      factors: Each f32[B, K]; the squared norm is the sum over K of the product of the factors.
      scaled: `(scales) -> factors` of numbers that are multiplied with the scales of each factor, f32[B, K].
      has_zeros: Returns whether the factors hold zeros, each bool[B, K].
    """

    factors: tuple[Squares, ...]
    scaled: Callable[[tuple[jax.Array, ...]], tuple[Squares, ...]]
    has_zeros: Callable[[], tuple[jax.Array, ...]]


def checked(norms: Sequence[jax.Array | Unchecked]) -> list[jax.Array]:
    """Returns norms f32[B], by another pass over scaled numbers unless every square is exact.

    One condition for all, on all squares side by side: on a CPU each small array takes as long as a small layer, and so
    do some in the branch that is not taken; each operation takes time to trace, too.
    """
    unchecked = [x for x in norms if isinstance(x, Unchecked)]
    if not unchecked:
        return list(norms)
    factors = [factor for x in unchecked for factor in x.factors]
    all_squares = side_by_side(factors)

    def scaled():
        """Returns the lengths of all factors by another pass, whatever the size of the numbers."""
        scales = all_squares.scales()
        parts = iter(_columns(scales, factors))
        again = [x.scaled(tuple(next(parts) for _ in x.factors)) for x in unchecked]
        lengths = root(side_by_side([factor for pair in again for factor in pair]).sums) / scales
        if len(factors) == len(unchecked):
            return lengths
        zeros = jnp.concatenate([zeros for x in unchecked for zeros in _zeros_of_other_factor(x)], axis=1)
        return jnp.where(zeros & jnp.isinf(lengths), jnp.nan, lengths)  # 0 · ∞ somewhere in the gradient

    def multiplied(lengths):
        parts = iter(_columns(lengths, factors))
        products = [math.prod(next(parts) for _ in x.factors) for x in unchecked]
        return jnp.concatenate([x if x.shape[1] == 1 else length([x], axis=1)[:, None] for x in products], axis=1)

    all_exact = for_all(jnp.all(all_squares.are_exact()))
    rows = iter(
        _columns(
            lax.cond(all_exact, lambda: multiplied(root(all_squares.sums)), lambda: multiplied(scaled())), unchecked
        )
    )
    return [
        lax.squeeze(next(rows), [1]).astype(x.factors[0].sums.dtype) if isinstance(x, Unchecked) else x for x in norms
    ]


def _columns(x: jax.Array, parts: Sequence[Squares | Unchecked]) -> list[jax.Array]:
    """Returns the columns [B, K] of each part; an unchecked norm has one."""
    sizes = [part.sums.shape[1] if isinstance(part, Squares) else 1 for part in parts]
    ends = list(itertools.accumulate(sizes))
    return [lax.slice_in_dim(x, end - size, end, axis=1) for size, end in zip(sizes, ends)]


def _zeros_of_other_factor(x: Unchecked) -> list[jax.Array]:
    """Returns where the other factor of each factor holds zeros, bool[B, K]."""
    if len(x.factors) == 1:
        return [jnp.zeros(x.factors[0].sums.shape, bool)]
    return list(reversed(x.has_zeros()))


def norms_and_sum(gradient: Gradient, coefficients: jax.Array | None, num_examples: int):
    """Returns the norms [B] of one leaf's gradients, to be checked, and their sum with the coefficients, if given."""
    if isinstance(gradient, Factored) and not gradient.terms:
        zeros = functools.partial(jnp.zeros, dtype=accumulator(gradient.dtype))
        return zeros(num_examples), zeros(gradient.shape)
    example = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), gradient)
    if not isinstance(gradient, Factored):
        is_small = sum(x.nbytes for x in jax.tree.leaves(gradient)) <= SMALL_BYTES
        return (_form_all if is_small else _form_and_check)(gradient, coefficients)
    bytes_of_forming = cost.bytes_of_forming(example)
    size = max(1, formed_bytes() // bytes_of_forming)
    if cost.by_gram(example, coefficients is not None):
        return _gram_norms(gradient, example, size), weighted_sum(gradient, coefficients)
    if coefficients is None and windows.fits(example):
        return _window_norms(gradient, example, size), None
    if num_examples * bytes_of_forming <= SMALL_BYTES:
        return _form_all(gradient, coefficients)
    return in_microbatches(lambda chunk: _form_and_check(*chunk), (gradient, coefficients), size)


def _gram_norms(gradient: Factored, example: Factored, formed_size: int) -> jax.Array | Unchecked:
    """Returns norms [B] from pairs of uses; where those lose their digits, from formed gradients."""
    size = max(1, ACCELERATOR_BYTES // max(1, cost.cost_of_gram(example).bytes))
    if gram.can_cancel(example):
        return _norms_of_pairs(gradient, size, formed_size)
    return Unchecked(
        _by_example(gram.factor_squares, size, gradient),
        lambda scales: _by_example(gram.factor_squares, size, gradient, scales),
        lambda: _by_example(gram.has_zeros, size, gradient),
    )


@functools.partial(jax.jit, static_argnums=(1, 2))
def _norms_of_pairs(gradient: Factored, size: int, formed_size: int) -> jax.Array:
    """Returns the norms [B] where inner products can cancel; traced once for leaves of equal shapes, as in blocks."""
    norms, exact = _by_example(gram.norm, size, gradient)

    def formed():
        return _by_example(lambda x: length(algebra.multiply_out(x)), formed_size, gradient).astype(norms.dtype)

    # Zeros look like underflow, and are looked for only where there is one or the other.
    all_exact = for_all(jnp.all(exact))
    all_exact = lax.cond(all_exact, lambda: all_exact, lambda: jnp.all(exact | jax.vmap(gram.is_zero)(gradient)))
    return lax.cond(for_all(all_exact), lambda: norms, formed)


def _by_example(function: Callable, size: int, *args):
    """Returns the results of `function` for each example, of at most `size` at a time."""
    return in_microbatches(lambda chunk: (jax.vmap(function)(*chunk), None), args, size, has_sums=False)[0]


def _window_norms(gradient: Factored, example: Factored, formed_size: int) -> Unchecked:
    """Returns norms [B] of a convolution's gradients, to be checked."""

    def formed(gradient):
        return _by_example(
            lambda x: squares([part[None] for part in algebra.multiply_out(x)]).sums[0], formed_size, gradient
        )

    left = example.terms[0].left
    channels = [*example.axes("k"), *left.image.uses(), left.channel_axis]

    def factors(scales=(None,)):
        scaled = gradient if scales[0] is None else jax.vmap(windows.scale)(gradient, scales[0][:, 0])
        sums = windows.squared_norms(scaled, channels, formed)[:, None]
        return (Squares(sums, (math.prod(example.shape),), (str(sums.dtype),)),)

    return Unchecked(factors(), factors, has_zeros=tuple)


def _form_all(gradient: Gradient, coefficients: jax.Array | None) -> tuple[Unchecked, jax.Array | None]:
    """Returns norms [B] of formed gradients, to be checked, and their sum with the coefficients, if given."""
    products = jax.vmap(algebra.multiply_out)(gradient)
    total = None
    if coefficients is not None:
        sums = [
            jnp.tensordot(coefficients.astype(product.dtype), product, 1, precision=lax.Precision.HIGHEST)
            for product in products
        ]
        total = algebra.lay_out(gradient, sums)

    def factors(scales=(None,)):
        axes = 0, None if scales[0] is None else 0
        return (jax.vmap(lambda parts, scale: squares([part[None] for part in parts], scale), axes)(products, *scales),)

    return Unchecked(factors(), factors, has_zeros=tuple), total


def _form_and_check(gradient: Gradient, coefficients: jax.Array | None) -> tuple[jax.Array, jax.Array | None]:
    """Returns norms [B] of formed gradients, and their sum, and lets go of the gradients."""
    norms, total = _form_all(gradient, coefficients)
    return checked([norms])[0], total


def weighted_sum(gradient: Factored, coefficients: jax.Array | None) -> jax.Array | None:
    """Returns the sum with the coefficients: the examples become uses of one gradient."""
    if coefficients is None:
        return None
    scaled = jax.vmap(functools.partial(algebra.scale, keeps_left=False))(gradient, coefficients)
    total = algebra.sum_leading(scaled)
    return algebra.lay_out(total, algebra.multiply_out(total))


def formed_bytes() -> int:
    return CPU_BYTES if jax.default_backend() == "cpu" else ACCELERATOR_BYTES
