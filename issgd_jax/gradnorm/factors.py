"""A gradient kept as a sum of outer products, and the algebra that never multiplies them out.

    gradient[k, i, j] = Σ_t left[k, t, i] · right[k, t, j]

A dense layer used T times has one such term: its T inputs and the T gradients at its outputs. The axes of the gradient
are of three sides: `k`, shared by both factors (groups, experts, scanned layers); `l`, of the left factor; `r`, of the
right one. Factors stay in the layout in which they were computed; labels tell what each of their axes is.

Everything here is for ONE example, to be mapped by `vmap`; every class is a pytree.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax


def _pytree(*static: str) -> Callable[[type], type]:
    """A frozen dataclass whose fields are children, but for those named, which are static."""

    def register(cls):
        cls = dataclasses.dataclass(frozen=True)(cls)
        children = [field.name for field in dataclasses.fields(cls) if field.name not in static]
        return jax.tree_util.register_dataclass(cls, data_fields=children, meta_fields=list(static))

    return register


# An axis of a factor: n >= 0 is axis n of the gradient, n < 0 an axis of uses, "0", "1", ... an axis of an image.
Label = int | str


@_pytree("labels")
class Dense:
    """An array and what its axes are."""

    array: jax.Array
    labels: tuple[Label, ...]

    def size(self, labels: Iterable[Label]) -> int:
        """Elements along some axes."""
        return math.prod(self.array.shape[self.labels.index(label)] for label in labels)

    def uses(self) -> list[int]:
        """Labels of the axes of uses, in the order in which all factors count them."""
        return sorted((label for label in self.labels if isinstance(label, int) and label < 0), reverse=True)

    def arrange(self, *groups: Iterable[Label]) -> jax.Array:
        """The array with one axis for each group of labels."""
        groups = [list(group) for group in groups]
        moved = jnp.transpose(self.array, [self.labels.index(label) for group in groups for label in group])
        return moved.reshape([self.size(group) for group in groups])

    def relabel(self, new: Callable[[int], int], leading: tuple[Label, ...] = ()) -> "Dense":
        """Axes of the gradient renamed; `leading`: labels of axes that were added in front."""
        labels = (new(label) if isinstance(label, int) and label >= 0 else label for label in self.labels)
        return Dense(self.array, (*leading, *labels))


@_pytree("axes", "sizes")
class OneHot:
    """Rows of an identity matrix, by their index.

    indices: one i32 array over k and uses for each of `axes`, axes of the gradient, of lengths `sizes`.
    """

    indices: tuple[Dense, ...]
    axes: tuple[int, ...]
    sizes: tuple[int, ...]

    def uses(self) -> list[int]:
        """See Dense.uses."""
        return self.indices[0].uses()

    def arrange(self, shared: list[int]) -> jax.Array:
        """i32[K, T], the index into the axes taken as one, in the gradient's order."""
        flat = 0
        for _, size, index in sorted(zip(self.axes, self.sizes, self.indices), key=lambda axis: axis[0]):
            flat = flat * size + index.arrange(shared, self.uses())
        return flat

    def relabel(self, new: Callable[[int], int], leading: tuple[Label, ...] = ()) -> "OneHot":
        """See Dense.relabel."""
        indices = tuple(index.relabel(new, leading) for index in self.indices)
        return OneHot(indices, tuple(map(new, self.axes)), self.sizes)


@dataclasses.dataclass(frozen=True)
class Windows:
    """Which windows of an image a convolution's kernel meets. One entry a spatial axis, in the terms of lax.conv.

    kernel: offsets within a window. steps: windows. kernel_stride, step_stride: their distances in the padded image.
    padding, dilation: of the image.
    """

    kernel: tuple[int, ...]
    steps: tuple[int, ...]
    kernel_stride: tuple[int, ...]
    step_stride: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]
    dilation: tuple[int, ...]


