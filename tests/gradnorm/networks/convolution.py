"""Convolutions: the scale in front makes the gradient of each layer's input count."""

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import lax

from tests.gradnorm.helpers import normalized
from tests.gradnorm.networks.registry import ARCHITECTURES, B, architecture, linen


def convolution(image, kernel, padding="SAME", **options):
    axes = "DHW"[1 - len(image) :]
    options |= {"padding": padding, "dimension_numbers": (f"N{axes}C", f"{axes}IO", f"N{axes}C")}
    options.setdefault("window_strides", (1,) * len(axes))

    def apply(p, x):
        return lax.conv_general_dilated(x[None] * p["scale"], p["kernel"], **options)[0] + p["bias"]

    def build(draw):
        return apply, {"scale": draw(image[-1]), "kernel": draw(*kernel), "bias": draw(kernel[-1])}, draw(B, *image)

    return build


ARCHITECTURES |= {
    "conv_1d": convolution((7, 3), (3, 3, 4)),
    "conv_2d": convolution((5, 6, 3), (3, 2, 3, 4)),
    "conv_3d": convolution((3, 4, 5, 2), (2, 3, 2, 2, 3)),
    "conv_stride": convolution((7, 8, 2), (3, 3, 2, 4), window_strides=(2, 3)),
    "conv_dilation": convolution((7, 8, 2), (3, 2, 2, 4), rhs_dilation=(2, 3)),
    "conv_input_dilation": convolution((4, 3, 2), (3, 3, 2, 4), [(1, 2), (2, 0)], lhs_dilation=(2, 3)),
    "conv_everything": convolution(
        (7, 8, 4), (3, 2, 2, 6), [(2, 1), (-1, 3)], window_strides=(2, 1), rhs_dilation=(2, 1), lhs_dilation=(1, 2),
        feature_group_count=2,
    ),
    "conv_grouped": convolution((5, 5, 6), (3, 3, 2, 9), feature_group_count=3),
    "conv_depthwise": convolution((5, 5, 4), (3, 3, 1, 4), feature_group_count=4),
    "conv_depthwise_multiplier": convolution((5, 5, 3), (3, 3, 1, 6), feature_group_count=3),
    "conv_valid": convolution((6, 5, 2), (3, 2, 2, 4), "VALID"),
    "conv_same_lower": convolution((6, 5, 2), (2, 4, 2, 4), "SAME_LOWER"),
    "conv_patches": convolution((8, 8, 3), (4, 4, 3, 5), "VALID", window_strides=(4, 4)),
    "conv_1x1": convolution((4, 4, 3), (1, 1, 3, 5)),
    "conv_of_a_large_image": convolution((24, 24, 2), (3, 3, 2, 2)),
    "conv_of_many_channels": convolution((2, 2, 24), (3, 3, 24, 20)),
    "conv_kernel_larger_than_the_image": convolution((2, 3, 2), (5, 5, 2, 3)),
}  # fmt: skip


@architecture
def conv_transpose(draw):
    return linen(draw, lambda _: nn.ConvTranspose(3, (3, 3), strides=(2, 2)), draw(B, 3, 4, 2))


@architecture
def conv_circular(draw):
    return linen(draw, lambda _: nn.Conv(3, (3, 3), padding="CIRCULAR"), draw(B, 4, 5, 2))


@architecture
def conv_separable(draw):
    def module(_):
        return nn.Sequential([nn.Conv(4, (3, 3), feature_group_count=4), jnp.tanh, nn.Conv(3, (1, 1))])

    return linen(draw, module, draw(B, 5, 5, 4))


@architecture
def conv_standardised_weights(draw):
    def apply(kernel, x):
        return lax.conv(x[None], normalized(kernel, (1, 2, 3)), (1, 1), "SAME")[0]

    return apply, draw(4, 3, 3, 3), draw(B, 3, 5, 5)


@architecture
def conv_by_patches(draw):
    def apply(p, x):
        return jnp.einsum("cxy,co->oxy", lax.conv_general_dilated_patches(x[None], (3, 3), (1, 1), "VALID")[0], p)

    return apply, draw(18, 4), draw(B, 2, 5, 5)


@architecture
def conv_with_pooling(draw):
    def apply(p, x):
        x = nn.max_pool(nn.relu(lax.conv(x[None], p["a"], (1, 1), "SAME")).transpose(0, 2, 3, 1), (2, 2), (2, 2))
        return nn.avg_pool(x, (2, 2)).mean((1, 2)) @ p["b"]

    return apply, {"a": draw(4, 2, 3, 3), "b": draw(4, 3)}, draw(B, 2, 6, 6)


@architecture
def conv_unet(draw):
    def apply(p, x):
        down = jnp.tanh(lax.conv(x[None], p["down"], (2, 2), "SAME"))
        up = jax.image.resize(down, (1, 3, 6, 6), "bilinear")
        return lax.conv(jnp.concatenate([x[None], up], 1), p["up"], (1, 1), "SAME")

    return apply, {"down": draw(3, 2, 3, 3), "up": draw(2, 5, 3, 3)}, draw(B, 2, 6, 6)
