"""Each fast norm against a Python loop of `jax.grad`; a dropped leaf, example or square root turns these red."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from issgd_jax import losses, models
from issgd_jax.gradnorm import explain, per_example_grad_norms, value_grad_and_norms

SHAPES = {"mlp": (6, 5, 2), "convnet": (8, 8, 3), "gru": (7, 4, 1), "transformer": (8, 8, 1)}
OPTIONS = {
    "mlp": {"hidden_sizes": (16, 8)},
    "convnet": {"channels": (4, 6), "dense_size": 8},
    "gru": {"units": 8},
    "transformer": {"num_layers": 1, "width": 8, "num_heads": 2},
}


def loop(loss_fn, params, *batch):
    """The definition: one gradient at a time, its norm in float64 on the host."""
    grad = jax.jit(jax.grad(loss_fn))
    norms = []
    for i in range(len(batch[0])):
        leaves = jax.tree.leaves(grad(params, *(x[i] for x in batch)))
        norms.append(np.sqrt(sum(np.sum(np.asarray(leaf, np.float64) ** 2) for leaf in leaves)))
    return np.array(norms)


def problem(name, size, seed=0):
    model = models.MODELS[name](10, **OPTIONS[name])
    rng = np.random.default_rng(seed)
    images = rng.normal(size=(size, *SHAPES[name])).astype(np.float32)
    labels = rng.integers(0, 10, size).astype(np.int32)
    params = model.init(jax.random.key(seed), images[0])
    return lambda p, image, label: losses.example_loss(model.apply(p, image), label), params, images, labels


@pytest.mark.parametrize("name", models.MODELS)
def test_equals_a_loop_for_every_model(name):
    loss_fn, params, images, labels = problem(name, 13)
    norms = jax.jit(per_example_grad_norms(loss_fn, microbatch_size=4))(params, images, labels)
    np.testing.assert_allclose(norms, loop(loss_fn, params, images, labels), rtol=1e-5)


@settings(deadline=None, max_examples=25)
@given(size=st.integers(1, 9), microbatch=st.integers(1, 12), width=st.integers(1, 5), seed=st.integers(0, 99))
def test_any_batch_and_microbatch_size(size, microbatch, width, seed):
    rng = np.random.default_rng(seed)
    params = {"w": rng.normal(size=(width, 3)).astype(np.float32), "unused": np.ones(2, np.float32)}
    x = rng.normal(size=(size, width)).astype(np.float32)

    def loss_fn(p, row):
        return jnp.sum(jnp.tanh(row @ p["w"]) ** 2)

    norms = per_example_grad_norms(loss_fn, microbatch_size=microbatch)(params, x)
    np.testing.assert_allclose(norms, loop(loss_fn, params, x), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", ["convnet", "transformer"])
def test_memory_bounds_below_one_gradient_leave_the_numbers_alone(name, monkeypatch):
    monkeypatch.setattr("issgd_jax.gradnorm.norms.CPU_BYTES", 16)
    monkeypatch.setattr("issgd_jax.gradnorm.norms.UNCOVERED_BYTES", 16)
    loss_fn, params, *batch = problem(name, 3)
    np.testing.assert_allclose(
        per_example_grad_norms(loss_fn)(params, *batch), loop(loss_fn, params, *batch), rtol=1e-5
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
    monkeypatch.setattr("issgd_jax.gradnorm.cost.by_gram", lambda x: gram)
    loss_fn, params, *batch = tied_problem() if name == "tied" else problem(name, 5)
    importance_weights = np.linspace(0.5, 2, len(batch[0]), dtype=np.float32)
    losses, gradient, norms = value_grad_and_norms(loss_fn)(params, importance_weights, *batch)

    def weighted(params):
        losses = jnp.stack([loss_fn(params, *(x[i] for x in batch)) for i in range(len(batch[0]))])
        return jnp.mean(importance_weights * losses), losses

    expected, expected_losses = jax.jit(jax.grad(weighted, has_aux=True))(params)
    np.testing.assert_allclose(norms, loop(loss_fn, params, *batch), rtol=1e-5)
    np.testing.assert_allclose(losses, expected_losses, rtol=1e-5, atol=1e-6)
    jax.tree.map(lambda g, e: np.testing.assert_allclose(g, e, rtol=1e-4, atol=1e-5), gradient, expected)


def arrays_made(jaxpr):
    """Shapes of all arrays that a jaxpr and the jaxprs within it make."""
    for eqn in jaxpr.eqns:
        yield from (v.aval.shape for v in eqn.outvars)
        for inner in jax.tree.leaves(list(eqn.params.values()), is_leaf=lambda x: hasattr(x, "eqns")):
            if hasattr(inner, "eqns"):
                yield from arrays_made(getattr(inner, "jaxpr", inner))


@pytest.mark.parametrize("name", ["mlp", "tied"])
def test_no_gradient_is_formed(name):
    size = 20
    if name == "mlp":
        loss_fn, params, *batch = problem("mlp", size)
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


def test_squared_and_per_leaf_norms_add_up():
    loss_fn, params, *batch = problem("convnet", 4)
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
        loop(lambda p, x, i=i: loss_fn(x, *[p if j == i else (w, v)[j] for j in (0, 1)]), (w, v)[i], x) for i in (0, 1)
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
    loss_fn, params, images, labels = problem("mlp", 5)

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
    loss_fn, params, *batch = problem("convnet", 7)
    importance_weights = np.linspace(0.1, 3, 7, dtype=np.float32)
    whole = value_grad_and_norms(loss_fn)(params, importance_weights, *batch)
    parts = value_grad_and_norms(loss_fn, microbatch_size=microbatch_size)(params, importance_weights, *batch)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-6), parts, whole)


def test_a_key_for_each_example_drops_out_the_same_units():
    loss_fn, params, images, labels = problem("mlp", 4)
    keys = jax.random.split(jax.random.key(0), 4)

    def noisy(params, image, label, key):
        return loss_fn(params, image * jax.random.bernoulli(key, 0.5, image.shape), label)

    norms = per_example_grad_norms(noisy)(params, images, labels, keys)
    np.testing.assert_allclose(norms, loop(noisy, params, images, labels, keys), rtol=1e-5)


def test_a_gradient_that_is_no_number_is_not_taken_for_zero():
    norms = per_example_grad_norms(lambda p, x: jnp.sum(jnp.log(x @ p)))(
        jnp.ones((3, 3)), jnp.array([[1.0] * 3, [0.0] * 3])
    )
    assert np.isfinite(norms[0]) and not np.isfinite(norms[1])


def test_a_bfloat16_network_is_measured_in_float32():
    loss_fn, params, images, labels = problem("transformer", 3)
    expected = loop(loss_fn, params, images, labels)
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


def test_a_dictionary_batch_and_any_pytree_of_parameters():
    params = {"a": [jnp.ones(3), jnp.ones(())]}
    batch = {"x": jnp.arange(6.0).reshape(2, 3)}
    norms = per_example_grad_norms(lambda p, e: p["a"][0] @ e["x"] + 2 * p["a"][1])(params, batch)
    np.testing.assert_allclose(norms, np.sqrt(np.sum(np.arange(6.0).reshape(2, 3) ** 2, 1) + 4), rtol=1e-6)


@pytest.mark.parametrize(
    ("error", "message", "loss_fn", "params", "batch"),
    [
        (ValueError, r"one floating-point scalar.*\(3,\)", lambda p, x: p * x, jnp.ones(3), (jnp.ones((2, 3)),)),
        (
            ValueError,
            "differ in their leading axis",
            lambda p, x, y: p @ x,
            jnp.ones(3),
            (jnp.ones((2, 3)), jnp.ones(4)),
        ),
        (ValueError, r"at least one example.*\(0, 3\)", lambda p, x: p @ x, jnp.ones(3), (jnp.ones((0, 3)),)),
        (ValueError, "at least one example", lambda p, x: p @ p, jnp.ones(3), (jnp.float32(1),)),
        (ValueError, "at least one example", lambda p: p @ p, jnp.ones(3), ()),
        (
            TypeError,
            r"params\['w'\] has dtype int32 and shape \(3,\)",
            lambda p, x: p["w"] @ x,
            {"w": jnp.ones(3, jnp.int32)},
            (jnp.ones((2, 3)),),
        ),
    ],
)
def test_bad_input_is_named(error, message, loss_fn, params, batch):
    with pytest.raises(error, match=message):
        per_example_grad_norms(loss_fn)(params, *batch)


@pytest.mark.parametrize("transform", [per_example_grad_norms, value_grad_and_norms])
def test_microbatch_size_must_be_positive(transform):
    with pytest.raises(ValueError, match="microbatch_size must be >= 1, got 0"):
        transform(lambda p, x: p @ x, microbatch_size=0)


@pytest.mark.parametrize("importance_weights", [1.0, np.ones(3, np.float32), np.ones((2, 1), np.float32)])
def test_importance_weights_of_another_shape_are_refused(importance_weights):
    with pytest.raises(ValueError, match=r"importance_weights must have shape \(2,\)"):
        value_grad_and_norms(lambda p, x: p @ x)(jnp.ones(3), importance_weights, jnp.ones((2, 3)))


@pytest.mark.parametrize("argnums", [2, (), (0, 5)])
def test_argnums_out_of_range_are_refused(argnums):
    with pytest.raises(ValueError, match="argnums must name some of the 2 arguments"):
        per_example_grad_norms(lambda p, x: p @ x, argnums=argnums)(jnp.ones(3), jnp.ones((2, 3)))


def test_stands_inside_other_transformations():
    loss_fn, params, images, labels = problem("convnet", 6)
    norms_fn = per_example_grad_norms(loss_fn)
    expected = loop(loss_fn, params, images, labels)
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


def test_explain_names_the_rule_of_every_leaf():
    rng = np.random.default_rng(0)
    shapes = {"table": (50, 4), "kernel": (3, 3, 1, 4), "late": (2, 2, 64, 64), "recurrent": (4, 4), "once": (4, 5),
              "offset": (4,), "long": (4, 4), "unused": (2, 2)}  # fmt: skip
    params = {name: jnp.float32(rng.normal(size=shape)) for name, shape in shapes.items()}

    def loss_fn(p, image, small, tokens):
        x = jax.lax.conv_general_dilated(
            image[None], p["kernel"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        y = jax.lax.conv_general_dilated(
            small[None], p["late"], (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        state, _ = jax.lax.scan(lambda s, x: (jnp.tanh(s @ p["recurrent"] + x), None), jnp.zeros(4), p["table"][tokens])
        z = jnp.tanh(x[0].reshape(-1, 4) @ p["long"]) + p["offset"]
        return jnp.sum(jnp.tanh(state @ p["once"])) + jnp.sum(jnp.tanh(y)) + jnp.mean(z**2)

    batch = jnp.ones((2, 8, 8, 1)), jnp.ones((2, 3, 3, 64)), jnp.ones((2, 2), jnp.int32)
    table = explain(loss_fn, params, *batch)
    rules = {row.name[2:-2]: row.rule for row in table.rows}
    assert rules == {
        "table": "one-hot", "kernel": "patches", "late": "patches + gram", "recurrent": "gram", "once": "outer",
        "offset": "formed", "long": "formed", "unused": "zero",
    }  # fmt: skip
    by_name = {row.name[2:-2]: row for row in table.rows}
    assert {name: row.shape for name, row in by_name.items()} == shapes
    assert (by_name["once"].uses, by_name["once"].left, by_name["once"].right) == ("1", 4, 5)
    assert (by_name["recurrent"].uses, by_name["kernel"].uses) == ("2", "64")
    assert by_name["late"].flops < by_name["late"].formed_flops
    assert by_name["kernel"].flops == by_name["kernel"].formed_flops
    assert table.total.flops == sum(row.flops for row in table.rows)
    lines = str(table).splitlines()
    assert len(lines) == len(shapes) + 2 and len({len(line) for line in lines[1:-1]}) == 1


def test_explain_computes_nothing():
    loss_fn, params, images, labels = problem("mlp", 2)
    shapes = jax.eval_shape(lambda: (params, images, labels))
    assert {row.rule for row in explain(loss_fn, *shapes).rows} == {"outer", "formed"}
