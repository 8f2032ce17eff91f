"""The comparison with a loop of `jax.grad` passes where all is right, and names what is wrong."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from issgd_jax.gradnorm import check, leaves, norms, sums
from issgd_jax.task import models
from tests.gradnorm.helpers import cast, model_problem

PARAMS = {"w": jnp.float32([[1.0, -2.0], [0.5, 1.0]]), "b": jnp.float32([0.1, 0.2])}
X = jnp.float32(np.random.default_rng(0).normal(size=(9, 2)))


def loss_fn(params, x):
    return jnp.sum(jnp.tanh(x @ params["w"] + params["b"]) ** 2)


@pytest.mark.parametrize("name", models.MODELS)
def test_what_is_right_passes(name):
    """Red if rounding is taken for an error, or a loss, a norm or a leaf is not compared."""
    loss_fn, params, *batch = model_problem(name, 7)
    report = check(loss_fn, params, *batch)
    num_leaves = len(jax.tree.leaves(params))
    assert [row.quantity for row in report.rows] == ["loss", "norm"] + ["norm"] * num_leaves + ["gradient"] * num_leaves
    assert report.differing == () and 1e-4 < report.rtol < 1e-3
    assert len(str(report).splitlines()) == 1 + len(report.rows)


def test_options_pass_through():
    """Red if keys, aux or positions differ between the two sides."""

    def noisy(x, params, key):
        return loss_fn(params, x + jax.random.normal(key, x.shape)), {"x": x}

    options = {"has_aux": True, "keyed": True, "key": jax.random.key(0), "num_examples": 3}
    assert check(noisy, {"x": X}["x"], PARAMS, argnums=-1, **options).differing == ()
    assert check(noisy, X, PARAMS, argnums=(1,), **options).rows[-1].name == "[0]['w']"
    assert check(lambda p, batch: loss_fn(p, batch["x"]), PARAMS, {"x": np.asarray(X)}, num_examples=100)


def test_types_have_tolerances_of_their_own():
    """Red if bfloat16 is held to the digits of float32, or float64 is not held to more."""
    half = check(loss_fn, cast(PARAMS, jnp.bfloat16), X.astype(jnp.bfloat16))
    assert half.rtol == pytest.approx(2**-3.5)
    with jax.enable_x64(True):
        assert check(loss_fn, *cast((PARAMS, X), np.float64)).rtol < 1e-7


@pytest.mark.parametrize("wrong", ["gradient", "norm"])
def test_what_is_wrong_is_named(wrong, monkeypatch):
    """Red if a sum or a norm that is wrong by a thousandth passes, or the message hides the leaf or the example."""
    if wrong == "gradient":
        original = leaves.weighted_sum
        for module in (leaves, sums):
            monkeypatch.setattr(module, "weighted_sum", lambda g, c: original(g, None if c is None else 1.001 * c))
    else:
        original = leaves.checked
        monkeypatch.setattr(norms, "checked", lambda rows: [x.at[-1].multiply(1.001) for x in original(rows)])

    def fresh(params, x):
        return loss_fn(params, x)

    with pytest.raises(AssertionError, match=r"comparisons with jax.grad differ by more than 0.00035") as raised:
        check(fresh, PARAMS, X)
    lines = str(raised.value).splitlines()[2:]
    assert lines and all(wrong in line and "0.001" in line for line in lines)
    assert any("['w']" in line for line in lines)
    if wrong == "norm":
        assert all(line.split()[-4] == "8" for line in lines)  # the last of the batch


def test_a_gradient_that_is_not_finite_is_no_proof():
    """Red if nan is taken for equal to nan, and a test passes that compares nothing."""
    with pytest.raises(AssertionError, match="what jax.grad gives is not finite either: choose params"):
        check(loss_fn, PARAMS, X.at[0].set(jnp.nan))


def test_zeros_are_equal():
    """Red if 0 / 0 is an error: a leaf that is not used, or a batch of zeros."""
    report = check(lambda p, x: jnp.sum(p["b"] * x), PARAMS | {"unused": jnp.ones(3)}, X * 0)
    assert all(row.error == 0 for row in report.rows)


@pytest.mark.parametrize(
    ("error", "message", "args", "options"),
    [
        (ValueError, "num_examples must be >= 1, and a whole number, got 0", (PARAMS, X), {"num_examples": 0}),
        (ValueError, "rtol must be >= 0, got -1", (PARAMS, X), {"rtol": -1}),
        (ValueError, "params has no leaves", ({}, X), {}),
        (ValueError, "at least one example", (PARAMS, X[:0]), {}),
        (ValueError, "argnums must name", (PARAMS, X), {"argnums": 5}),
        (TypeError, "key= is missing", (PARAMS, X), {"keyed": True}),
        (TypeError, "has dtype int32", ({"w": jnp.ones((2, 2), jnp.int32)}, X), {}),
    ],
)
def test_wrong_arguments_are_named(error, message, args, options):
    loss = loss_fn if args[0] else lambda params, x: jnp.sum(x)
    with pytest.raises(error, match=message):
        check(loss, *args, **options)


def test_inside_jit_it_says_so():
    """Red if a traced value reaches NumPy."""
    with pytest.raises(ValueError, match="got traced values: call check outside jit"):
        jax.jit(lambda x: check(loss_fn, PARAMS, x).rtol)(X)
