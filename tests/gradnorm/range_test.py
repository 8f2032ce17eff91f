"""Norms whose squares overflow or underflow; each is red if a factor or a gradient is squared before it is scaled."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from issgd_jax.gradnorm import explain, per_example_grad_norms
from tests.gradnorm.helpers import QUICK, loop_norms

RNG = np.random.default_rng(0)
W = RNG.normal(size=(6, 6)).astype(np.float32)
X = RNG.normal(size=(3, 4, 6)).astype(np.float32)


def slopes(y):
    """Returns a linear loss whose gradient differs for every entry of y."""
    return jnp.sum(y * jnp.sin(1 + jnp.arange(y.size, dtype=y.dtype)).reshape(y.shape))


def convolved(image, kernel):
    layout = ("NHWC", "HWIO", "NHWC")
    return jax.lax.conv_general_dilated(image[None, :, :, None], kernel, (1, 1), "VALID", dimension_numbers=layout)


# Each is linear in w, of a gradient in proportion to s: {name: (loss(w, x, s), rule)}.
LINEAR = {
    "dense": (lambda w, x, s: s * slopes(x[0] @ w), "outer"),
    "many uses": (lambda w, x, s: s * slopes(x @ w), "gram"),
    "uses in a scan": (lambda w, x, s: s * slopes(jax.lax.scan(lambda c, r: (c, r @ w), 0, x)[1]), "gram"),
    "sum of uses": (lambda w, x, s: s * (slopes(x[0] @ w) + slopes(x[1] @ w)), "gram"),
    "rows": (lambda w, x, s: s * slopes(w[jnp.argsort(x[0])[jnp.array([0, 0, 3])]] * x[:3]), "one-hot"),
    "rows and dense": (lambda w, x, s: s * (slopes(w[jnp.array([1, 1])]) + slopes(x[:2] @ w.T)), None),
    "convolution": (lambda w, x, s: s * slopes(convolved(x, w[:2, :2].reshape(2, 2, 1, 1))), None),
    "experts": (lambda w, x, s: s * slopes(jnp.einsum("ki,kij->kj", x[:2, :3], w.reshape(2, 3, 6))), "outer"),
    "bias": (lambda w, x, s: s * slopes(x + w[0]), "formed"),
    "elementwise": (lambda w, x, s: s * slopes(x * w[:4]), "formed"),
    "a scaled matrix": (lambda w, x, s: slopes(x[0] @ (s * w)), "outer"),
}


@pytest.mark.parametrize("name", LINEAR)
def test_norms_from_the_least_to_the_largest_number(name):
    """Also of all leaves together, and of one use with huge inputs and tiny gradients, or the reverse."""
    loss_fn, rule = LINEAR[name]
    if rule is not None:
        assert explain(lambda w, x: loss_fn(w, x, 1.0), W, X).rows[0].rule == rule
    scales = np.float32([1e-30, 1e-25, 1e-17, 1e-15, 1e-8, 1, 1e10, 1e20, 1e25, 1e35])

    def scaled(w, example):
        x, s, up = example
        down = 1 / up
        return loss_fn(w["a"], x * up, s * down) + loss_fn(w["b"], x * up, s * down)

    @jax.jit
    def norms(w, x, up):
        each = jnp.repeat(x[:1], len(scales), 0), scales, jnp.full(len(scales), up, jnp.float32)
        return per_example_grad_norms(scaled)({"a": w, "b": w}, each)

    ordinary = np.sqrt(2) * loop_norms(lambda w, x: loss_fn(w, x, jnp.ones_like(w[0, 0])), W, X[:1])
    compiled = norms.lower(W, X, 1.0).compile(compiler_options=QUICK)
    for up in (1.0, 1e-20, 1e20, 1e-35, 1e35) if rule != "formed" and "rows" not in name else (1.0,):
        fits = [i for i, s in enumerate(scales.tolist()) if s / up * 0.1 > 1e-36 and s / up < 1e36]
        expected = ordinary * scales.astype(np.float64)
        np.testing.assert_allclose(np.asarray(compiled(W, X, up))[fits], expected[fits], rtol=2e-5, err_msg=str(up))


def test_a_huge_input_with_a_tiny_loss():
    def loss_fn(w, x):
        return 1e-20 * jnp.sum((x * 1e20) @ w)

    np.testing.assert_allclose(per_example_grad_norms(loss_fn)(W, X[:, 0]), loop_norms(loss_fn, W, X[:, 0]), rtol=1e-5)


@pytest.mark.parametrize(
    ("inputs", "gradients"),
    [
        ([1e-22, 1e-3, 1, 1], [1e18, 1e-10, 0, 0]),  # the square of an input underflows, and nothing else is as large
        ([1e-25, 1e-3, 1, 1], [1e22, 1e-6, 0, 0]),
        ([1e25, 1, 1, 1], [1e-25, 1, 1, 1]),
        ([1e-18, 1e-18, 1, 1], [1e-19, 1e-19, 1e-36, 1e-36]),
        ([1, 1, 1, 1], [1e-30, 0, 0, 1e-25]),
    ],
)
def test_uses_of_unlike_magnitudes(inputs, gradients):
    """Red if underflow in one factor is judged without the size of the other."""
    inputs, gradients = (np.float32(s)[:, None] for s in (inputs, gradients))
    loss_fn = lambda w, x: slopes(gradients * ((inputs * x) @ w))  # noqa: E731
    np.testing.assert_allclose(per_example_grad_norms(loss_fn)(W, X), loop_norms(loss_fn, W, X), rtol=1e-5)


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
def test_narrow_floats_are_squared_in_float32(dtype):
    """Red if a square of float16 overflows at 65504 or vanishes below 6e-8."""

    def loss_fn(p, x):
        rows = x.astype(dtype) @ p["w"]
        return slopes((rows * dtype(1e-3)).astype(jnp.float32)) + slopes(x[0].astype(dtype) * p["b"])

    params = {"w": W.astype(dtype), "b": W[0].astype(dtype)}
    for scale in (300, 3e-4):
        norms, expected = per_example_grad_norms(loss_fn)(params, X * scale), loop_norms(loss_fn, params, X * scale)
        assert norms.dtype == jnp.float32
        np.testing.assert_allclose(norms, expected, rtol=3e-2)


@pytest.mark.parametrize("uses", [1, 4])
def test_what_is_no_number_stays_so(uses):
    """Red if nan or an infinity becomes a number, or 0 · ∞ an infinity."""
    x = np.array(X[:, :uses])
    x[0, 0, 0], x[1, 0, 1] = np.inf, np.nan

    for loss_fn in (lambda w, x: jnp.sum(jax.nn.relu(x @ w)), lambda w, x: jnp.sum(x @ jnp.abs(w))):
        expected = loop_norms(loss_fn, W, x)
        np.testing.assert_allclose(per_example_grad_norms(loss_fn)(W, x), expected, rtol=1e-5)
    assert np.isinf(expected[0]) and np.isnan(expected[1])


def test_zero_examples_beside_others_do_not_form_gradients():
    """Red if a gradient of zero is taken for one that underflowed, and its chunk is formed at every step."""

    def loss_fn(w, x):
        return jnp.sum(jnp.sin(x @ w)) * x[0, 0]

    x = np.array(X)
    x[1] = 0
    formed = []
    original = jax.lax.cond

    def cond(predicate, yes, no):
        formed.append(predicate)
        return original(predicate, yes, no)

    with pytest.MonkeyPatch.context() as patch, jax.disable_jit():
        patch.setattr("issgd_jax.gradnorm.leaves.lax.cond", cond)
        norms = per_example_grad_norms(loss_fn)(W, x)
    np.testing.assert_allclose(norms, loop_norms(loss_fn, W, x), rtol=1e-5)
    assert norms[1] == 0 and [bool(p) for p in formed] == [False, True]


def test_a_gradient_that_is_zero_whatever_the_inputs_has_norm_zero():
    """Red if XLA knows a scale when it compiles, and squares it apart from the zero that it scales."""

    def loss(params, x):
        w, unused = params
        return jnp.sum(jax.lax.scan(lambda c, _: (jnp.sin(c * unused), None), w * x, None, length=0)[0])

    norms = per_example_grad_norms(loss, per_leaf=True)((jnp.ones(3), jnp.ones(())), jnp.ones((2, 3)))
    np.testing.assert_allclose(norms, [[3**0.5] * 2, [0, 0]], rtol=1e-6)


def test_one_condition_checks_all_parameters():
    """Red if each parameter has a condition of its own: on a CPU that takes as long as the norms of a small network."""

    def loss_fn(params, x):
        for kernel, bias in params:
            x = jnp.tanh(x @ kernel + bias)
        return jnp.sum(x)

    params = [(jnp.ones((6, 6)), jnp.ones(6))] * 4
    program = jax.jit(per_example_grad_norms(loss_fn)).lower(params, jnp.ones((5, 6))).as_text()
    assert program.count("stablehlo.case") == 1