@_pytree("windows", "offset_axes", "channel_axis", "positions")
class Patches:
    """The windows of an image that a convolution's kernel meets, cut out only when needed.

    offset_axes: axes of the gradient that are the offsets within a window. channel_axis: the one of image's channels.
    positions: axes of uses that are the places of the window.
    """

    image: Dense
    windows: Windows
    offset_axes: tuple[int, ...]
    channel_axis: int
    positions: tuple[int, ...]

    def uses(self) -> list[int]:
        """See Dense.uses; here in the order of `slabs`."""
        return [*self.image.uses(), *self.positions]

    def slabs(self, shared: list[int]) -> list[jax.Array]:
        """One [K, I', T] for each offset of the first spatial axis: whole patches need not exist at one time."""
        num_axes = len(self.offset_axes)
        spatial = [[str(axis)] for axis in range(num_axes)]
        image = self.image.arrange(shared, [self.channel_axis], self.image.uses(), *spatial)
        for axis in reversed(range(num_axes)):  # [K, *offsets, I, C, *spatial]
            cut = self._cut(image, axis)
            image = jnp.stack(cut, axis=1) if axis else image
        uses = math.prod(cut[0].shape[-num_axes - 1 :])
        return [row.reshape(row.shape[0], -1, uses) for row in cut]

    def _cut(self, image: jax.Array, axis: int) -> list[jax.Array]:
        """The image that each offset of one spatial axis meets: strided slices after padding."""
        windows, place = self.windows, image.ndim - len(self.offset_axes) + axis
        (low, high), gap = windows.padding[axis], windows.dilation[axis]
        edges = [(low, high, gap - 1) if a == place else (0, 0, 0) for a in range(image.ndim)]
        image = lax.pad(image, jnp.zeros((), image.dtype), edges)
        stride, reach = windows.step_stride[axis], (windows.steps[axis] - 1) * windows.step_stride[axis] + 1
        starts = (offset * windows.kernel_stride[axis] for offset in range(windows.kernel[axis]))
        return [lax.slice_in_dim(image, start, start + reach, stride, place) for start in starts]

    def relabel(self, new: Callable[[int], int], leading: tuple[Label, ...] = ()) -> "Patches":
        """See Dense.relabel."""
        axes = tuple(map(new, self.offset_axes))
        return Patches(self.image.relabel(new, leading), self.windows, axes, new(self.channel_axis), self.positions)


@_pytree("precision")
class Term:
    """Σ_t left ⊗ right. What is sparse stands on the left."""

    left: Dense | OneHot | Patches
    right: Dense
    precision: Any = None

    @property
    def uses(self) -> int:
        """T."""
        return self.right.size(self.right.uses())


@_pytree("shape", "sides", "dtype", "tail")
class Factored:
    """A gradient as the sum of its terms; of no terms, zero.

    shape, sides: length and side of each axis. dtype: of the array it stands for. tail: reshapes and transpositions
    that lead from there to the gradient's own layout, where they do not respect the sides.
    """

    terms: tuple[Term, ...]
    shape: tuple[int, ...]
    sides: str
    dtype: Any
    tail: tuple[tuple[str, tuple[int, ...]], ...] = ()

    @property
    def gradient_shape(self) -> tuple[int, ...]:
        """Shape of the gradient, after the tail."""
        shape = self.shape
        for operation, argument in self.tail:
            shape = argument if operation == "reshape" else tuple(shape[axis] for axis in argument)
        return shape

    def axes(self, side: str) -> list[int]:
        """The axes of a side."""
        return [axis for axis, s in enumerate(self.sides) if s == side]

    def size(self, side: str) -> int:
        """Elements along the axes of a side."""
        return math.prod(self.shape[axis] for axis in self.axes(side))


Gradient = Factored | jax.Array


def zero(shape: tuple[int, ...], dtype) -> Factored:
    """The gradient of a parameter that is not used."""
    return Factored((), tuple(shape), "", dtype)


