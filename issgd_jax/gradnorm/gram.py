"""Norms of factored gradients from inner products of their factors. For ONE example, to be mapped by `vmap`."""

import dataclasses

import jax
import jax.numpy as jnp

from issgd_jax.gradnorm import factors
from issgd_jax.gradnorm.factors import Dense, Factored, OneHot, Term


def can_cancel(x: Factored) -> bool:
    """Whether the inner products of a gradient may cancel: not in a single product, nor where rows are summed first."""
    return len(x.terms) > 1 or _can_cancel(x.terms[0])


def _join(x: Factored) -> Factored:
    """x with all its dense terms as one, their uses in one row: a layer used n times has n terms, and n² pairs."""
    if sum(isinstance(term.left, Dense) for term in x.terms) < 2:
        return x
    dense = [term for term in x.terms if isinstance(term.left, Dense)]
    other = [term for term in x.terms if not isinstance(term.left, Dense)]

    def joined(mine, side):
        lengths = [x.shape[axis] for axis in (*x.axes("k"), *x.axes(side))]
        rows = [factor.arrange(x.axes("k"), factor.uses(), x.axes(side)) for factor in mine]
        row = jnp.concatenate(rows, axis=1)
        shared = len(x.axes("k"))
        row = row.reshape(*lengths[:shared], row.shape[1], *lengths[shared:])
        return Dense(row, (*x.axes("k"), -1, *x.axes(side)))

    left = joined([term.left for term in dense], "l")
    right = joined([term.right for term in dense], "r")
    return dataclasses.replace(x, terms=(Term(left, right, dense[0].precision), *other))


def norm_squared(x: Factored) -> tuple[jax.Array, jax.Array]:
    """Σ_st <left_s, left_t> <right_s, right_t>, over all pairs of uses and terms: nothing of the gradient's size.

    Also the same sum of absolute values: rounding is relative to this one.
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
    """Of a term whose products cannot cancel: one use; or rows of a table, which are summed before they are squared."""
    if isinstance(term.left, OneHot):
        return _one_hot_norm_squared(term, x)
    left = sum(_square_length(slab) for slab in factors.slabs_of(term, x)[1])
    return jnp.sum(left * _square_length(factors.right_of(term, x)))


def _square_length(factor: jax.Array) -> jax.Array:
    """[K, 1, I] or [K, I, 1] -> [K]."""
    return jnp.sum(jnp.square(factor.astype(factors.accumulator(factor.dtype))), axis=(1, 2))


def _products(first: Term, second: Term, x: Factored) -> jax.Array:
    """<left_s, left_t> <right_s, right_t> as [K, S, T]."""
    right = factors.contract("ksj,ktj->kst", factors.right_of(first, x), factors.right_of(second, x), first.precision)
    return _left_products(first, second, x) * right


def _sums(products: jax.Array) -> jax.Array:
    """Σ x and Σ |x|, in one reduction: XLA fuses that with the products, which two would make it write to memory."""
    signs = jnp.asarray([1, -1], products.dtype).reshape(2, *(1 for _ in products.shape))
    return jnp.sum(jnp.maximum(products, signs * products), axis=range(1, 1 + products.ndim))


def _left_products(first: Term, second: Term, x: Factored) -> jax.Array:
    """<left_s, left_t> as [K, S, T]."""
    shared = x.axes("k")
    if isinstance(first.left, OneHot) and isinstance(second.left, OneHot):
        return first.left.arrange(shared)[:, :, None] == second.left.arrange(shared)[:, None, :]
    if isinstance(second.left, OneHot):
        rows = first.left.arrange(shared, first.left.uses(), x.axes("l"))
        return jnp.take_along_axis(rows, second.left.arrange(shared)[:, None, :], axis=2)
    if isinstance(first.left, OneHot):
        return jnp.swapaxes(_left_products(second, first, x), 1, 2)
    order, slabs = factors.slabs_of(first, x)
    _, others = factors.slabs_of(second, x)
    equation = f"{order.replace('t', 's')},{order}->kst"
    return sum(factors.contract(equation, s, t, first.precision) for s, t in zip(slabs, others, strict=True))


def _one_hot_norm_squared(term: Term, x: Factored) -> jax.Array:
    """Uses of the same row are added, each sum is squared; of the size of the uses, not of the table."""

    def summed_rows(index, right):
        order = jnp.argsort(index)
        ordered = index[order]
        starts = jnp.concatenate([jnp.zeros(1, bool), ordered[1:] != ordered[:-1]])
        rows = right[order].astype(factors.accumulator(right.dtype))
        rows = jax.ops.segment_sum(rows, jnp.cumsum(starts), index.size, indices_are_sorted=True)
        return jnp.sum(jnp.square(rows))

    return jnp.sum(jax.vmap(summed_rows)(term.left.arrange(x.axes("k")), factors.right_of(term, x)))
