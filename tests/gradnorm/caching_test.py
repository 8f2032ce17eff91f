"""Transformations made in a loop: compiled once; a loss that is made anew each time is said."""

import dataclasses
import functools
import warnings

import jax
import jax.numpy as jnp
import pytest

from issgd_jax.gradnorm import caching, explain, per_example, per_example_grad_norms, value_grad_and_norms

PARAMS, X = jnp.ones(3), jnp.ones((4, 3))


def square_loss(params, x):
    return jnp.sum((params * x) ** 2)


class Model:
    def loss(self, params, x):
        return square_loss(params, x)


@dataclasses.dataclass
class NotHashable:
    scale: float

    def __call__(self, params, x):
        return self.scale * square_loss(params, x)


MODEL = Model()


def test_making_the_transformation_in_a_loop_traces_once():
    """Red if a step of a loop that makes its transformation there traces, and compiles, again."""
    traces = []

    def loss_fn(params, x):
        traces.append(1)
        return square_loss(params, x)

    for _ in range(3):
        per_example_grad_norms(loss_fn)(PARAMS, X)
        value_grad_and_norms(loss_fn, argnums=[0])(PARAMS, jnp.ones(4), X)
        explain(loss_fn, PARAMS, X)
    assert len(traces) == 3  # one for each transformation


@pytest.mark.parametrize("find_loss", [lambda: square_loss, lambda: MODEL.loss], ids=["function", "method"])
def test_equal_losses_share_a_transformation(find_loss):
    """Red if a method, a new object each time it is named, is taken for a new loss."""
    for transform in (per_example, per_example_grad_norms, value_grad_and_norms):
        assert transform(find_loss()) is transform(find_loss())


def test_other_options_and_other_shapes_are_other_programs():
    assert per_example_grad_norms(square_loss) is not per_example_grad_norms(square_loss, squared=True)
    rows = [explain(square_loss, jnp.ones(n), jnp.ones((1, n))).rows[0].shape for n in (2, 5, 2)]
    assert rows == [(2,), (5,), (2,)]


def test_a_loss_that_cannot_be_hashed_works():
    """Red if it is refused, or two that differ share a program."""
    for scale in (1.0, 2.0):
        assert per_example_grad_norms(NotHashable(scale))(PARAMS, X)[0] == pytest.approx(scale * 12**0.5)
        assert len(explain(NotHashable(scale), PARAMS, X).rows) == 1


def run_remade(times, shape=(4, 3), wrap=lambda loss_fn: loss_fn):
    for _ in range(times):
        value_grad_and_norms(wrap(lambda params, x: jnp.sum(jnp.cos(params * x))))(PARAMS, jnp.ones(4), jnp.ones(shape))


@pytest.mark.parametrize(
    "wrap", [lambda f: f, per_example, lambda f: functools.partial(f)], ids=["lambda", "per_example", "partial"]
)
def test_a_loss_that_is_made_anew_at_every_step_is_said_once(wrap, monkeypatch):
    """Red if a loop that compiles at every step is silent, or says it at every step."""
    monkeypatch.setattr(caching, "_traced_last", {})
    with pytest.warns(UserWarning, match="caching_test.py:.* was made anew and compiled 8 times .*: define it") as seen:
        run_remade(caching.REMADE + 4, wrap=wrap)
    assert len(seen) == 1


def test_a_loss_made_anew_inside_a_compiled_step_is_no_fault():
    """Red if a trainer that compiles its step for each of many runs is warned of."""

    def loss_fn(params, x):
        return jnp.sum(jnp.sin(params * x))

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(caching.REMADE + 2):
            fresh = functools.partial(loss_fn)
            jax.jit(lambda params, x, fresh=fresh: per_example_grad_norms(fresh)(params, x))(PARAMS, X)


def test_what_is_remembered_is_bounded():
    """Red if every loss of a long session stays in memory."""
    for i in range(caching.REMEMBERED + 5):
        per_example_grad_norms(functools.partial(square_loss, i))
    first = functools.partial(square_loss, 0.5)
    kept = per_example_grad_norms(first)
    for i in range(caching.REMEMBERED):
        per_example_grad_norms(functools.partial(square_loss, i))
    assert per_example_grad_norms(first) is not kept
