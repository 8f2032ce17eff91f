"""Per-example gradient norms by definition: `vmap` of the norm of `grad`."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

# Bytes of per-example gradients formed at one time; beyond the caches a larger microbatch is no faster.
MICROBATCH_BYTES = 64 * 2**20


def per_example_grad_norms(
    loss_fn: Callable[..., jax.Array], *, microbatch_size: int | None = None
) -> Callable[..., jax.Array]:
    """Returns `(params, *batch) -> f32[B]`, the Euclidean norm of each example's own gradient.

    Args:
      loss_fn: `(params, *example) -> f[]`, the loss of ONE example. Any JAX code, any pytree of floating-point
        parameters.
      microbatch_size: examples whose gradients are held in memory together; by default as many as fit 64 MiB.

    The returned function takes `batch` as pytrees whose leaves share the leading axis B. It is exact: equal to a Python
    loop of `jax.grad` up to rounding, with sums of squares in float32 or better. It may stand under `jit` and `pmap`.

    Raises (when called, before anything is compiled): ValueError if the batch is empty or its leaves differ in B, if
    microbatch_size < 1, or if the loss of one example is not a scalar; TypeError if a parameter is not floating-point.
    """
    if microbatch_size is not None and microbatch_size < 1:
        raise ValueError(f"microbatch_size must be >= 1, got {microbatch_size}")

    def norms(params, *batch):
        _check(loss_fn, params, batch)
        size = microbatch_size or max(1, MICROBATCH_BYTES // _num_bytes(params))
        # One example's norm, mapped over microbatches of `size`: the gradients of the rest never exist.
        return jax.lax.map(lambda example: _global_norm(jax.grad(loss_fn)(params, *example)), batch, batch_size=size)

    return norms


def _global_norm(gradient) -> jax.Array:
    squares = [jnp.sum(jnp.square(leaf.astype(_accumulator(leaf)))) for leaf in jax.tree.leaves(gradient)]
    return jnp.sqrt(sum(squares, start=jnp.float32(0)))


def _accumulator(leaf):
    return jnp.promote_types(leaf.dtype, jnp.float32)


def _num_bytes(params) -> int:
    return max(1, sum(jnp.size(leaf) * jnp.result_type(leaf).itemsize for leaf in jax.tree.leaves(params)))


def _check(loss_fn, params, batch):
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        if not jnp.issubdtype(jnp.result_type(leaf), jnp.floating):
            raise TypeError(
                f"params{jax.tree_util.keystr(path)} has dtype {jnp.result_type(leaf)}: gradients need floating point"
            )
    shapes = {f"batch{jax.tree_util.keystr(p)}": jnp.shape(x) for p, x in jax.tree_util.tree_leaves_with_path(batch)}
    if not shapes or any(shape[:1] in ((), (0,)) for shape in shapes.values()):
        raise ValueError(f"every batch argument needs a leading axis of at least one example, got {shapes}")
    if len({shape[0] for shape in shapes.values()}) > 1:
        raise ValueError(f"batch arguments differ in their leading axis: {shapes}")
    example = jax.tree.map(lambda x: jax.ShapeDtypeStruct(jnp.shape(x)[1:], jnp.result_type(x)), batch)
    loss = jax.eval_shape(loss_fn, params, *example)
    if getattr(loss, "shape", None) != ():
        raise ValueError(f"loss_fn must return one scalar for one example, got {loss}")
