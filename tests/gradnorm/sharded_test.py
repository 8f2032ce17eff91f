"""Parameters and batches that are sharded over a mesh, against one device; four simulated devices."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from issgd_jax.gradnorm import clipped_grad, per_example_grad_norms, value_grad_and_norms
from tests.gradnorm.helpers import jitted_grad, model_problem

BATCH_SIZE = 8
WEIGHTS = np.linspace(0.5, 2, BATCH_SIZE, dtype=np.float32)


def mesh_of(kind):
    return jax.make_mesh((2, 2), ("data", "model"), axis_types=(kind, kind))


def specs(params):
    """Both at once: the last axis as in tensor parallelism, the one before as in FSDP, where they can be divided."""

    def spec(x):
        divided = [name if x.shape[axis] % 2 == 0 else None for axis, name in ((-2, "data"), (-1, "model"))[-x.ndim :]]
        return P(*[None] * (x.ndim - len(divided)), *divided)

    return jax.tree.map(spec, params)


def place(mesh, params, *batch):
    """Returns the arguments of value_grad_and_norms, sharded."""
    params = jax.tree.map(lambda x, spec: jax.device_put(x, NamedSharding(mesh, spec)), params, specs(params))
    return params, *jax.device_put((WEIGHTS, *batch), NamedSharding(mesh, P("data")))


def loop(loss_fn, params, *batch):
    """Returns the weighted gradient and the norms, by one gradient at a time on one device."""
    gradients = [jitted_grad(loss_fn)(params, *(x[i] for x in batch)) for i in range(BATCH_SIZE)]
    stacked = jax.tree.map(lambda *leaves: np.stack(leaves).astype(float), *gradients)
    gradient = jax.tree.map(lambda g: np.tensordot(WEIGHTS, g, 1) / BATCH_SIZE, stacked)
    squares = [np.sum(g**2, tuple(range(1, g.ndim))) for g in jax.tree.leaves(stacked)]
    return gradient, np.sqrt(sum(squares))


def check_close(gradient, norms, expected):
    np.testing.assert_allclose(norms, expected[1], rtol=1e-5)
    jax.tree.map(lambda g, e: np.testing.assert_allclose(g, e, rtol=1e-4, atol=1e-5), gradient, expected[0])


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=str)
@pytest.mark.parametrize("name", ["mlp", "convnet", "transformer"])
def test_sharded_parameters_and_batch(name, kind):
    """Red if a shard's numbers are wrong, an Explicit axis meets a product of unknown layout, or results are gathered.

    With Auto axes results have the layout that `out_shardings` asks for, with Explicit axes that of the arguments.
    """
    loss_fn, params, *batch = model_problem(name, BATCH_SIZE)
    mesh = mesh_of(kind)
    args = place(mesh, params, *batch)
    layouts = jax.tree.map(lambda x: x.sharding, (args[1], args[0], args[1]))
    with jax.set_mesh(mesh):
        step = value_grad_and_norms(loss_fn)
        step = jax.jit(step, out_shardings=layouts) if kind == AxisType.Auto else step
        _, gradient, norms = results = step(*args)
    for result, layout in zip(jax.tree.leaves(results), jax.tree.leaves(layouts)):
        assert result.sharding.is_equivalent_to(layout, result.ndim)
    check_close(gradient, norms, loop(loss_fn, params, *batch))


def normalized_convolution(params, image, label):
    """The gradient of the kernel passes through its normalisation, which no rule covers, in a scan."""
    kernel = params["kernel"] / (1 + jnp.linalg.norm(params["kernel"]))
    layout = ("NHWC", "HWIO", "NHWC")

    def layer(x, _):
        return jnp.tanh(
            jax.lax.conv_general_dilated(x[None], kernel, (1, 1), "SAME", dimension_numbers=layout)[0]
        ), None

    return jnp.sum(jax.lax.scan(layer, image, None, length=2)[0] * jnp.arange(1.0, 4.0)) + label


def convolution_problem():
    rng = np.random.default_rng(0)
    params = {"kernel": rng.normal(size=(3, 3, 3, 3)).astype(np.float32)}
    return params, rng.normal(size=(BATCH_SIZE, 5, 5, 3)).astype(np.float32), np.zeros(BATCH_SIZE, np.float32)


def test_kernels_that_are_normalised():
    """Red if XLA computes a kernel's gradients as one convolution with a group for each example of a sharded batch."""
    params, *batch = convolution_problem()
    mesh = mesh_of(AxisType.Auto)
    args = jax.device_put(params, NamedSharding(mesh, P())), *place(mesh, {}, *batch)[1:]
    _, gradient, norms = value_grad_and_norms(normalized_convolution)(*args)
    check_close(gradient, norms, loop(normalized_convolution, params, *batch))


