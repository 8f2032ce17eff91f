"""What JAX can differentiate, one small loss for each, against one `jax.grad` after another.

Red for a loss if a rule takes its equation for another, loses its effect or its custom derivative, or if norms refuse
what a loop of `jax.grad` computes.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.custom_batching import custom_vmap
from jax.experimental import io_callback, sparse
from jax.sharding import PartitionSpec

from issgd_jax.gradnorm import explain, per_example_grad_norms, value_grad_and_norms
from issgd_jax.scoring import scores
from tests.gradnorm.helpers import QUICK, scalar_loss

SIZE = 6
RNG = np.random.default_rng(0)
W = RNG.normal(size=(SIZE, SIZE)).astype(np.float32)
X = RNG.normal(size=(3, 4, SIZE)).astype(np.float32)


@jax.custom_vjp
def doubled(x, w):
    return x @ w


# Not the derivative, so that it is seen whether it is used.
doubled.defvjp(lambda x, w: (x @ w, (x, w)), lambda saved, g: (g @ saved[1].T, 2 * saved[0].T @ g))


@jax.custom_jvp
def tripled(y):
    return jnp.sin(y)


tripled.defjvp(lambda primals, tangents: (tripled(*primals), 3 * jnp.cos(primals[0]) * tangents[0]))


@custom_vmap
def batched(y):
    return jnp.sin(y)


batched.def_vmap(lambda size, in_batched, y: (jnp.sin(y), True))


def on_the_host(callback, **options):
    @jax.custom_vjp
    def sine(y):
        return callback(np.sin, jax.ShapeDtypeStruct(y.shape, y.dtype), y, **options)

    sine.defvjp(lambda y: (sine(y), y), lambda y, g: (g * jnp.cos(y),))
    return sine


host_sine = on_the_host(jax.pure_callback)
positive = lambda w: w @ w.T + 9 * jnp.eye(SIZE)  # noqa: E731


def mapped(function, in_specs, out_specs, **options):
    def call(*args):
        mesh = jax.sharding.Mesh(jax.devices()[:1], ("i",))
        return jax.shard_map(function, mesh=mesh, in_specs=in_specs, out_specs=out_specs, **options)(*args)

    return call


def run_ref(w, x):
    ref = jax.new_ref(jnp.zeros((4, SIZE)))
    ref[...] = jnp.sin(x @ w)
    ref[0] = ref[0] + x[0] @ w
    return ref[...]


def in_a_scan(cell):
    return lambda w, x: lax.scan(lambda h, row: (cell(h, row, w), None), x[0], x)[0]


def ragged(w, x):
    return lax.ragged_dot(x, jnp.stack([w, w.T]), jnp.where(x[0, 0] > 0, jnp.array([1, 3]), jnp.array([2, 2])))


def narrow_dot(dtype):
    return lambda w, x: lax.dot_general(
        x.astype(dtype), w.astype(dtype), (((1,), (0,)), ((), ())), preferred_element_type=jnp.float32
    )


I = PartitionSpec("i")  # noqa: E741
NONE = PartitionSpec()
LOSSES = {
    "associative_scan": lambda w, x: lax.associative_scan(lambda a, b: a * b + jnp.sin(a), x @ w),
    "barrier": lambda w, x: lax.optimization_barrier(x @ w),
    "bcoo_of_w": lambda w, x: sparse.BCOO((w[0, :3], jnp.array([[0, 1], [1, 2], [5, 5]])), shape=(SIZE, SIZE)) @ x.T,
    "bfloat16": narrow_dot(jnp.bfloat16),
    "checkpoint_policy": lambda w, x: jax.checkpoint(
        lambda x, w: jnp.sin(jnp.sin(x @ w) @ w), policy=jax.checkpoint_policies.dots_saveable
    )(x, w),
    "cholesky": lambda w, x: jnp.linalg.cholesky(positive(w)) @ x.T,
    "collectives": lambda w, x: jax.vmap(
        lambda r: lax.psum(jnp.sin(r @ w), "t") * r + lax.ppermute(r @ w, "t", [(0, 1), (1, 0)]), axis_name="t"
    )(x[:2]),
    "complex": lambda w, x: jnp.abs((x * (1 + 2j)) @ (w + 1j * w.T)),
    "cond_in_scan": in_a_scan(lambda h, r, w: lax.cond(r[0] > 0, lambda h: jnp.tanh(h @ w), lambda h: h + r, h)),
    "custom_jvp": lambda w, x: tripled(x @ w),
    "custom_linear_solve": lambda w, x: lax.custom_linear_solve(
        lambda v: positive(w) @ v, x.T, lambda _, b: jnp.linalg.solve(positive(w), b), symmetric=True
    ),
    "custom_vjp": lambda w, x: doubled(x, w),
    "custom_vjp_in_scan": in_a_scan(lambda h, r, w: jnp.tanh(doubled(h[None], w)[0] + r)),
    "custom_vmap": lambda w, x: batched(lax.stop_gradient(x @ w)) * (x @ w),
    "debug_callback": lambda w, x: (jax.debug.callback(lambda _: None, x[0, 0]), x @ w)[1],
    "eigh": lambda w, x: jnp.linalg.eigh(positive(w))[0] * x[0, 0],
    "fft": lambda w, x: jnp.fft.irfft(jnp.fft.rfft(x) * w[0, :4]),
    "float16": narrow_dot(jnp.float16),
    "float8": lambda w, x: x @ w.astype(jnp.float8_e4m3fn).astype(jnp.float32),
    "float8_dot": narrow_dot(jnp.float8_e4m3fn),
    "int8": lambda w, x: x.astype(jnp.int8).astype(jnp.float32) @ w,
    "map": lambda w, x: lax.map(lambda r: jnp.tanh(r @ w), x, batch_size=2),
    "platform_dependent": lambda w, x: lax.platform_dependent(
        x, w, cpu=lambda x, w: jnp.sin(x @ w), default=lambda x, w: jnp.sin(x @ w)
    ),
    "random": lambda w, x: (x @ w) * jax.random.bernoulli(jax.random.key(0), 0.5, (4, SIZE)),
    "reduce_precision": lambda w, x: lax.reduce_precision(x @ w, 8, 7),
    "ref": run_ref,
    "shard_map": mapped(lambda w, x: jnp.sin(x @ w), (NONE, I), I),
    "shard_map_psum": mapped(lambda w, x: lax.psum(jnp.sin(x @ w), "i"), (I, PartitionSpec(None, "i")), NONE),
    "sort": lambda w, x: jnp.sort(x @ w, 0),
    "svd": lambda w, x: jnp.linalg.svd(w, compute_uv=False) * x[0, 0],
    "switch": lambda w, x: lax.switch(
        jnp.int32(abs(x[0, 0]) * 9) % 3, [lambda: x @ w, lambda: jnp.sin(x @ w @ w), lambda: x]
    ),
    "triangular_solve": lambda w, x: jax.scipy.linalg.solve_triangular(
        jnp.tril(w) + 3 * jnp.eye(SIZE), x.T, lower=True
    ),
    "while_without_gradient": lambda w, x: (
        (x @ w) * lax.while_loop(lambda s: s < 9, lambda s: s + 1 + lax.stop_gradient(jnp.abs(w[0, 0])), 0.0)
    ),
}
# JAX has no batching rule for these, or one that refuses.
UNBATCHED = {
    "ragged_dot": ragged,
    "ragged_dot_in_scan_jit_checkpoint": in_a_scan(
        lambda h, r, w: jnp.tanh(jax.checkpoint(jax.jit(ragged))(w, h * jnp.ones((4, 1)) + r)[0])
    ),
    "ragged_dot_in_cond": lambda w, x: lax.cond(x[0, 0] > 0, ragged, lambda w, x: x @ w, w, x),
    "pure_callback": lambda w, x: host_sine(x @ w),
    "pure_callback_beside_dense": lambda w, x: host_sine(jnp.sin(x @ w) @ w),
    "ordered_io_callback": lambda w, x: on_the_host(io_callback, ordered=True)(x @ w),
}


@pytest.mark.parametrize("name", [*LOSSES, *UNBATCHED])
def test_equals_a_loop_of_grad(name):
    function = LOSSES.get(name) or UNBATCHED[name]
    loss_fn = lambda w, x: scalar_loss(function(w, x).astype(jnp.float32))  # noqa: E731
    importance_weights = jnp.array([0.5, 1, 2])

    def both(w, x):
        ours = value_grad_and_norms(loss_fn)(w, importance_weights, x)
        return lax.map(lambda example: jax.value_and_grad(loss_fn)(w, example), x), ours

    (losses, gradients), ours = jax.jit(both, compiler_options=QUICK)(W, X)
    gradients = np.asarray(gradients, np.float64)
    tolerance = 1e-2 if name in ("bfloat16", "float16", "float8", "float8_dot") else 1e-4
    np.testing.assert_allclose(ours[0], losses, rtol=tolerance, atol=1e-5)
    np.testing.assert_allclose(ours[2], np.sqrt(np.sum(gradients**2, (1, 2))), rtol=tolerance)
    expected = np.tensordot(importance_weights, gradients, 1) / 3
    np.testing.assert_allclose(ours[1], expected, rtol=tolerance, atol=tolerance * np.max(np.abs(expected)))
    notes = explain(loss_fn, W, X).notes
    assert [note.startswith("examples are computed one at a time") for note in notes] == [True] * (name in UNBATCHED)


def test_norms_and_scores_of_a_loss_without_a_batching_rule():
    """Red if microbatches, norms alone or scores still need the rule."""
    loss_fn = lambda w, x: scalar_loss(ragged(w, x))  # noqa: E731
    norms = [per_example_grad_norms(loss_fn, microbatch_size=size)(W, X) for size in (None, 1, 2)]
    expected = [jnp.linalg.norm(jax.grad(loss_fn)(W, x)) for x in X]
    for some in (*norms, scores.GradientNorm(loss_fn)(W, X)):
        np.testing.assert_allclose(some, expected, rtol=1e-5)
    for size in (None, 2):
        np.testing.assert_allclose(scores.loss(loss_fn, size)(W, X), [loss_fn(W, x) for x in X], rtol=1e-5)


def test_a_batch_that_fails_leaves_no_effects():
    """Red if a callback before the primitive without a batching rule runs for the failed attempt too."""
    seen = []

    def loss_fn(w, x):
        jax.debug.callback(lambda _: seen.append(1), x[0, 0])
        return scalar_loss(host_sine(x @ w))

    jax.block_until_ready(per_example_grad_norms(loss_fn)(W, X))
    jax.effects_barrier()
    assert len(seen) == len(X)
