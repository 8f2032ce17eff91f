"""Sums over pairs of uses in blocks, against gradients that are formed in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from issgd_jax.gradnorm import pairs, per_example_grad_norms
from tests.gradnorm.helpers import QUICK
from tests.gradnorm.norms_test import arrays_made

# Ragged: three blocks of 4, 4 and 3 uses, where BLOCK is 4.
USES, LEFT, RIGHT, ROWS = 11, 3, 2, 7


def dense(w, x, slopes, index, added):
    return jnp.sum((x @ w) * slopes)


def dense_and_rows(w, x, slopes, index, added):
    """A matrix that is also a table, looked up more often than it multiplies."""
    return dense(w, x, slopes, index, added) + jnp.sum(w[index] * added)


@pytest.fixture(scope="module")
def compiled():
    """{loss: norms function of two examples}, by blocks of 4 uses, whatever forming would cost."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("issgd_jax.gradnorm.pairs.BLOCK", 4)
        patch.setattr("issgd_jax.gradnorm.cost.by_gram", lambda *_: True)
        shapes = (USES, LEFT), (USES, RIGHT), (ROWS,), (ROWS, RIGHT)
        batch = [jax.ShapeDtypeStruct((2, *shape), np.int32 if len(shape) == 1 else np.float32) for shape in shapes]
        w = jnp.ones((LEFT, RIGHT))
        return {
            loss: jax.jit(per_example_grad_norms(loss)).lower(w, *batch).compile(compiler_options=QUICK)
            for loss in (dense, dense_and_rows)
        }


@example(seed=0, magnitudes=(-22, 18), spread=5, zeros=0.0, cancelled=0.0)
@example(seed=1, magnitudes=(30, -30), spread=0, zeros=0.0, cancelled=1.0)
@example(seed=2, magnitudes=(0, 0), spread=0, zeros=1.0, cancelled=0.0)
@example(seed=3, magnitudes=(25, 5), spread=3, zeros=0.5, cancelled=0.0)
@given(
    seed=st.integers(0, 10_000),
    magnitudes=st.tuples(st.integers(-15, 15), st.integers(-15, 15)),
    spread=st.integers(0, 6),
    zeros=st.sampled_from([0.0, 0.3, 0.9]),
    cancelled=st.sampled_from([0.0, 0.8, 1.0]),
)
def test_blocks_keep_the_digits_of_norms(compiled, seed, magnitudes, spread, zeros, cancelled):
    """Red if a pair is left out or counted twice, or a block hides that sums cancelled, overflowed or underflowed."""
    rng = np.random.default_rng(seed)

    def numbers(count, width, magnitude):
        size = rng.normal(size=(2, count, width)) * 10.0 ** (magnitude + rng.uniform(-spread, spread, (2, count, 1)))
        return np.where(rng.random((2, count, 1)) < zeros, 0, size).astype(np.float32)

    x, slopes = numbers(USES, LEFT, magnitudes[0]), numbers(USES, RIGHT, magnitudes[1])
    half = USES // 2  # the second half takes away what the first adds, wholly or in part
    x[:, half : 2 * half] = np.where(cancelled, x[:, :half], x[:, half : 2 * half])
    slopes[:, half : 2 * half] -= np.float32(cancelled) * (slopes[:, :half] + slopes[:, half : 2 * half])
    index, added = rng.integers(0, LEFT, (2, ROWS)).astype(np.int32), numbers(ROWS, RIGHT, sum(magnitudes))
    rows = np.eye(LEFT)[index].swapaxes(1, 2)
    for loss, norms in compiled.items():
        terms = [(x.astype(float).swapaxes(1, 2), slopes)] + [(rows, added)] * (loss is dense_and_rows)
        expected = np.linalg.norm(sum(left @ right.astype(float) for left, right in terms), axis=(1, 2))
        absolute = np.linalg.norm(sum(np.abs(left) @ np.abs(right.astype(float)) for left, right in terms), axis=(1, 2))
        if np.all(absolute < 1e37):
            found = np.asarray(norms(jnp.ones((LEFT, RIGHT)), x, slopes, index, added), float)
            # Where uses cancel, a gradient in float32 itself has rounding errors of what it is the sum of.
            assert np.all(np.abs(found - expected) <= 2e-5 * expected + 2e-6 * absolute + 1e-36), (found, expected)


@pytest.mark.parametrize(("first", "second"), [(512, None), (513, None), (700, None), (600, 3), (1, 513), (513, 600)])
def test_each_pair_counts_once(first, second):
    """Red at the edges of blocks, of rows beside columns of another number, or if zeros that fill a block add."""
    rng = np.random.default_rng(0)
    a, b = (rng.integers(-3, 4, (2, count or 1, 1)).astype(np.float32) for count in (first, second))
    shapes = []

    def products(rows, columns):
        shapes.append((rows.shape[1], columns.shape[1]))
        return jnp.sum(jnp.square(rows * columns.swapaxes(1, 2)), axis=(1, 2))

    found = pairs.sum_over_pairs(products, a, None if second is None else b)
    np.testing.assert_array_equal(found, np.sum(a**2, (1, 2)) * np.sum((a if second is None else b) ** 2, (1, 2)))
    assert max(max(shape) for shape in shapes) <= pairs.FEW_BLOCKS * pairs.BLOCK
    assert pairs.num_pairs(first, second) >= first * (first + 1) // 2 if second is None else first * second


def test_long_sequences_make_no_square_array(monkeypatch):
    """Red if all pairs are in memory together, also of what the derivative of the norm keeps; in float64 under x64."""
    monkeypatch.setattr("issgd_jax.gradnorm.cost.by_gram", lambda *_: True)
    num_uses = 700
    x, slopes = np.random.default_rng(0).normal(size=(2, 1, num_uses, 2))
    with jax.enable_x64(True):
        batch = x, slopes, np.zeros((1, 1), int), np.zeros((1, 1, 2))
        norms_fn = per_example_grad_norms(dense)
        norms = jax.jit(norms_fn)(np.ones((2, 2)), *batch)
        np.testing.assert_allclose(norms, np.linalg.norm(x[0].T @ slopes[0]), rtol=1e-12)
        derivative = jax.grad(lambda x: norms_fn(np.ones((2, 2)), x, *batch[1:])[0])
        for function in (lambda x: norms_fn(np.ones((2, 2)), x, *batch[1:]), derivative):
            made = arrays_made(jax.make_jaxpr(function)(x).jaxpr)
            assert max(np.prod(shape) for shape in made) < num_uses**2