def test_shard_map_with_its_checks(monkeypatch):
    """Red if the type of an intermediate does not say over which axis it varies."""
    params, *batch = convolution_problem()
    params["w"] = np.cos(np.arange(60, dtype=np.float32)).reshape(3, 20)

    def loss_fn(params, image, label):  # in microbatches; the matrix has 4 uses, in 4 blocks
        return normalized_convolution(params, image, label) + jnp.sum(jnp.tanh(image[0, :4] @ params["w"]))

    monkeypatch.setattr("issgd_jax.gradnorm.pairs.BLOCK", 1)
    mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,))

    @jax.jit
    @functools.partial(
        jax.shard_map,
        mesh=mesh,
        in_specs=(P(), P("data"), P("data"), P("data")),
        out_specs=(P(), P(), P("data"), P("data")),
    )
    def step(params, importance_weights, *batch):
        _, gradient, norms = value_grad_and_norms(loss_fn, microbatch_size=1)(params, importance_weights, *batch)
        _, clipped, _ = clipped_grad(loss_fn, max_norm=1.0)(params, *batch)
        return (*jax.lax.pmean((gradient, clipped), "data"), norms, per_example_grad_norms(loss_fn)(params, *batch))

    gradient, clipped, norms, alone = step(params, WEIGHTS, *batch)
    check_close(gradient, norms, loop(loss_fn, params, *batch))
    np.testing.assert_allclose(alone, norms, rtol=1e-6)
    expected = clipped_grad(loss_fn, max_norm=1.0)(params, *batch)[1]
    jax.tree.map(lambda g, e: np.testing.assert_allclose(g, e, rtol=1e-4, atol=1e-6), clipped, expected)


def test_matrices_in_parts_under_shard_map():
    """Red if what all parts share, the bias, gets a part of its gradient, or one that is added up over the examples."""
    rng = np.random.default_rng(0)
    shapes = {"w": (4, 6), "v": (6, 3), "bias": (3,)}
    params = {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    parts = {"w": P(None, "model"), "v": P("model"), "bias": P()}
    x = rng.normal(size=(BATCH_SIZE, 4)).astype(np.float32)

    def loss_fn(params, x, total=lambda y: y):
        return jnp.sum(jnp.tanh(total(jnp.tanh(x @ params["w"]) @ params["v"]) + params["bias"]))

    def step(params, importance_weights, x):
        in_parts = functools.partial(loss_fn, total=lambda y: jax.lax.psum(y, "model"))
        grad_fn = value_grad_and_norms(in_parts, squared=True, per_leaf=True, microbatch_size=2)
        _, gradient, squares = grad_fn(params, importance_weights, x)
        return (
            jax.lax.pmean(gradient, "data"),
            jax.lax.psum((squares["w"], squares["v"]), "model"),
            jax.lax.pmean(squares["bias"], "model"),
        )

    def sharded(x_spec):
        specs = {"in_specs": (parts, P("data"), x_spec), "out_specs": (parts, P("data"), P("data"))}
        return jax.jit(jax.shard_map(step, mesh=mesh_of(AxisType.Auto), **specs))(params, WEIGHTS, x)

    gradient, squares, of_bias = sharded(P("data"))
    check_close(gradient, np.sqrt(sum(map(np.asarray, (*squares, of_bias)))), loop(loss_fn, params, x))
    with pytest.raises(ValueError, match="axis 'model' shards some leaves of params"):
        sharded(P("data", "model"))


def test_clipping_over_explicit_axes_and_what_a_loss_cannot_do_there():
    """Red if the clipped gradient has another layout than its parameters, or JAX's error comes without a remedy."""
    params, x = {"w": np.ones((4, 2), np.float32)}, np.arange(32, dtype=np.float32).reshape(8, 4)
    mesh = mesh_of(AxisType.Explicit)
    (sharded, _, rows), frozen = place(mesh, params, x), place(mesh, params, x)[0]["w"]
    grad_fn = clipped_grad(lambda p, x: jnp.sum(jnp.tanh(x @ p["w"])), max_norm=1.0, noise_multiplier=0.0)
    _, gradient, norms = grad_fn(sharded, rows, noise_key=jax.random.key(0))
    expected = grad_fn(params, x, noise_key=jax.random.key(0))
    np.testing.assert_allclose(gradient["w"], expected[1]["w"], rtol=1e-5)
    assert jax.typeof(gradient["w"]).sharding.spec == P("data", "model") and jax.typeof(norms).sharding.spec == P(
        "data"
    )
    with pytest.raises(Exception, match="mesh") as raised:
        per_example_grad_norms(lambda p, x: jnp.sum(x @ (p["w"] + frozen)))(sharded, rows)
    assert "AxisType.Auto" in "".join(raised.value.__notes__)