def accumulator(dtype) -> Any:
    """Sums are kept in float32 or better."""
    return jnp.dtype(dtype) if jnp.dtype(dtype).itemsize >= 4 else jnp.dtype(jnp.float32)


def add(x: Gradient, y: Gradient) -> Gradient:
    """x + y: the terms of both, where they have the same layout."""
    if isinstance(x, Factored) and isinstance(y, Factored):
        if not x.terms or not y.terms:
            return x if x.terms else y
        for a, b in ((x, y), (x, _swap(y)), (_swap(x), y)):
            if _layout(a) == _layout(b):
                return dataclasses.replace(a, terms=a.terms + b.terms)
    return form(x) + form(y)


def _layout(x: Factored):
    """What must be equal for terms to stand in one sum; windows multiply only windows of the same kind."""
    kinds = {(t.left.windows.kernel, t.left.offset_axes) if isinstance(t.left, Patches) else None for t in x.terms}
    return x.shape, x.sides, x.tail, kinds


def _swap(x: Factored) -> Factored:
    """The same with left and right exchanged, if all factors are dense."""
    if not all(isinstance(term.left, Dense) for term in x.terms):
        return x
    terms = tuple(Term(term.right, term.left, term.precision) for term in x.terms)
    return dataclasses.replace(x, terms=terms, sides=x.sides.translate(str.maketrans("lr", "rl")))


def scale(x: Gradient, factor: jax.Array) -> Gradient:
    """x · factor, a scalar."""
    if not isinstance(x, Factored):
        return x * factor

    def scaled(term):
        array = term.right.array.astype(jnp.promote_types(term.right.array.dtype, x.dtype))
        return dataclasses.replace(term, right=Dense((array * factor).astype(array.dtype), term.right.labels))

    return dataclasses.replace(x, terms=tuple(map(scaled, x.terms)))


def cast(x: Gradient, dtype) -> Gradient:
    """x in another floating-point type."""
    return dataclasses.replace(x, dtype=dtype) if isinstance(x, Factored) else x.astype(dtype)


def _relabel(x: Factored, new: Callable[[int], int], leading=()) -> tuple[Term, ...]:
    return tuple(
        Term(term.left.relabel(new, leading), term.right.relabel(new, leading), term.precision) for term in x.terms
    )


def transpose(x: Gradient, permutation: tuple[int, ...]) -> Gradient:
    """x with its axes permuted: only their labels change."""
    if not isinstance(x, Factored):
        return jnp.transpose(x, permutation)
    if x.tail:
        return dataclasses.replace(x, tail=(*x.tail, ("transpose", tuple(permutation))))
    shape = tuple(x.shape[axis] for axis in permutation)
    sides = "".join(x.sides[axis] for axis in permutation) if x.terms else ""
    return Factored(_relabel(x, permutation.index), shape, sides, x.dtype)


def reshape(x: Gradient, shape: tuple[int, ...]) -> Gradient:
    """x in another shape: where axes only split, so do those of the factors, else it is noted in the tail."""
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
    """For each old axis the new ones that it becomes; None if axes are merged."""
    if math.prod(old) == 0:
        return None
    split, place = [], 0
    for length in old:
        mine, product = [], 1
        while product < length or (product == length and place < len(new) and new[place] == 1):
            if place == len(new) or length % (product * new[place]):
                return None
            product, mine, place = product * new[place], [*mine, place], place + 1
        split.append(mine)
    return split


def _split(factor: Dense, split: list[list[int]], shape: tuple[int, ...]) -> Dense:
    labels, lengths = [], []
    for label, length in zip(factor.labels, factor.array.shape):
        own = isinstance(label, int) and label >= 0
        labels += split[label] if own else [label]
        lengths += [shape[axis] for axis in split[label]] if own else [length]
    return Dense(factor.array.reshape(lengths), tuple(labels))


