"""Equations of a backward pass that create a factored gradient from arrays.

For each primitive, `*_size(equation)` returns the Size of the term that the equation creates, or None where the
equation does not fit, and `*_make(equation, *operands)` returns the gradient.
"""

import itertools
import math
from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.extend.core import JaxprEqn

from issgd_jax.gradnorm import algebra
from issgd_jax.gradnorm.factors import Dense, Factored, Gradient, OneHot, Patches, Term, Windows
from issgd_jax.gradnorm.jaxprs import read

# Largest sum of a convolution kernel's lengths for which image windows are extracted.
MAX_OFFSETS = 64


class Size(NamedTuple):
    """Sizes of the term that an equation creates.

    Attributes:
      shared: Elements along the shared axes, K.
      uses: Number of uses, T.
      left: Elements along the left axes, I.
      right: Elements along the right axes, J.
      one_hot: Whether the left factor is one-hot.
    """

    shared: int
    uses: int
    left: int
    right: int
    one_hot: bool = False


def dot_size(eqn: JaxprEqn) -> Size | None:
    """Sizes for a product of two tensors."""
    (contracted, _), (shared, _) = read(eqn).dimension_numbers
    lhs, rhs = (v.aval for v in eqn.invars)
    shared_size = math.prod(lhs.shape[axis] for axis in shared)
    uses = math.prod(lhs.shape[axis] for axis in contracted)
    rows = max(1, shared_size * uses)
    size = Size(shared_size, uses, lhs.size // rows, rhs.size // rows)
    # Forming a vector costs no more than keeping its factors.
    return size if min(size[:4]) > 0 and min(size.left, size.right) > 1 else None


def dot_make(eqn: JaxprEqn, lhs, rhs) -> Factored:
    """Gradient from a product of two tensors: contracted axes are uses, batch axes are shared."""
    (lhs_contracted, rhs_contracted), (lhs_shared, rhs_shared) = read(eqn).dimension_numbers
    left, right = [None] * lhs.ndim, [None] * rhs.ndim
    for use, (axis, other) in enumerate(zip(lhs_contracted, rhs_contracted)):
        left[axis] = right[other] = -1 - use
    for label, (axis, other) in enumerate(zip(lhs_shared, rhs_shared)):
        left[axis] = right[other] = label
    sides = "k" * len(lhs_shared) + "l" * left.count(None) + "r" * right.count(None)
    free = itertools.count(len(lhs_shared))  # the free axes of lhs, then those of rhs, follow in the output
    left = tuple(next(free) if label is None else label for label in left)
    right = tuple(next(free) if label is None else label for label in right)
    out = eqn.outvars[0].aval
    return Factored((Term(Dense(lhs, left), Dense(rhs, right), read(eqn).precision),), out.shape, sides, out.dtype)


def conv_size(eqn: JaxprEqn) -> Size | None:
    """Sizes for a convolution."""
    lhs, rhs = (v.aval for v in eqn.invars)
    numbers, groups = read(eqn).dimension_numbers, _groups(eqn)
    features, contracted, *spatial = (rhs.shape[axis] for axis in numbers.rhs_spec)
    offsets = [eqn.outvars[0].aval.shape[axis] for axis in numbers.out_spec[2:]]
    images = lhs.shape[numbers.lhs_spec[0]] // read(eqn).batch_group_count
    size = Size(groups, contracted * math.prod(spatial), math.prod(offsets) * images, features // groups)
    # Each offset is a separate slice. Many offsets mean the gradient of an image, or of a very long kernel.
    return size if min(size[:4]) > 0 and 0 < sum(offsets) <= MAX_OFFSETS else None


def _groups(eqn: JaxprEqn) -> int:
    return read(eqn).batch_group_count * read(eqn).feature_group_count


def conv_make(eqn: JaxprEqn, lhs, rhs) -> Factored:
    """Gradient from a convolution, out[b, f, s] = Σ_ct lhs[b, c, s + t] rhs[f, c, t].

    In a backward pass b indexes input channels, f output channels, s offsets of the kernel, t positions of the gradient
    with respect to the output, and c examples (here one).
    """
    params, groups, out = read(eqn), _groups(eqn), eqn.outvars[0].aval
    numbers = params.dimension_numbers
    feature_axis, grouped = numbers.out_spec[1], groups > 1
    # With groups, the feature axis of the output is split into groups and features; `axis_of` counts both.
    axis_of = [axis + (grouped and axis > feature_axis) for axis in numbers.out_spec]
    uses, positions = tuple(range(-1, -out.ndim, -1)), [str(axis) for axis in range(out.ndim - 2)]

    image = dict(zip(numbers.lhs_spec, [[axis_of[0]], [uses[0]], *([position] for position in positions)]))
    window = dict(zip(numbers.rhs_spec, [[feature_axis], *([use] for use in uses)]))
    if grouped:
        split = numbers.lhs_spec[0 if params.batch_group_count > 1 else 1]
        image[split] = [feature_axis, *image[split]]
        window[numbers.rhs_spec[0]] = [feature_axis, feature_axis + 1]

    windows = Windows(
        kernel=tuple(out.shape[axis] for axis in numbers.out_spec[2:]),
        steps=tuple(rhs.shape[axis] for axis in numbers.rhs_spec[2:]),
        kernel_stride=tuple(params.window_strides),
        step_stride=tuple(params.rhs_dilation),
        padding=tuple(params.padding),
        dilation=tuple(params.lhs_dilation),
    )
    left = Patches(_grouped(lhs, image, groups), windows, tuple(axis_of[2:]), axis_of[0], uses[1:])
    term = Term(left, _grouped(rhs, window, groups), params.precision)
    leading, features, trailing = out.shape[:feature_axis], out.shape[feature_axis], out.shape[feature_axis + 1 :]
    middle, sides = ((groups, features // groups), "kr") if grouped else ((features,), "r")
    sides = "l" * len(leading) + sides + "l" * len(trailing)
    return algebra.reshape(Factored((term,), (*leading, *middle, *trailing), sides, out.dtype), out.shape)


def _grouped(x, labels: dict[int, list], groups: int) -> Dense:
    """Labels the axes of x; an axis with two labels is split into the groups and the axis within a group."""
    shape = [
        n
        for axis, length in enumerate(x.shape)
        for n in ([length] if len(labels[axis]) == 1 else [groups, length // groups])
    ]
    return Dense(x.reshape(shape), tuple(label for axis in range(x.ndim) for label in labels[axis]))


def scatter_size(eqn: JaxprEqn) -> Size | None:
    """Sizes for whole rows that are added to a table at given indices."""
    table, indices, updates = (v.aval for v in eqn.invars)
    numbers = read(eqn).dimension_numbers
    looked_up = numbers.inserted_window_dims
    whole = [updates.shape[axis] for axis in numbers.update_window_dims]
    rest = [length for axis, length in enumerate(table.shape) if axis not in looked_up]
    fits = sorted(looked_up) == sorted(numbers.scatter_dims_to_operand_dims) and whole == rest
    if not fits or not looked_up or numbers.operand_batching_dims or min(updates.shape, default=1) == 0:
        return None
    uses = math.prod(indices.shape[:-1])
    return Size(1, uses, math.prod(table.shape[axis] for axis in looked_up), math.prod(rest), one_hot=True)


def scatter_make(eqn: JaxprEqn, table: Gradient, indices, updates) -> Gradient:
    """Gradient of a table to which rows are added; indices out of range are clipped or dropped as in JAX."""
    numbers, shape = read(eqn).dimension_numbers, eqn.invars[0].aval.shape
    looked_up = numbers.inserted_window_dims
    uses = [axis for axis in range(updates.ndim) if axis not in numbers.update_window_dims]
    rest = [updates.shape[axis] for axis in numbers.update_window_dims]
    right = jnp.transpose(updates, (*uses, *numbers.update_window_dims)).reshape(-1, *rest)
    order = [numbers.scatter_dims_to_operand_dims.index(axis) for axis in looked_up]
    index = _at_least_int32(indices).reshape(-1, indices.shape[-1])
    columns, sizes = [index[:, axis] for axis in order], [shape[axis] for axis in looked_up]
    clipped = tuple(jnp.clip(column, 0, size - 1) for column, size in zip(columns, sizes))
    if read(eqn).mode != lax.GatherScatterMode.CLIP:  # all other modes drop indices out of range
        inside = [column == inner for column, inner in zip(columns, clipped)]
        in_range = jnp.all(jnp.stack(inside), axis=0)
        right = jnp.where(in_range.reshape(-1, *(1 for _ in rest)), right, 0)
    return algebra.add(table, _rows(clipped, tuple(sizes), right, looked_up, eqn))


def _at_least_int32(indices):
    """Widens small integers, which may not hold the length of the table."""
    return indices if indices.dtype.itemsize >= 4 else indices.astype(jnp.int32)


def _rows(indices, sizes, right, axes, eqn: JaxprEqn) -> Factored:
    """Returns rows `right` [T, *other axes] of a table at `indices`, one i32[T] for each of `axes`."""
    out = eqn.outvars[0].aval
    sides = "".join("l" if axis in axes else "r" for axis in range(out.ndim))
    rest = tuple(axis for axis in range(out.ndim) if axis not in axes)
    left = OneHot(tuple(Dense(index, (-1,)) for index in indices), tuple(axes), sizes)
    return Factored((Term(left, Dense(right, (-1, *rest))),), out.shape, sides, out.dtype)


def _update_axes(eqn: JaxprEqn) -> list[int]:
    table, update = (v.aval.shape for v in eqn.invars[:2])
    return [axis for axis in range(len(table)) if table[axis] != update[axis]]


def update_size(eqn: JaxprEqn) -> Size | None:
    """Sizes for a slice of length one along some axes and whole along the others, written into a table."""
    table, update = (v.aval for v in eqn.invars[:2])
    axes = _update_axes(eqn)
    if not axes or any(update.shape[axis] != 1 for axis in axes) or table.size == 0:
        return None
    return Size(1, 1, table.size // update.size, update.size, one_hot=True)


def update_make(eqn: JaxprEqn, table: Gradient, update, *starts) -> Gradient:
    """Gradient of a table into which a slice is written."""
    axes, shape = _update_axes(eqn), eqn.outvars[0].aval.shape
    if not isinstance(table, Factored) or table.terms:  # overwriting equals adding only for zeros
        return lax.dynamic_update_slice(algebra.form(table), update, starts)
    sizes = tuple(shape[axis] for axis in axes)
    indices = tuple(jnp.clip(_at_least_int32(starts[axis]), 0, size - 1)[None] for axis, size in zip(axes, sizes))
    return _rows(indices, sizes, jnp.squeeze(update, axes)[None], axes, eqn)
