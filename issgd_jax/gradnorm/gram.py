"""Norms of factored gradients from inner products of their factors. For ONE example, batched by `vmap`."""

import dataclasses
import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from issgd_jax.gradnorm import algebra
from issgd_jax.gradnorm.factors import Dense, Factored, OneHot, Patches, Term
from issgd_jax.gradnorm.gram_sums import gram_sums, signed_and_absolute
from issgd_jax.gradnorm.lengths import Squares, accumulator, length, promoted, root, squares, underflow
from issgd_jax.gradnorm.pairs import sum_over_pairs

# Smallest share of the absolute sum of inner products that may remain after cancellation. Below it, rounding errors of
# float32 would exceed a relative error of 1e-5.
LEAST_SHARE = 1 / 128


def can_cancel(x: Factored) -> bool:
    """Returns whether the inner products may cancel: not for one use, nor where rows are summed before squaring."""
    return len(x.terms) > 1 or _can_cancel(x.terms[0])


def _join(x: Factored) -> Factored:
    """Merges all dense terms into one with all their uses: a layer applied n times has n terms, and n² pairs."""
    if sum(isinstance(term.left, Dense) for term in x.terms) < 2:
        return x
    dense = [term for term in x.terms if isinstance(term.left, Dense)]
    other = [term for term in x.terms if not isinstance(term.left, Dense)]

    def joined(operands, side):
        lengths = [x.shape[axis] for axis in (*x.axes("k"), *x.axes(side))]
        rows = [factor.arrange(x.axes("k"), factor.uses(), x.axes(side)) for factor in operands]
        row = jnp.concatenate(rows, axis=1)
        shared = len(x.axes("k"))
        row = row.reshape(*lengths[:shared], row.shape[1], *lengths[shared:])
        return Dense(row, (*x.axes("k"), -1, *x.axes(side)))

    left = joined([term.left for term in dense], "l")
    right = joined([term.right for term in dense], "r")
    return dataclasses.replace(x, terms=(Term(left, right, dense[0].precision), *other))


def norm(x: Factored) -> tuple[jax.Array, jax.Array]:
    """Returns the norm √Σ_st <left_s, left_t> <right_s, right_t> of uses whose inner products may cancel.

    Returns:
      The norm, f32[], and whether it has its digits, bool[]: the inner products do not nearly cancel, and what
      underflows in them is too small to matter, even if the other factor is as large as it gets.
    """
    x = _join(x)
    total = absolute = 0
    for a, first in enumerate(x.terms):
        for b, second in enumerate(x.terms[: a + 1]):
            if a == b and not _can_cancel(first):
                alone = jnp.square(scaled_norm(first, x))
                total, absolute = total + alone, absolute + alone
            else:
                pairs = (_rows(first, x),) if a == b else (_rows(first, x), _rows(second, x))
                both = len(pairs) * jnp.sum(_sums(x, first.precision, *pairs), axis=1)
                total, absolute = total + both[0], absolute + both[1]
    least = sum(term.uses for term in x.terms) ** 2 * underflow(total.dtype)
    exact = (total < jnp.inf) & (total >= lax.max(LEAST_SHARE * absolute, lax.full_like(absolute, least)))
    return root(jnp.maximum(total, 0)), exact


def factor_squares(x: Factored, scales: tuple[jax.Array, ...] = (None, None)) -> tuple[Squares, ...]:
    """Returns the squared lengths of the factors of a gradient that cannot cancel.

    Each is f32[K]; the squared norm is the sum over K of their product.

    Args:
      x: The gradient.
      scales: Of each factor, see `squares`.
    """
    return tuple(squares(parts, scale) for parts, scale in zip(_factors(x.terms[0], x), scales))


def scaled_norm(term: Term, x: Factored) -> jax.Array:
    """Returns the norm f32[] of a term that cannot cancel: as exact, whatever the size of its factors."""
    # Each of the two lengths is in range, even where one factor is huge and the other tiny.
    return length([math.prod(length(parts, axis=(1, 2)) for parts in _factors(term, x))])


