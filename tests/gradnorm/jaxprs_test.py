"""A version of JAX that writes an equation in another way costs time, not exactness, and is told of."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from issgd_jax.gradnorm import explain, jaxprs, per_example_grad_norms
from tests.gradnorm.helpers import loop_norms


def new_loss_fn():
    """Returns a function of its own: what was traced of an earlier one is remembered."""
    return lambda *args: loss_fn(*args)


def loss_fn(params, image, tokens):
    """Has an equation of every primitive that a rule reads parameters of."""
    layout = ("NHWC", "HWIO", "NHWC")
    x = jax.lax.conv_general_dilated(image[None], params["kernel"], (1, 1), "SAME", dimension_numbers=layout)
    rows = jax.checkpoint(lambda table: jnp.tanh(table[tokens]))(params["table"])
    state, _ = jax.lax.scan(lambda s, r: (jnp.tanh(s @ params["recurrent"] + r), None), jnp.zeros(4), rows)
    state = jax.lax.cond(state[0] > 0, lambda s: s @ params["once"], lambda s: jnp.sin(s @ params["once"]), state)
    state = state + jnp.concatenate([params["first"], params["second"]]) @ jnp.sin(state)
    state = jnp.tanh(state + jnp.tile(params["offset"].reshape(1, 5).T, (1, 1)).reshape(5))
    return jnp.sum(jnp.tanh(x)) + jnp.sum(jax.jit(lambda s: jnp.tanh(s @ params["late"].T))(state))


def arguments():
    rng = np.random.default_rng(0)
    shapes = {
        "kernel": (3, 3, 2, 4),
        "table": (6, 4),
        "recurrent": (4, 4),
        "once": (4, 5),
        "offset": (5,),
        "late": (3, 5),
        "first": (2, 5),
        "second": (3, 5),
    }
    params = {name: jnp.float32(rng.normal(size=shape)) for name, shape in shapes.items()}
    return params, jnp.float32(rng.normal(size=(3, 5, 5, 2))), jnp.int32(rng.integers(0, 6, (3, 4)))


# The loss has no closed_call, which JAX makes of few functions of its own.
@pytest.mark.filterwarnings("ignore:the function of .* was made anew")
@pytest.mark.parametrize("primitive", [name for name in jaxprs.PARAMETERS if name != "closed_call"])
def test_an_equation_with_other_parameters_is_formed_exactly_and_told(primitive, monkeypatch):
    """Red if a rule reads what is not there, or the rest is computed as if the equation were known."""
    (params, *batch), loss_fn = arguments(), new_loss_fn()
    monkeypatch.setitem(jaxprs.PARAMETERS, primitive, (*jaxprs.PARAMETERS[primitive], "of_a_later_jax"))
    np.testing.assert_allclose(
        per_example_grad_norms(loss_fn)(params, *batch), loop_norms(loss_fn, params, *batch), rtol=1e-4
    )
    explanation = explain(loss_fn, params, *batch)
    assert any(f"of_a_later_jax in {primitive}, but" in note for note in explanation.notes)
    assert all(note in str(explanation) for note in explanation.notes)


def test_here_every_equation_is_known():
    """Red if the installed version of JAX writes an equation as no version did before."""
    params, *batch = arguments()
    assert not explain(loss_fn, params, *batch).notes


@pytest.mark.parametrize("ft_in", [None, "three", ["a", "b"]])
def test_a_scan_whose_operands_cannot_be_told_apart(ft_in, monkeypatch):
    """Red if a tree of another form is taken for constants, carry and scanned."""
    jaxpr = jax.make_jaxpr(lambda x: jax.lax.scan(lambda s, r: (s + r, None), 0.0, x))(jnp.ones(3))
    (eqn,) = (eqn for eqn in jaxpr.eqns if eqn.primitive.name == "scan")
    known = jaxprs.read(eqn)
    assert (known.num_consts, known.num_carry, known.length) == (0, 1, 3)
    others = {k: v for k, v in eqn.params.items() if k not in ("num_consts", "num_carry", "ft_in")}
    with pytest.raises(jaxprs.UnknownEquationError, match="no parameter num_consts, num_carry in scan, but "):
        jaxprs.read(eqn.replace(params=others | ({} if ft_in is None else {"ft_in": ft_in})))
