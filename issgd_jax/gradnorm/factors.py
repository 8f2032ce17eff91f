"""Gradient of one parameter as a sum of outer products of factors.

    gradient[k, i, j] = Σ_t left[k, t, i] · right[k, t, j]

A dense layer applied T times within one example has one such term: `left` holds its T inputs, `right` the T gradients
with respect to its outputs. Each application is a *use* of the parameter. Every axis of the gradient belongs to one of
three sides: `k`, shared by both factors (groups, experts, scanned layers); `l`, of the left factor; `r`, of the right
factor. Factors keep the memory layout in which they were computed; labels identify their axes.

All values describe ONE example and are batched by `vmap`. Every class but `Windows` is a pytree.
"""

import dataclasses
import math
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

# Label of an axis of a factor: n >= 0 is axis n of the gradient, n < 0 an axis of uses, "0", "1", ... a spatial axis of
# an image.
Label = int | str

_STATIC = {"static": True}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Dense:
    """Dense factor.

    Attributes:
      array: The numbers, in any layout.
      labels: The label of each axis of `array`.
    """

    array: jax.Array
    labels: tuple[Label, ...] = dataclasses.field(metadata=_STATIC)

    def size(self, labels: Iterable[Label]) -> int:
        """Returns the number of elements along the labelled axes."""
        return math.prod(self.array.shape[self.labels.index(label)] for label in labels)

    def uses(self) -> list[int]:
        """Returns the labels of the use axes, in the order shared by all factors."""
        return sorted((label for label in self.labels if isinstance(label, int) and label < 0), reverse=True)

    def arrange(self, *groups: Iterable[Label]) -> jax.Array:
        """Returns the array with one axis for each group of labels."""
        groups = [list(group) for group in groups]
        moved = jnp.transpose(self.array, [self.labels.index(label) for group in groups for label in group])
        return moved.reshape([self.size(group) for group in groups])

    def relabel(self, new: Callable[[int], int], leading: tuple[Label, ...] = ()) -> "Dense":
        """Renames the gradient's axes by `new` and labels added leading axes by `leading`."""
        labels = (new(label) if isinstance(label, int) and label >= 0 else label for label in self.labels)
        return Dense(self.array, (*leading, *labels))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class OneHot:
    """Factor whose rows are one-hot vectors, stored as indices.

    Attributes:
      indices: For each of `axes`, an integer array over the shared axes and the uses.
      axes: Axes of the gradient that are indexed.
      sizes: Lengths of these axes.
    """

    indices: tuple[Dense, ...]
    axes: tuple[int, ...] = dataclasses.field(metadata=_STATIC)
    sizes: tuple[int, ...] = dataclasses.field(metadata=_STATIC)

    def uses(self) -> list[int]:
        """Returns the labels of the use axes, see `Dense.uses`."""
        return self.indices[0].uses()

    def arrange(self, shared: list[int]) -> jax.Array:
        """Returns i32[K, T], the index into all indexed axes flattened in the gradient's order."""
        flat = 0
        for _, size, index in sorted(zip(self.axes, self.sizes, self.indices), key=lambda axis: axis[0]):
            flat = flat * size + index.arrange(shared, self.uses())
        return flat

    def relabel(self, new: Callable[[int], int], leading: tuple[Label, ...] = ()) -> "OneHot":
        """Renames axes, see `Dense.relabel`."""
        indices = tuple(index.relabel(new, leading) for index in self.indices)
        return OneHot(indices, tuple(map(new, self.axes)), self.sizes)


