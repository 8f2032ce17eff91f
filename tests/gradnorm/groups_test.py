"""Leaves that share a factor are taken side by side, and only these; norms and sums are those of the leaves."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from issgd_jax.gradnorm import clipped_grad, per_example_grad_norms, value_grad_and_norms
from issgd_jax.gradnorm.groups import grouped
from issgd_jax.gradnorm.tracing import trace_loss
from tests.gradnorm.helpers import QUICK, cast, reference

SHAPES = {
    "query": (4, 3), "key": (3, 4), "value": (4, 2, 2), "half": (4, 3), "gate": (4, 3), "state": (3, 3),
    "again": (4, 2), "heads": (4, 5), "ahead": (4, 4), "back": (4, 4), "tied": (3, 3), "once": (4, 2), "bias": (3,),
}  # fmt: skip
# What is applied to x, in any layout; what has the same δ; two uses each of the same inputs; two scans over one array.
GROUPS = [{"query", "key", "value"}, {"gate", "state"}, {"again", "heads"}, {"ahead", "back"}]


def loss_fn(p, x, z):
    hidden = jnp.tanh(x @ p["query"] + p["bias"]) + jnp.sin(x @ p["key"].T) @ p["tied"] + jnp.cos(x @ p["half"])
    value = jnp.einsum("td,dhk->thk", x, p["value"])
    twice = [jnp.sum(jnp.tanh(y @ p["again"])) + jnp.sum(jnp.sin(y @ p["heads"])) for y in (z, jnp.flip(z, 1))]

    def gated(state, row):
        return jnp.tanh(row @ p["gate"] + state @ p["state"]), None

    state, _ = jax.lax.scan(gated, hidden[0] @ p["tied"], z)
    rows = x * z
    ahead, _ = jax.lax.scan(lambda s, row: (jnp.tanh(row @ p["ahead"] + s), None), z[0], rows)
    back, _ = jax.lax.scan(lambda s, row: (jnp.sin(row @ p["back"] + s), None), z[1], rows, reverse=True)
    once = jnp.sum(jnp.tanh((ahead * back) @ p["once"]))
    return once + sum(twice) + jnp.sum(hidden * state) + jnp.sum(value**2)


@functools.cache
def problem():
    rng = np.random.default_rng(0)
    params = {name: rng.normal(scale=0.5, size=shape).astype(np.float32) for name, shape in SHAPES.items()}
    batch = [rng.normal(size=(3, 5, 4)).astype(np.float32) for _ in range(2)]
    return params, np.full(3, 2, np.float32), batch


def test_groups_are_the_leaves_that_share_a_factor():
    """Red if a shared factor is not seen, so that each leaf costs as much as alone, or types are mixed."""
    params, _, batch = problem()
    params = params | {"half": params["half"].astype(jnp.bfloat16)}
    loss, groups = trace_loss(loss_fn, (params, *batch), 0, False), {}

    def trace(params, batch):
        gradients = loss.factored_gradients(params, batch)[2]
        for apart in True, False:
            groups[apart] = [{sorted(SHAPES)[leaf] for leaf in group.leaves} for group in grouped(gradients, apart)]

    jax.eval_shape(trace, loss.params, loss.batch)
    assert [group for group in groups[False] if len(group) > 1] == sorted(GROUPS, key=min)
    assert groups[True] == [{name} for name in sorted(SHAPES)]


def test_norms_gradient_and_clipped_gradient_are_those_of_a_loop_in_float64():
    """Red if a part of a group's sum goes to another leaf or layout, or the norm of a group misses a leaf."""
    params, importance_weights, batch = problem()
    losses, gradient, _, norms = reference(loss_fn, params, importance_weights, batch)

    @functools.partial(jax.jit, compiler_options=QUICK)
    def all_ways(params, importance_weights, batch):
        both = value_grad_and_norms(loss_fn, microbatch_size=2)(params, importance_weights, *batch)
        clipped = clipped_grad(loss_fn, jnp.inf, normalize_by=1.5)(params, *batch)[1:]
        return both, clipped, per_example_grad_norms(loss_fn)(params, *batch)

    with jax.enable_x64(True):
        both, clipped, alone = jax.device_get(all_ways(*cast((params, importance_weights, batch), np.float64)))
    equal = functools.partial(jax.tree.map, functools.partial(np.testing.assert_allclose, rtol=1e-10, atol=1e-13))
    equal(both, (losses, gradient, norms))
    equal((*clipped, alone), (gradient, norms, norms))
