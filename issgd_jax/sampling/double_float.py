"""Arithmetic with twice the digits of float32, where there is no float64: a number is an unevaluated sum.

Of `high + low`, low is at most half a unit in the last place of high, so that pairs compare like numbers. Errors are
below `2^-46` of the largest number met. Source: Dekker 1971; Knuth, TAOCP 2, section 4.2.2.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Double(NamedTuple):
    """The number high + low.

    Attributes:
      high, low: f32 of any one shape.
    """

    high: jax.Array
    low: jax.Array


def two_sum(x: jax.Array, y: jax.Array) -> Double:
    """Returns x + y, exactly."""
    high = x + y
    from_y = high - x
    return Double(high, (x - (high - from_y)) + (y - from_y))


def add(x: Double, y: Double) -> Double:
    """Returns x + y."""
    high, low = two_sum(x.high, y.high)
    return two_sum(high, low + (x.low + y.low))


def subtract(x: Double, y: Double) -> Double:
    """Returns x - y."""
    return add(x, Double(-y.high, -y.low))


def multiply(x: Double, y: jax.Array) -> Double:
    """Returns x · y, y a single float."""
    high = x.high * y
    x_upper, x_lower = _halves(x.high)
    y_upper, y_lower = _halves(y)
    low = ((x_upper * y_upper - high) + x_upper * y_lower + x_lower * y_upper) + x_lower * y_lower
    return two_sum(high, low + x.low * y)


def less_equal(x: Double, y: Double) -> jax.Array:
    """Returns x <= y."""
    return (x.high < y.high) | ((x.high == y.high) & (x.low <= y.low))


def _halves(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns the upper 12 bits of the mantissa and the rest: products of halves are exact."""
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32) & jnp.uint32(0xFFFFF000)
    upper = jax.lax.bitcast_convert_type(bits, jnp.float32)
    return upper, x - upper
