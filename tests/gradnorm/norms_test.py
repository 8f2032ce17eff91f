"""Each fast norm against a Python loop of `jax.grad`; a dropped leaf, example or square root turns these red."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, seed, settings
from hypothesis import strategies as st

from issgd_jax.gradnorm import explain, per_example_grad_norms, value_grad_and_norms
from issgd_jax.gradnorm.factors import Dense, Factored, Term
from issgd_jax.gradnorm.leaves import weighted_sum
from issgd_jax.task import models
from tests.gradnorm.helpers import loop_norms, model_problem
from tests.helpers import soak, soak_seed


@pytest.mark.parametrize("name", models.MODELS)
def test_equals_a_loop_for_every_model(name):
    loss_fn, params, images, labels = model_problem(name, 13)
    norms = jax.jit(per_example_grad_norms(loss_fn, microbatch_size=4))(params, images, labels)
    np.testing.assert_allclose(norms, loop_norms(loss_fn, params, images, labels), rtol=1e-5)


@seed(soak_seed())
@settings(deadline=None, max_examples=soak(10, 25))
@given(size=st.integers(1, 9), microbatch=st.integers(1, 12), width=st.integers(1, 5), seed=st.integers(0, 99))
def test_any_batch_and_microbatch_size(size, microbatch, width, seed):
    rng = np.random.default_rng(seed)
    params = {"w": rng.normal(size=(width, 3)).astype(np.float32), "unused": np.ones(2, np.float32)}
    x = rng.normal(size=(size, width)).astype(np.float32)

    def loss_fn(p, row):
        return jnp.sum(jnp.tanh(row @ p["w"]) ** 2)

    norms = per_example_grad_norms(loss_fn, microbatch_size=microbatch)(params, x)
    np.testing.assert_allclose(norms, loop_norms(loss_fn, params, x), rtol=1e-5, atol=1e-7)


def test_leaves_of_the_batch_and_results_without_elements(monkeypatch):
    """Red if microbatches, asked for or not, divide by their size."""

    def loss_fn(w, x, empty):
        return jnp.sum(jnp.sin(w) * x) ** 2 + jnp.sum(empty), empty

    batch = jnp.arange(10.0).reshape(5, 2), jnp.zeros((5, 0))
    expected = loop_norms(lambda *args: loss_fn(*args)[0], jnp.ones(2), *batch)
    for size in (None, 2, 5):
        norms, aux = per_example_grad_norms(loss_fn, has_aux=True, microbatch_size=size)(jnp.ones(2), *batch)
        np.testing.assert_allclose(norms, expected, rtol=1e-5)
        assert aux.shape == (5, 0)


@pytest.mark.parametrize("per_leaf", [False, True])
def test_norms_of_float32_stay_float32_beside_64_bit_types(per_leaf):
    """Red if a leaf that is not used, or the sum over leaves, makes them wider."""
    with jax.enable_x64(True):
        x = jnp.ones((3, 2), jnp.float32)
        params = {"w": jnp.ones(2, jnp.float32), "unused": jnp.ones(2, jnp.float32)}
        losses, gradient, norms = value_grad_and_norms(lambda p, x: jnp.sum(p["w"] * x), per_leaf=per_leaf)(
            params, jnp.ones(3, jnp.float32), x
        )
        assert {leaf.dtype for leaf in jax.tree.leaves((losses, gradient, norms))} == {jnp.dtype(jnp.float32)}


@pytest.mark.parametrize("name", ["convnet", "transformer"])
def test_memory_bounds_below_one_gradient_leave_the_numbers_alone(name, monkeypatch):
    monkeypatch.setattr("issgd_jax.gradnorm.leaves.CPU_BYTES", 16)
    monkeypatch.setattr("issgd_jax.gradnorm.microbatches.UNCOVERED_BYTES", 16)
    loss_fn, params, *batch = model_problem(name, 3)
    np.testing.assert_allclose(
        per_example_grad_norms(loss_fn)(params, *batch), loop_norms(loss_fn, params, *batch), rtol=1e-5
    )


def tied_loss(params, tokens):
    """Looks up, recurs, and scores with the same table."""

    def cell(state, x):
        return jnp.tanh(x + state @ params["recurrent"]), None

    state, _ = jax.lax.scan(cell, jnp.zeros(params["table"].shape[1]), params["table"][tokens])
    return -jax.nn.log_softmax(state @ params["table"].T)[tokens[0]]


def tied_problem(vocabulary=50, width=8, length=6, size=4):
    rng = np.random.default_rng(3)
    params = {"table": rng.normal(size=(vocabulary, width)), "recurrent": rng.normal(size=(width, width)) / 3}
    return tied_loss, jax.tree.map(jnp.float32, params), rng.integers(0, vocabulary, (size, length))


@pytest.mark.parametrize("gram", [True, False])
@pytest.mark.parametrize("name", [*models.MODELS, "tied"])
def test_each_rule_is_exact_wherever_the_cheaper_one_would_be_taken(name, gram, monkeypatch):
    monkeypatch.setattr("issgd_jax.gradnorm.cost.by_gram", lambda *_: gram)
    loss_fn, params, *batch = tied_problem() if name == "tied" else model_problem(name, 5)
    importance_weights = np.linspace(0.5, 2, len(batch[0]), dtype=np.float32)
    losses, gradient, norms = value_grad_and_norms(loss_fn)(params, importance_weights, *batch)

    def weighted(params):
        losses = jnp.stack([loss_fn(params, *(x[i] for x in batch)) for i in range(len(batch[0]))])
        return jnp.mean(importance_weights * losses), losses

    expected, expected_losses = jax.jit(jax.grad(weighted, has_aux=True))(params)
    np.testing.assert_allclose(norms, loop_norms(loss_fn, params, *batch), rtol=1e-5)
    np.testing.assert_allclose(losses, expected_losses, rtol=1e-5, atol=1e-6)
    jax.tree.map(lambda g, e: np.testing.assert_allclose(g, e, rtol=1e-4, atol=1e-5), gradient, expected)


def equations(jaxpr):
    """Equations of a jaxpr and of the jaxprs within it."""
    for eqn in jaxpr.eqns:
        yield eqn
        for inner in jax.tree.leaves(list(eqn.params.values()), is_leaf=lambda x: hasattr(x, "eqns")):
            if hasattr(inner, "eqns"):
                yield from equations(getattr(inner, "jaxpr", inner))


def arrays_made(jaxpr):
    """Shapes of all arrays that a jaxpr and the jaxprs within it make."""
    return (v.aval.shape for eqn in equations(jaxpr) for v in eqn.outvars)


@pytest.mark.parametrize("name", ["mlp", "tied"])
def test_no_gradient_is_formed(name, monkeypatch):
    monkeypatch.setattr("issgd_jax.gradnorm.leaves.lax.cond", lambda _, yes, no: yes())  # it is, where uses cancel
    size = 20
    if name == "mlp":
        loss_fn, params, *batch = model_problem("mlp", size)
    else:
        loss_fn, params, *batch = tied_problem(vocabulary=500, width=32, size=size)
    gradient = size * max(leaf.size for leaf in jax.tree.leaves(params))
    by_definition = jax.vmap(jax.grad(loss_fn), (None, *(0 for _ in batch)))
    largest = {
        function: max(math.prod(shape) for shape in arrays_made(jax.make_jaxpr(function)(params, *batch).jaxpr))
        for function in (by_definition, per_example_grad_norms(loss_fn))
    }
    assert largest.pop(by_definition) >= gradient
    assert max(largest.values()) < gradient / 2


def nearly_cancelling():
    """Losses whose uses of one matrix almost cancel, or do: (name, loss_fn)."""

    def centred(w, x):
        states = jnp.tanh((1 + jnp.arange(6)[:, None] / 1e3) * x @ w)
        return jnp.sum((states - jnp.mean(states, axis=0)) ** 2)

    yield "centred", centred
    yield "twins", lambda w, x: jnp.sum((jnp.tanh(x @ w) - jnp.tanh((1.001 * x) @ w)) ** 2)
    yield "difference", lambda w, x: jnp.sum(jnp.tanh(x @ w) - jnp.tanh((1.001 * x) @ w))
    yield "nothing", lambda w, x: jnp.sum(jnp.sin(x @ w)) - jnp.sum(jnp.sin(x @ w))


@pytest.mark.parametrize(("name", "loss_fn"), list(nearly_cancelling()))
def test_uses_that_cancel_keep_their_digits(name, loss_fn):
    rng = np.random.default_rng(0)
    w, x = (rng.normal(size=shape).astype(np.float32) / 8 for shape in ((64, 64), (6, 64)))
    norms = np.asarray(per_example_grad_norms(loss_fn)(w, x))
    naive = loop_norms(loss_fn, w, x)  # in float32 too: cancellation within the loss itself costs both the same
    if name == "nothing":
        np.testing.assert_array_equal(norms, 0)
    else:
        np.testing.assert_allclose(norms, naive, rtol=1e-3)


@pytest.mark.parametrize("mode", ["promise_in_bounds", "clip", "fill", "drop", None])
@pytest.mark.parametrize("dtype", [np.uint8, np.int8, np.int32])
def test_rows_outside_the_table_are_dropped_or_clipped_as_jax_does(mode, dtype):
    table = np.random.default_rng(0).normal(size=(300 if dtype == np.uint8 else 5, 3)).astype(np.float32)
    indices = np.array([[0, 7], [2, 2], [100, 127], [5, 4]], dtype)

    def lookup(table, index):
        rows = table[index] if mode is None else table.at[index].get(mode=mode, fill_value=0)
        return jnp.sum(jnp.sin(rows) * jnp.arange(6).reshape(2, 3)) + jnp.sum(table[index[0]] ** 2)

    np.testing.assert_allclose(
        per_example_grad_norms(lookup)(table, indices), loop_norms(lookup, table, indices), rtol=1e-5, atol=1e-7
    )


def test_a_scale_is_applied_in_the_wider_type():
    # In float16, 1e-8 is 0.
    def loss_fn(w, x):
        return jnp.sum((x.astype(jnp.float16) @ (w * 1e-8).astype(jnp.float16)).astype(jnp.float32))

    w, x = jnp.ones((4, 4)), jnp.ones((2, 4))
    np.testing.assert_allclose(per_example_grad_norms(loss_fn)(w, x), 4e-8, rtol=1e-3)


def test_a_convolution_without_spatial_axes_and_one_whose_parameter_is_the_image():
    rng = np.random.default_rng(0)
    w, prompt, x = (jnp.float32(rng.normal(size=shape)) for shape in ((3, 4), (40, 40, 1), (2, 40, 40, 1)))
    kernel = jnp.float32(rng.normal(size=(3, 3, 1, 2)))

    def flat(w, x):
        return jnp.sum(jnp.sin(jax.lax.conv_general_dilated(x[None], w, (), (), dimension_numbers=("NC", "IO", "NC"))))

    def prompted(prompt, x):
        y = jax.lax.conv_general_dilated(
            (x + prompt)[None], kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        return jnp.sum(jnp.sin(y))

    for loss_fn, params, batch in ((flat, w, x[:, :3, 0, 0]), (prompted, prompt, x)):
        np.testing.assert_allclose(
            per_example_grad_norms(loss_fn)(params, batch), loop_norms(loss_fn, params, batch), rtol=1e-5
        )
    assert explain(prompted, prompt, x).rows[0].rule == "formed"


@pytest.mark.parametrize("shape", [(50, 3), (3, 50)])
def test_the_sum_over_a_batch_multiplies_the_smaller_factor(shape):
    """Red if the coefficients meet the larger one: with an MLP on images, 1/40 of a step more."""
    rng = np.random.default_rng(0)
    left, right, coefficients = (rng.normal(size=size).astype(np.float32) for size in ((4, shape[0]), (4, shape[1]), 4))
    gradient = Factored((Term(Dense(left, (0,)), Dense(right, (1,))),), shape, "lr", jnp.float32)
    program = jax.make_jaxpr(weighted_sum)(gradient, coefficients)
    assert [eqn.outvars[0].aval.size for eqn in equations(program.jaxpr) if eqn.primitive.name == "mul"] == [4 * 3]
    expected = np.einsum("b,bi,bj->ij", *(x.astype(np.float64) for x in (coefficients, left, right)))
    np.testing.assert_allclose(weighted_sum(gradient, coefficients), expected, rtol=1e-5, atol=1e-5)


def test_a_layer_used_many_times_is_one_term():
    def loss_fn(w, x):
        h = x
        for _ in range(30):
            h = jnp.sin(h @ w + x)
        return jnp.sum(h)

    rng = np.random.default_rng(0)
    w, x = (jnp.float32(rng.normal(size=shape)) / 10 for shape in ((64, 64), (3, 64)))
    (row,) = explain(loss_fn, w, x).rows
    assert (row.rule, row.uses) == ("gram", "30")
    dots = str(jax.make_jaxpr(per_example_grad_norms(loss_fn))(w, x)).count("dot_general[")
    assert dots < 30 * 3 + 10  # forward, backward, for a gradient that has to be formed; and a few for the norm
    np.testing.assert_allclose(per_example_grad_norms(loss_fn)(w, x), loop_norms(loss_fn, w, x), rtol=1e-5)


def test_terms_of_unlike_layouts_are_summed_in_the_carry():
    def loss_fn(w, xs):
        def cell(state, x):
            return jnp.tanh(jnp.einsum("d,hde->he", x, w) + jnp.einsum("hd,hde->he", state, w)), None

        return jnp.sum(jax.lax.scan(cell, jnp.zeros((2, 6)), xs)[0])

    rng = np.random.default_rng(0)
    w, xs = jnp.float32(rng.normal(size=(2, 6, 6)) / 3), jnp.float32(rng.normal(size=(3, 50, 6)))
    norms_fn = per_example_grad_norms(loss_fn)
    largest = max(math.prod(shape) for shape in arrays_made(jax.make_jaxpr(norms_fn)(w, xs).jaxpr))
    assert largest < 3 * 50 * w.size
    np.testing.assert_allclose(norms_fn(w, xs), loop_norms(loss_fn, w, xs), rtol=1e-5)


@pytest.mark.parametrize("scaled", [lambda w: 0.5 * w, lambda w: w * 0.5, lambda w: w / 2, lambda w: -w])
def test_a_scaled_matrix_is_still_an_outer_product(scaled):
    def loss_fn(w, x):
        return jnp.sum(jnp.sin(x @ scaled(w)))

    w, x = jnp.ones((4, 5)) / 3, jnp.arange(8.0).reshape(2, 4)
    assert explain(loss_fn, w, x).rows[0].rule == "outer"
    np.testing.assert_allclose(per_example_grad_norms(loss_fn)(w, x), loop_norms(loss_fn, w, x), rtol=1e-5)


def test_squared_and_per_leaf_norms_add_up():
    loss_fn, params, *batch = model_problem("convnet", 4)
    norms = per_example_grad_norms(loss_fn)(params, *batch)
    squares = per_example_grad_norms(loss_fn, squared=True)(params, *batch)
    leaves = per_example_grad_norms(loss_fn, per_leaf=True)(params, *batch)
    assert jax.tree.structure(leaves) == jax.tree.structure(params)
    np.testing.assert_allclose(squares, norms**2, rtol=1e-6)
    np.testing.assert_allclose(sum(x**2 for x in jax.tree.leaves(leaves)), squares, rtol=1e-5)
    grad = jax.grad(loss_fn)(params, *(x[1] for x in batch))
    jax.tree.map(lambda n, g: np.testing.assert_allclose(n[1], jnp.linalg.norm(g), rtol=1e-5), leaves, grad)


def test_argnums_name_the_parameters_wherever_they_stand():
    rng = np.random.default_rng(0)
    w, v, x = rng.normal(size=(3, 2)), rng.normal(size=2), rng.normal(size=(5, 3))
    w, v, x = (jnp.float32(a) for a in (w, v, x))

    def loss_fn(x, w, v):
        return jnp.tanh(x @ w) @ v

    both = per_example_grad_norms(loss_fn, argnums=(1, 2), per_leaf=True)(x, w, v)
    expected = [
        loop_norms(lambda p, x, i=i: loss_fn(x, *[p if j == i else (w, v)[j] for j in (0, 1)]), (w, v)[i], x)
        for i in (0, 1)
    ]
    np.testing.assert_allclose(both[0], expected[0], rtol=1e-5)
    np.testing.assert_allclose(both[1], expected[1], rtol=1e-5)
    frozen = jnp.broadcast_to(v, (5, 2))
    np.testing.assert_allclose(per_example_grad_norms(loss_fn, argnums=1)(x, w, frozen), expected[0], rtol=1e-5)
    _, gradient, norms = value_grad_and_norms(loss_fn, argnums=(2, 1), per_leaf=True)(x, jnp.ones(5), w, v)
    assert [g.shape for g in gradient] == [v.shape, w.shape]
    np.testing.assert_allclose(norms[1], expected[0], rtol=1e-5)


@pytest.mark.parametrize("microbatch_size", [None, 2])
def test_aux_comes_with_the_batch_in_front(microbatch_size):
    loss_fn, params, images, labels = model_problem("mlp", 5)

    def with_aux(params, image, label):
        return loss_fn(params, image, label), {"label": label, "brightness": jnp.mean(image, axis=(0, 1))}

    options = {"has_aux": True, "microbatch_size": microbatch_size}
    norms, aux = per_example_grad_norms(with_aux, **options)(params, images, labels)
    (losses, aux_again), _, _ = value_grad_and_norms(with_aux, **options)(params, jnp.ones(5), images, labels)
    np.testing.assert_allclose(norms, per_example_grad_norms(loss_fn)(params, images, labels), rtol=1e-6)
    np.testing.assert_array_equal(aux["label"], labels)
    np.testing.assert_allclose(aux["brightness"], np.mean(images, axis=(1, 2)), rtol=1e-5, atol=1e-6)
    assert losses.shape == (5,) and jax.tree.structure(aux) == jax.tree.structure(aux_again)


@pytest.mark.parametrize("microbatch_size", [1, 3, 7])
def test_microbatches_give_the_same_gradient(microbatch_size):
    loss_fn, params, *batch = model_problem("convnet", 7)
    importance_weights = np.linspace(0.1, 3, 7, dtype=np.float32)
    whole = value_grad_and_norms(loss_fn)(params, importance_weights, *batch)
    parts = value_grad_and_norms(loss_fn, microbatch_size=microbatch_size)(params, importance_weights, *batch)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-6), parts, whole)


def test_a_key_for_each_example_drops_out_the_same_units():
    loss_fn, params, images, labels = model_problem("mlp", 4)
    keys = jax.random.split(jax.random.key(0), 4)

    def noisy(params, image, label, key):
        return loss_fn(params, image * jax.random.bernoulli(key, 0.5, image.shape), label)

    norms = per_example_grad_norms(noisy)(params, images, labels, keys)
    np.testing.assert_allclose(norms, loop_norms(noisy, params, images, labels, keys), rtol=1e-5)


def test_a_gradient_that_is_no_number_is_not_taken_for_zero():
    norms = per_example_grad_norms(lambda p, x: jnp.sum(jnp.log(x @ p)))(
        jnp.ones((3, 3)), jnp.array([[1.0] * 3, [0.0] * 3])
    )
    assert np.isfinite(norms[0]) and not np.isfinite(norms[1])


def test_a_bfloat16_network_is_measured_in_float32():
    loss_fn, params, images, labels = model_problem("transformer", 3)
    expected = loop_norms(loss_fn, params, images, labels)
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    _, gradient, norms = value_grad_and_norms(loss_fn)(half, jnp.ones(3), images.astype(jnp.bfloat16), labels)
    assert norms.dtype == jnp.float32 and all(g.dtype == jnp.bfloat16 for g in jax.tree.leaves(gradient))
    np.testing.assert_allclose(norms, expected, rtol=0.1)


def test_bfloat16_sums_in_float32():
    # A sum of 4,096 ones stops at 256 in bfloat16.
    norms = per_example_grad_norms(lambda p, x: jnp.sum(p * x))(
        jnp.ones(4096, jnp.bfloat16), jnp.ones((2, 4096), jnp.bfloat16)
    )
    assert norms.dtype == jnp.float32
    np.testing.assert_array_equal(norms, [64, 64])


def test_a_zero_gradient_has_norm_zero():
    params = {"elementwise": jnp.ones(3), "dense": jnp.ones((3, 3)), "unused": jnp.ones((4, 4))}

    def loss_fn(p, x):
        return jnp.sum(p["elementwise"] * x) + jnp.sum(x @ p["dense"])

    _, gradient, norms = value_grad_and_norms(loss_fn)(params, jnp.ones(2), jnp.zeros((2, 3)))
    np.testing.assert_array_equal(norms, [0, 0])
    jax.tree.map(lambda g: np.testing.assert_array_equal(g, 0), gradient)


@pytest.mark.parametrize("size", [1, 3])
def test_sequences_of_no_steps_have_norm_zero(size):
    """Red if XLA squares a constant 0 and its scale each by itself, 0 · ∞."""

    def loss_fn(params, x):
        last, _ = jax.lax.scan(lambda h, row: (jnp.tanh(h @ params["w"] + row), None), jnp.ones(5), x)
        return jnp.sum(x @ params["w"]) + jnp.sum(last) + jnp.sum(params["a"])

    params, x = {"w": jnp.ones((5, 5)), "a": jnp.ones(4)}, jnp.zeros((size, 0, 5))
    np.testing.assert_allclose(per_example_grad_norms(loss_fn)(params, x), np.full(size, 2.0))
    norms = per_example_grad_norms(loss_fn, per_leaf=True)(params, x)
    assert norms["w"].tolist() == [0] * size and norms["a"].tolist() == [2] * size


def test_callers_may_forbid_the_promotion_of_ranks():
    """Red if ranks meet inside, so that what works alone fails in a program that forbids it."""
    loss_fn, params, *batch = model_problem("mlp", 3)
    with jax.numpy_rank_promotion("raise"):
        jax.eval_shape(value_grad_and_norms(lambda *args: loss_fn(*args)), params, jnp.ones(3), *batch)


def test_a_dictionary_batch_and_any_pytree_of_parameters():
    params = {"a": [jnp.ones(3), jnp.ones(())]}
    batch = {"x": jnp.arange(6.0).reshape(2, 3)}
    norms = per_example_grad_norms(lambda p, e: p["a"][0] @ e["x"] + 2 * p["a"][1])(params, batch)
    np.testing.assert_allclose(norms, np.sqrt(np.sum(np.arange(6.0).reshape(2, 3) ** 2, 1) + 4), rtol=1e-6)


def test_stands_inside_other_transformations():
    loss_fn, params, images, labels = model_problem("convnet", 6)
    norms_fn = per_example_grad_norms(loss_fn)
    expected = loop_norms(loss_fn, params, images, labels)
    shards = images.reshape(2, 3, *images.shape[1:]), labels.reshape(2, 3)
    for mapped in (jax.vmap, jax.pmap):
        norms = mapped(norms_fn, in_axes=(None, 0, 0))(params, *shards)
        np.testing.assert_allclose(norms.reshape(-1), expected, rtol=1e-5)


def test_norms_can_be_differentiated():
    loss_fn, params, tokens = tied_problem()

    def by_definition(params):
        gradients = jax.vmap(jax.grad(loss_fn), (None, 0))(params, tokens)
        return jnp.sum(jnp.sqrt(sum(jnp.sum(g**2, axis=(1, 2)) for g in jax.tree.leaves(gradients))))

    penalty = jax.jit(jax.grad(lambda p: jnp.sum(per_example_grad_norms(loss_fn)(p, tokens))))
    for a, b in zip(jax.tree.leaves(penalty(params)), jax.tree.leaves(jax.jit(jax.grad(by_definition))(params))):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4)
    at_zero = jax.grad(lambda p: jnp.sum(per_example_grad_norms(lambda p, x: jnp.sum(p * x**2))(p, jnp.zeros((2, 3)))))
    np.testing.assert_array_equal(at_zero(jnp.ones(3)), 0)