@dataclasses.dataclass(frozen=True)
class Windows:
    """Windows of an image that a convolution kernel covers, in the terms of `lax.conv_general_dilated`.

    Attributes:
      kernel: Number of offsets within a window, for each spatial axis.
      steps: Number of windows, for each spatial axis.
      kernel_stride: Distance of neighbouring offsets in the padded image.
      step_stride: Distance of neighbouring windows in the padded image.
      padding: (low, high) padding of the image.
      dilation: Dilation of the image.
    """

    kernel: tuple[int, ...]
    steps: tuple[int, ...]
    kernel_stride: tuple[int, ...]
    step_stride: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]
    dilation: tuple[int, ...]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Patches:
    """Factor whose rows are windows of an image, extracted only when needed.

    Attributes:
      image: The image, with channel, use and spatial axes.
      windows: Geometry of the windows.
      offset_axes: Axes of the gradient that index the offsets within a window.
      channel_axis: Axis of the gradient that indexes the image's channels.
      positions: Labels of the use axes that index the windows.
    """

    image: Dense
    windows: Windows = dataclasses.field(metadata=_STATIC)
    offset_axes: tuple[int, ...] = dataclasses.field(metadata=_STATIC)
    channel_axis: int = dataclasses.field(metadata=_STATIC)
    positions: tuple[int, ...] = dataclasses.field(metadata=_STATIC)

    def uses(self) -> list[int]:
        """Returns the labels of the use axes, in the order of `slabs`."""
        return [*self.image.uses(), *self.positions]

    def slabs(self, shared: list[int]) -> list[jax.Array]:
        """Returns one [K, I', T] array for each offset along the first spatial axis, to bound peak memory."""
        num_axes = len(self.offset_axes)
        spatial = [[str(axis)] for axis in range(num_axes)]
        image = self.image.arrange(shared, [self.channel_axis], self.image.uses(), *spatial)
        for axis in reversed(range(num_axes)):  # [K, *offsets, I, C, *spatial]
            cut = self._cut(image, axis)
            image = jnp.stack(cut, axis=1) if axis else image
        uses = math.prod(cut[0].shape[-num_axes - 1 :])
        return [row.reshape(row.shape[0], -1, uses) for row in cut]

    def _cut(self, image: jax.Array, spatial_axis: int) -> list[jax.Array]:
        """Returns the strided slice of the padded image that each offset along one spatial axis covers."""
        windows, axis = self.windows, image.ndim - len(self.offset_axes) + spatial_axis
        (low, high), gap = windows.padding[spatial_axis], windows.dilation[spatial_axis]
        edges = [(low, high, gap - 1) if a == axis else (0, 0, 0) for a in range(image.ndim)]
        image = lax.pad(image, jnp.zeros((), image.dtype), edges)
        stride = windows.step_stride[spatial_axis]
        reach = (windows.steps[spatial_axis] - 1) * stride + 1
        starts = (offset * windows.kernel_stride[spatial_axis] for offset in range(windows.kernel[spatial_axis]))
        return [lax.slice_in_dim(image, start, start + reach, stride, axis) for start in starts]

    def relabel(self, new: Callable[[int], int], leading: tuple[Label, ...] = ()) -> "Patches":
        """Renames axes, see `Dense.relabel`."""
        axes = tuple(map(new, self.offset_axes))
        return Patches(self.image.relabel(new, leading), self.windows, axes, new(self.channel_axis), self.positions)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Term:
    """Sum of outer products, Σ_t left_t ⊗ right_t.

    Attributes:
      left: Left factor; a sparse factor is always the left one.
      right: Right factor.
      precision: Precision of products with these factors, as in `lax.dot_general`.
    """

    left: Dense | OneHot | Patches
    right: Dense
    precision: Any = dataclasses.field(default=None, metadata=_STATIC)

    @property
    def uses(self) -> int:
        """Number of outer products, T."""
        return self.right.size(self.right.uses())


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Factored:
    """Gradient as a sum of terms; zero if there are none.

    Attributes:
      terms: The terms.
      shape: Length of each axis.
      sides: Side of each axis, one of the letters k, l and r.
      dtype: Data type of the array that this represents.
      tail: Reshapes and transpositions that lead from `shape` to the gradient's own layout and mix the sides.
    """

    terms: tuple[Term, ...]
    shape: tuple[int, ...] = dataclasses.field(metadata=_STATIC)
    sides: str = dataclasses.field(metadata=_STATIC)
    dtype: Any = dataclasses.field(metadata=_STATIC)
    tail: tuple[tuple[str, tuple[int, ...]], ...] = dataclasses.field(default=(), metadata=_STATIC)

    @property
    def gradient_shape(self) -> tuple[int, ...]:
        """Shape of the gradient, after the tail."""
        shape = self.shape
        for operation, argument in self.tail:
            shape = argument if operation == "reshape" else tuple(shape[axis] for axis in argument)
        return shape

    def axes(self, side: str) -> list[int]:
        """Returns the axes of a side."""
        return [axis for axis, s in enumerate(self.sides) if s == side]

    def size(self, side: str) -> int:
        """Returns the number of elements along the axes of a side."""
        return math.prod(self.shape[axis] for axis in self.axes(side))


# A gradient that no rule covers is an array.
Gradient = Factored | jax.Array
