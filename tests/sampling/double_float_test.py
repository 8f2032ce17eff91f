"""Digits lost in the sums and products of pairs turn these red."""

from fractions import Fraction

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from issgd_jax.sampling import double_float
from issgd_jax.sampling.double_float import Double

FLOATS = st.floats(2.0**-40, 2.0**40, width=32)


def exact(x):
    return Fraction(float(x.high)) + Fraction(float(x.low))


def pair(high, low):
    return double_float.two_sum(np.float32(high), np.float32(high * low * 2.0**-25))


@pytest.mark.parametrize("name", ["add", "subtract", "multiply"])
@settings(deadline=None, max_examples=200)
@given(high=FLOATS, low=st.floats(0, 1, width=32), other=FLOATS, sign=st.sampled_from([-1, 1]))
def test_twice_the_digits(name, high, low, other, sign):
    """Compiled, where an optimizer could simplify (x + y) - x."""
    x, y = pair(high, low), np.float32(sign * other)
    second = y if name == "multiply" else Double(y, np.float32(0))
    result = jax.jit(getattr(double_float, name))(x, second)
    expected = {"add": exact(x) + Fraction(float(y)), "subtract": exact(x) - Fraction(float(y))}
    expected = expected.get(name, exact(x) * Fraction(float(y)))
    scale = abs(expected) if name == "multiply" else max(abs(exact(x)), abs(Fraction(float(y))))
    assert abs(exact(result) - expected) <= scale * Fraction(2) ** -46
    assert abs(result.low) <= np.spacing(np.abs(result.high)) / 2


def test_compares_by_the_lower_digits():
    one, a_little_more = double_float.two_sum(np.float32(1), np.float32(0)), Double(np.float32(1), np.float32(2**-30))
    assert double_float.less_equal(one, a_little_more) and not double_float.less_equal(a_little_more, one)
    assert double_float.less_equal(one, one)
