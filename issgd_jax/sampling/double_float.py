"""Arithmetic with twice the digits of float32, where float64 is not available.

A number is an unevaluated sum `high + low`, where low is at most half a unit in the last place of high, so that pairs
compare like numbers. Errors are below `2^-46` of the largest number involved.

Source: Dekker 1971; Knuth, TAOCP 2, section 4.2.2.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Double(NamedTuple):
    """Number `high + low`.

    Attributes:
      high: f32[...].
      low: f32[...], of the same shape.
    """

    high: jax.Array
    low: jax.Array


def two_sum(x: jax.Array, y: jax.Array) -> Double:
    """Returns x + y, exactly."""
    high = x + y
    y_part = high - x
    return Double(high, (x - (high - y_part)) + (y - y_part))


def add(x: Double, y: Double) -> Double:
    """Returns x + y."""
    high, low = two_sum(x.high, y.high)
    return two_sum(high, low + (x.low + y.low))


def subtract(x: Double, y: Double) -> Double:
    """Returns x - y."""
    return add(x, Double(-y.high, -y.low))


def multiply(x: Double, y: jax.Array) -> Double:
    """Returns x · y, where y is one f32."""
    high = x.high * y
    x_upper, x_lower = _split(x.high)
    y_upper, y_lower = _split(y)
    low = ((x_upper * y_upper - high) + x_upper * y_lower + x_lower * y_upper) + x_lower * y_lower
    return two_sum(high, low + x.low * y)


def less_equal(x: Double, y: Double) -> jax.Array:
    """Returns x <= y."""
    return (x.high < y.high) | ((x.high == y.high) & (x.low <= y.low))


def _split(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns the upper 12 bits of the mantissa and the rest, so that products of halves are exact."""
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32) & jnp.uint32(0xFFFFF000)
    upper = jax.lax.bitcast_convert_type(bits, jnp.float32)
    return upper, x - upper
