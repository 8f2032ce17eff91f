"""Operations on factored gradients: linear maps, products of factors, and forming the gradient itself.

All functions work on ONE example and are batched by `vmap`. Linear maps also accept a gradient that is an array.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax import lax

from issgd_jax.gradnorm.factors import Dense, Factored, Gradient, OneHot, Patches, Term
from issgd_jax.gradnorm.lengths import accumulator, promoted


def zero(shape: tuple[int, ...], dtype) -> Factored:
    """Returns a gradient of zeros, of no terms."""
    return Factored((), tuple(shape), "", dtype)


def add(x: Gradient, y: Gradient) -> Gradient:
    """Returns x + y: the terms of both if their layouts agree, otherwise an array."""
    if isinstance(x, Factored) and isinstance(y, Factored):
        if not x.terms or not y.terms:
            return x if x.terms else y
        for a, b in ((x, y), (x, swap(y)), (swap(x), y)):
            if _layout(a) == _layout(b):
                return dataclasses.replace(a, terms=a.terms + b.terms)
    return form(x) + form(y)


def _layout(x: Factored):
    """Returns the properties that terms of one sum share; windows multiply only windows of the same kernel."""
    kinds = {(t.left.windows.kernel, t.left.offset_axes) if isinstance(t.left, Patches) else None for t in x.terms}
    return x.shape, x.sides, x.tail, kinds


def swap(x: Factored) -> Factored:
    """Exchanges left and right, if all factors are dense."""
    if not all(isinstance(term.left, Dense) for term in x.terms):
        return x
    terms = tuple(Term(term.right, term.left, term.precision) for term in x.terms)
    return dataclasses.replace(x, terms=terms, sides=x.sides.translate(str.maketrans("lr", "rl")))


def scale(x: Gradient, factor: jax.Array, operation: Callable = jnp.multiply, *, keeps_left: bool = True) -> Gradient:
    """Returns x · factor, or x / factor, for a scalar factor.

    Args:
      x: The gradient.
      factor: The scalar.
      operation: jnp.multiply or jnp.divide.
      keeps_left: Whether left factors stay the arrays that leaves may share; if not, the smaller factor changes.
    """

    def apply(array):
        dtype = promoted(array.dtype, getattr(factor, "dtype", array.dtype))
        return operation(array.astype(dtype), jnp.asarray(factor, dtype))

    if not isinstance(x, Factored):
        return apply(x)

    def scaled(term):
        can_choose = not keeps_left and isinstance(term.left, Dense)
        side = "left" if can_choose and term.left.array.size < term.right.array.size else "right"
        dense = getattr(term, side)
        array = dense.array.astype(promoted(dense.array.dtype, x.dtype))
        return dataclasses.replace(term, **{side: Dense(apply(array).astype(array.dtype), dense.labels)})

    return dataclasses.replace(x, terms=tuple(map(scaled, x.terms)))


def cast(x: Gradient, dtype) -> Gradient:
    """Returns x in another floating-point type."""
    return dataclasses.replace(x, dtype=dtype) if isinstance(x, Factored) else x.astype(dtype)


def _relabel(x: Factored, new: Callable[[int], int], leading=()) -> tuple[Term, ...]:
    return tuple(
        Term(term.left.relabel(new, leading), term.right.relabel(new, leading), term.precision) for term in x.terms
    )


def transpose(x: Gradient, permutation: tuple[int, ...]) -> Gradient:
    """Permutes the axes of x by changing labels."""
    if not isinstance(x, Factored):
        return jnp.transpose(x, permutation)
    if x.tail:
        return dataclasses.replace(x, tail=(*x.tail, ("transpose", tuple(permutation))))
    shape = tuple(x.shape[axis] for axis in permutation)
    sides = "".join(x.sides[axis] for axis in permutation) if x.terms else ""
    return Factored(_relabel(x, permutation.index), shape, sides, x.dtype)


def reshape(x: Gradient, shape: tuple[int, ...]) -> Gradient:
    """Reshapes x: factors are reshaped where axes are only split; any other reshape is recorded in the tail."""
    if not isinstance(x, Factored):
        return jnp.reshape(x, shape)
    if not x.terms:
        return zero(shape, x.dtype)
    split = None if x.tail else _split_axes(x.shape, shape)
    if split is None or not all(isinstance(term.left, Dense) for term in x.terms):
        return dataclasses.replace(x, tail=(*x.tail, ("reshape", tuple(shape))))
    return Factored(
        tuple(Term(_split(t.left, split, shape), _split(t.right, split, shape), t.precision) for t in x.terms),
        tuple(shape),
        "".join(side * len(new) for side, new in zip(x.sides, split)),
        x.dtype,
    )


def _split_axes(old: tuple[int, ...], new: tuple[int, ...]) -> list[list[int]] | None:
    """Returns the new axes into which each old axis is split, or None if axes are merged."""
    if math.prod(old) == 0:
        return None
    split, axis = [], 0
    for length in old:
        parts, product = [], 1
        while product < length or (product == length and axis < len(new) and new[axis] == 1):
            if axis == len(new) or length % (product * new[axis]):
                return None
            product, parts, axis = product * new[axis], [*parts, axis], axis + 1
        split.append(parts)
    return split


def _split(factor: Dense, split: list[list[int]], shape: tuple[int, ...]) -> Dense:
    labels, lengths = [], []
    for label, length in zip(factor.labels, factor.array.shape):
        in_gradient = isinstance(label, int) and label >= 0
        labels += split[label] if in_gradient else [label]
        lengths += [shape[axis] for axis in split[label]] if in_gradient else [length]
    return Dense(factor.array.reshape(lengths), tuple(labels))


def split(x: Gradient, sizes: tuple[int, ...], axis: int) -> list[Gradient]:
    """Splits x along one axis: the factors that have it are split, if all are dense."""
    if not isinstance(x, Factored) or x.tail or not all(isinstance(term.left, Dense) for term in x.terms):
        return lax.split(form(x), sizes, axis)

    def part(factor, start, size):
        if axis not in factor.labels:
            return factor
        place = factor.labels.index(axis)
        return Dense(lax.slice_in_dim(factor.array, start, start + size, axis=place), factor.labels)

    return [
        dataclasses.replace(
            x,
            terms=tuple(Term(part(t.left, start, size), part(t.right, start, size), t.precision) for t in x.terms),
            shape=(*x.shape[:axis], size, *x.shape[axis + 1 :]),
        )
        for size, start in zip(sizes, itertools.accumulate(sizes, initial=0))
    ]


def sum_leading(x: Gradient) -> Gradient:
    """Sums over the leading axis of every array in x, which becomes one more axis of uses."""
    if not isinstance(x, Factored):
        return jnp.sum(x, axis=0)

    def summed(term):
        leading = (min([*term.right.uses(), 0]) - 1,)
        keep = lambda axis: axis  # noqa: E731
        return Term(term.left.relabel(keep, leading), term.right.relabel(keep, leading), term.precision)

    return dataclasses.replace(x, terms=tuple(map(summed, x.terms)))


def stack_leading(x: Gradient, length: int) -> Gradient:
    """Makes the leading axis of every array in x the first axis of the gradient."""
    if not isinstance(x, Factored):
        return x
    if not x.terms:
        return zero((length, *x.shape), x.dtype)
    if x.tail:
        return jax.vmap(form)(x)
    return Factored(_relabel(x, lambda axis: axis + 1, (0,)), (length, *x.shape), "k" + x.sides, x.dtype)


def right_factor(term: Term, x: Factored) -> jax.Array:
    """Returns the right factor as [K, T, J]."""
    return term.right.arrange(x.axes("k"), term.left.uses(), x.axes("r"))


def left_slabs(term: Term, x: Factored) -> tuple[str, list[jax.Array]]:
    """Returns the axis order and the parts of a left factor that is dense or patches."""
    if isinstance(term.left, Patches):
        return "kit", term.left.slabs(x.axes("k"))
    return "kti", [term.left.arrange(x.axes("k"), term.left.uses(), x.axes("l"))]


def contract(equation: str, x: jax.Array, y: jax.Array, precision) -> jax.Array:
    """Returns an einsum of two arrays, summed in float32 or wider."""
    sums = accumulator(promoted(x.dtype, y.dtype))
    return jnp.einsum(equation, x, y, precision=precision, preferred_element_type=sums)


def multiply_out(x: Gradient) -> tuple[jax.Array, ...]:
    """Returns the gradient in parts along its left axes, each [K, I', J], summed in float32 or wider."""
    if not isinstance(x, Factored):
        return (x.astype(accumulator(x.dtype)),)
    products = [_products(term, x) for term in x.terms]
    return tuple(functools.reduce(jnp.add, same_part) for same_part in zip(*products, strict=True))


def _products(term: Term, x: Factored) -> list[jax.Array]:
    right = right_factor(term, x)
    if isinstance(term.left, OneHot):
        rows = jnp.zeros((x.size("k"), x.size("l"), x.size("r")), accumulator(right.dtype))
        indices = jnp.arange(x.size("k"))[:, None], term.left.arrange(x.axes("k"))
        return [rows.at[indices].add(right.astype(rows.dtype))]
    order, slabs = left_slabs(term, x)
    return [contract(f"{order},ktj->kij", slab, right, term.precision) for slab in slabs]


def lay_out(x: Gradient, products: Sequence[jax.Array]) -> jax.Array:
    """Returns the parts from `multiply_out` as one array in the gradient's own layout."""
    if not isinstance(x, Factored):
        return products[0]
    if not x.terms:
        return jnp.zeros(x.shape, accumulator(x.dtype))
    left = x.terms[0].left
    left_axes = [*left.offset_axes, left.channel_axis] if isinstance(left, Patches) else x.axes("l")
    axes = [*x.axes("k"), *left_axes, *x.axes("r")]
    product = products[0] if len(products) == 1 else jnp.concatenate(products, axis=1)
    product = product.reshape([x.shape[axis] for axis in axes])
    product = jnp.transpose(product, [axes.index(axis) for axis in range(len(axes))])
    for operation, argument in x.tail:
        product = {"transpose": jnp.transpose, "reshape": jnp.reshape}[operation](product, argument)
    return product


def form(x: Gradient) -> jax.Array:
    """Returns the gradient itself."""
    return lay_out(x, multiply_out(x)).astype(x.dtype) if isinstance(x, Factored) else x