def is_zero(x: Factored) -> jax.Array:
    """Returns whether each term has a factor that is exactly zero."""

    def zero(term):
        left = term.left.image if isinstance(term.left, Patches) else term.left
        factors = [term.right] if isinstance(left, OneHot) else [left, term.right]
        return functools.reduce(jnp.logical_or, (jnp.all(factor.array == 0) for factor in factors))

    return functools.reduce(jnp.logical_and, map(zero, x.terms))


def has_zeros(x: Factored) -> tuple[jax.Array, ...]:
    """Returns whether the factors of a gradient that cannot cancel hold zeros, each bool[K]."""
    return tuple(
        functools.reduce(jnp.logical_or, (jnp.any(part == 0, axis=(1, 2)) for part in parts))
        for parts in _factors(x.terms[0], x)
    )


def _can_cancel(term: Term) -> bool:
    return not isinstance(term.left, OneHot) and term.uses > 1


def _factors(term: Term, x: Factored) -> list[list[jax.Array]]:
    """Returns the parts, each [K, ., .], of each factor of a term that cannot cancel.

    It has one use, or its rows are summed, which makes one factor of it.
    """
    if isinstance(term.left, OneHot):
        return [[_summed_rows(term, x)]]
    return [algebra.left_slabs(term, x)[1], [algebra.right_factor(term, x)]]


class _Rows(NamedTuple):
    """Uses of a term, arranged for inner products.

    Attributes:
      left: Parts of the left factor, each [K, T, I'].
      index: i32[K, T], of a one-hot left factor, which then has no parts.
      right: The right factor, [K, T, J].
    """

    left: tuple[jax.Array, ...]
    index: jax.Array | None
    right: jax.Array


def _rows(term: Term, x: Factored) -> _Rows:
    right = algebra.right_factor(term, x)
    if isinstance(term.left, OneHot):
        return _Rows((), term.left.arrange(x.axes("k")), right)
    order, slabs = algebra.left_slabs(term, x)
    return _Rows(tuple(jnp.einsum(f"{order}->kti", slab) for slab in slabs), None, right)


def _sums(x: Factored, precision: Any, *pairs: _Rows) -> jax.Array:
    """Returns Σ l·r and Σ |l·r| of inner products l, r of all pairs, [2, K], of one term or of two.

    |l|, |r| count as what may have underflowed.
    """
    first = pairs[0]
    dtype = accumulator(promoted(*(factor.dtype for rows in pairs for factor in (*rows.left, rows.right))))
    least = max(x.size("l"), x.size("r")) * underflow(dtype) / LEAST_SHARE
    if len(pairs) == 1 and len(first.left) == 1:
        return gram_sums(first.left[0], first.right, precision=precision, least=least)

    def products(first, second):
        left = _left_products(first, second, precision)
        right = algebra.contract("ksj,ktj->kst", first.right, second.right, precision)
        return signed_and_absolute(left, right, least)

    return sum_over_pairs(products, *pairs)


def _left_products(first: _Rows, second: _Rows, precision: Any) -> jax.Array:
    """Returns <left_s, left_t> as [K, S, T]."""
    if first.index is not None and second.index is not None:
        return first.index[:, :, None] == second.index[:, None, :]
    if second.index is not None:
        (rows,) = first.left
        return jnp.take_along_axis(rows, second.index[:, None, :], axis=2)
    if first.index is not None:
        return jnp.swapaxes(_left_products(second, first, precision), 1, 2)
    parts = zip(first.left, second.left, strict=True)
    return sum(algebra.contract("ksi,kti->kst", s, t, precision) for s, t in parts)


def _summed_rows(term: Term, x: Factored) -> jax.Array:
    """Returns the sums of the uses of each table row, in memory of the size of the uses, not of the table."""

    def summed_rows(index, right):
        order = jnp.argsort(index)
        ordered = index[order]
        starts = jnp.concatenate([jnp.zeros(1, bool), ordered[1:] != ordered[:-1]])
        rows = right[order].astype(accumulator(right.dtype))
        return jax.ops.segment_sum(rows, jnp.cumsum(starts), index.size, indices_are_sorted=True)

    return jax.vmap(summed_rows)(term.left.arrange(x.axes("k")), algebra.right_factor(term, x))