def sum_leading(x: Gradient) -> Gradient:
    """Σ over a leading axis that every array in x has: it becomes one more axis of uses."""
    if not isinstance(x, Factored):
        return jnp.sum(x, axis=0)

    def summed(term):
        leading = (min([*term.right.uses(), 0]) - 1,)
        keep = lambda axis: axis  # noqa: E731
        return Term(term.left.relabel(keep, leading), term.right.relabel(keep, leading), term.precision)

    return dataclasses.replace(x, terms=tuple(map(summed, x.terms)))


def stack_leading(x: Gradient, length: int) -> Gradient:
    """A leading axis that every array in x has becomes the first axis of the gradient."""
    if not isinstance(x, Factored):
        return x
    if not x.terms:
        return zero((length, *x.shape), x.dtype)
    if x.tail:
        return jax.vmap(form)(x)
    return Factored(_relabel(x, lambda axis: axis + 1, (0,)), (length, *x.shape), "k" + x.sides, x.dtype)


def right_of(term: Term, x: Factored) -> jax.Array:
    """[K, T, J]."""
    return term.right.arrange(x.axes("k"), term.left.uses(), x.axes("r"))


def slabs_of(term: Term, x: Factored) -> tuple[str, list[jax.Array]]:
    """The left factor, dense or windows, in parts of its left axes, and the order of their axes."""
    if isinstance(term.left, Patches):
        return "kit", term.left.slabs(x.axes("k"))
    return "kti", [term.left.arrange(x.axes("k"), term.left.uses(), x.axes("l"))]


def contract(equation: str, x: jax.Array, y: jax.Array, precision) -> jax.Array:
    sums = accumulator(jnp.promote_types(x.dtype, y.dtype))
    return jnp.einsum(equation, x, y, precision=precision, preferred_element_type=sums)


def multiply_out(x: Gradient) -> tuple[jax.Array, ...]:
    """The gradient in parts of its left axes, each [K, I', J], summed in float32 or better; an array as it is."""
    if not isinstance(x, Factored):
        return (x.astype(accumulator(x.dtype)),)
    products = [_products(term, x) for term in x.terms]
    return tuple(functools.reduce(jnp.add, of_all_terms) for of_all_terms in zip(*products, strict=True))


def _products(term: Term, x: Factored) -> list[jax.Array]:
    right = right_of(term, x)
    if isinstance(term.left, OneHot):
        rows = jnp.zeros((x.size("k"), x.size("l"), x.size("r")), accumulator(right.dtype))
        indices = jnp.arange(x.size("k"))[:, None], term.left.arrange(x.axes("k"))
        return [rows.at[indices].add(right.astype(rows.dtype))]
    order, slabs = slabs_of(term, x)
    return [contract(f"{order},ktj->kij", slab, right, term.precision) for slab in slabs]


def lay_out(x: Gradient, products: Sequence[jax.Array]) -> jax.Array:
    """What `multiply_out` gives as one array, with the gradient's own axes."""
    if not isinstance(x, Factored):
        return products[0]
    if not x.terms:
        return jnp.zeros(x.shape)
    left = x.terms[0].left
    in_left = [*left.offset_axes, left.channel_axis] if isinstance(left, Patches) else x.axes("l")
    made = [*x.axes("k"), *in_left, *x.axes("r")]
    product = products[0] if len(products) == 1 else jnp.concatenate(products, axis=1)
    product = product.reshape([x.shape[axis] for axis in made])
    product = jnp.transpose(product, [made.index(axis) for axis in range(len(made))])
    for operation, argument in x.tail:
        product = {"transpose": jnp.transpose, "reshape": jnp.reshape}[operation](product, argument)
    return product


def form(x: Gradient) -> jax.Array:
    """The gradient itself."""
    return lay_out(x, multiply_out(x)).astype(x.dtype) if isinstance(x, Factored) else x


def sum_squares(products: Sequence[jax.Array]) -> jax.Array:
    """The squared norm of a gradient that was multiplied out: XLA fuses each part's sum with its product."""
    return sum(jnp.sum(jnp.square(product)) for product in products)
