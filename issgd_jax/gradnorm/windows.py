"""Squared norms of gradients of convolutions, without arrays of windows or gradients: by a compiled kernel on CPUs."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from issgd_jax.gradnorm import algebra
from issgd_jax.gradnorm.factors import Factored, Patches
from issgd_jax.kernels import available, call


def fits(example: Factored) -> bool:
    """Returns whether the kernel knows a gradient: of a convolution of one image of two axes, in float32, ungrouped."""
    if len(example.terms) != 1 or not isinstance(example.terms[0].left, Patches):
        return False
    left, right = example.terms[0].left, example.terms[0].right
    return (
        len(left.offset_axes) == 2
        and left.windows.dilation == (1, 1)
        and left.image.size(left.image.uses()) == 1
        and example.size("k") == 1
        and left.image.array.dtype == right.array.dtype == jnp.float32
        and 0 not in (*left.image.array.shape, *right.array.shape)
        and available()
    )


def scale(x: Factored, factor: jax.Array) -> Factored:
    """Returns a gradient that `fits`, times a power of two f32[].

    Half of it for the image and half for the derivatives: where a gradient leaves the range of squares, one of them may
    be near the other end of the range of numbers.
    """
    (term,) = x.terms
    factor = factor.astype(jnp.float32)  # wider, where other leaves are
    half = jax.lax.reduce_precision(jnp.sqrt(factor), jnp.finfo(jnp.float32).nexp, 0)
    image = dataclasses.replace(term.left.image, array=term.left.image.array * half)
    term = dataclasses.replace(term, left=dataclasses.replace(term.left, image=image))
    return algebra.scale(dataclasses.replace(x, terms=(term,)), factor / half)


def squared_norms(gradients: Factored, channels: list[int], plain: Callable[[Factored], jax.Array]) -> jax.Array:
    """Returns the squared norms f32[B] of a batch of gradients that `fits`.

    Args:
      gradients: Of a batch, each array with leading axis B.
      channels: Axes of one image but those of space: of length 1, and that of the channels.
      plain: The same, for other devices than CPUs and for derivatives.
    """

    @jax.custom_jvp
    def squared(gradients):
        return jax.lax.platform_dependent(gradients, cpu=by_kernel, default=plain)

    @squared.defjvp
    def squared_jvp(primals, tangents):
        return jax.jvp(plain, primals, tangents)

    def by_kernel(gradients):
        (term,) = gradients.terms
        windows, lows = term.left.windows, [low for low, _ in term.left.windows.padding]
        image = jax.vmap(lambda image: image.arrange(["0"], ["1"], channels))(term.left.image)
        right = jax.vmap(lambda x: algebra.right_factor(x.terms[0], x)[0])(gradients)
        sizes = (*windows.kernel, *windows.steps, *windows.kernel_stride, *windows.step_stride, *lows)
        result = jax.ShapeDtypeStruct(image.shape[:1], image.dtype)
        return call("convolution_squares", result, image, right, geometry=np.array(sizes, np.int64))

    return squared(gradients)
