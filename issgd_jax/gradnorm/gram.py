"""Norms of factored gradients from inner products of their factors. For ONE example, batched by `vmap`."""

import dataclasses

import jax
import jax.numpy as jnp

from issgd_jax.gradnorm import algebra
from issgd_jax.gradnorm.factors import Dense, Factored, OneHot, Term


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


def norm_squared(x: Factored) -> tuple[jax.Array, jax.Array]:
    """Returns Σ_st <left_s, left_t> <right_s, right_t> over all pairs of uses, without forming the gradient.

    Returns:
      The squared norm, f32[], and the same sum over absolute values, f32[], to which rounding errors are relative.
    """
    x = _join(x)
    total = absolute = jnp.float32(0)
    for a, first in enumerate(x.terms):
        for b, second in enumerate(x.terms[: a + 1]):
            if a == b and not _can_cancel(first):
                alone = _uncancelled(first, x)
                total, absolute = total + alone, absolute + alone
            else:
                both = (1 if a == b else 2) * _sums(_products(first, second, x))
                total, absolute = total + both[0], absolute + both[1]
    return jnp.maximum(total, 0), absolute


def _can_cancel(term: Term) -> bool:
    return not isinstance(term.left, OneHot) and term.uses > 1


def _uncancelled(term: Term, x: Factored) -> jax.Array:
    """Returns the squared norm of a term that has one use, or whose rows are summed before they are squared."""
    if isinstance(term.left, OneHot):
        return _one_hot_norm_squared(term, x)
    left = sum(_square_length(slab) for slab in algebra.left_slabs(term, x)[1])
    return jnp.sum(left * _square_length(algebra.right_factor(term, x)))


def _square_length(factor: jax.Array) -> jax.Array:
    """Maps [K, 1, I] or [K, I, 1] to squared lengths [K]."""
    return jnp.sum(jnp.square(factor.astype(algebra.accumulator(factor.dtype))), axis=(1, 2))


def _products(first: Term, second: Term, x: Factored) -> jax.Array:
    """Returns <left_s, left_t> <right_s, right_t> as [K, S, T]."""
    right = algebra.contract(
        "ksj,ktj->kst", algebra.right_factor(first, x), algebra.right_factor(second, x), first.precision
    )
    return _left_products(first, second, x) * right


def _sums(products: jax.Array) -> jax.Array:
    """Returns Σ x and Σ |x| by one reduction, which XLA fuses with the products; two would write them to memory."""
    signs = jnp.asarray([1, -1], products.dtype).reshape(2, *(1 for _ in products.shape))
    return jnp.sum(jnp.maximum(products, signs * products), axis=range(1, 1 + products.ndim))


def _left_products(first: Term, second: Term, x: Factored) -> jax.Array:
    """Returns <left_s, left_t> as [K, S, T]."""
    shared = x.axes("k")
    if isinstance(first.left, OneHot) and isinstance(second.left, OneHot):
        return first.left.arrange(shared)[:, :, None] == second.left.arrange(shared)[:, None, :]
    if isinstance(second.left, OneHot):
        rows = first.left.arrange(shared, first.left.uses(), x.axes("l"))
        return jnp.take_along_axis(rows, second.left.arrange(shared)[:, None, :], axis=2)
    if isinstance(first.left, OneHot):
        return jnp.swapaxes(_left_products(second, first, x), 1, 2)
    order, slabs = algebra.left_slabs(first, x)
    _, others = algebra.left_slabs(second, x)
    equation = f"{order.replace('t', 's')},{order}->kst"
    return sum(algebra.contract(equation, s, t, first.precision) for s, t in zip(slabs, others, strict=True))


def _one_hot_norm_squared(term: Term, x: Factored) -> jax.Array:
    """Adds the uses of each table row and squares the sums, in memory of the size of the uses, not of the table."""

    def summed_rows(index, right):
        order = jnp.argsort(index)
        ordered = index[order]
        starts = jnp.concatenate([jnp.zeros(1, bool), ordered[1:] != ordered[:-1]])
        rows = right[order].astype(algebra.accumulator(right.dtype))
        rows = jax.ops.segment_sum(rows, jnp.cumsum(starts), index.size, indices_are_sorted=True)
        return jnp.sum(jnp.square(rows))

    return jnp.sum(jax.vmap(summed_rows)(term.left.arrange(x.axes("k")), algebra.right_factor(term, x)))
