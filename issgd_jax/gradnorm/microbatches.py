"""Microbatches: a pass over a batch in parts, whose activations or gradients fit into memory."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from issgd_jax.gradnorm.mapping import varying_like
from issgd_jax.gradnorm.tracing import TracedLoss

# Memory for gradients that no rule covers; above it, the whole pass runs in microbatches.
UNCOVERED_BYTES = 64 * 2**20


def default_size(loss: TracedLoss) -> int | None:
    """Returns the most examples whose gradients that no rule covers fit into memory; None: all."""
    return max(1, UNCOVERED_BYTES // loss.uncovered_bytes) if loss.uncovered_bytes else None


def in_microbatches(function: Callable, batch, size: int | None, *, has_sums: bool = True):
    """Calls `function(batch) -> (outputs with leading axis B, sums or None)` on at most `size` examples at a time."""
    num_examples = jax.tree.leaves(batch)[0].shape[0]
    if size is None or size >= num_examples:
        return function(batch)
    # A chunk size that divides B avoids a copy of the batch and a second compilation of `function`.
    size = next((n for n in range(size, size // 2, -1) if num_examples % n == 0), size)
    whole = num_examples - num_examples % size
    function = jax.jit(function)  # traced once, for its shapes and for the loop
    chunks = jax.tree.map(lambda x: x[:whole].reshape(whole // size, size, *x.shape[1:]), batch)

    def one_chunk(totals, chunk):
        outputs, sums = function(chunk)
        return jax.tree.map(jnp.add, totals, sums) if has_sums else None, outputs

    shapes = jax.eval_shape(function, jax.tree.map(lambda x: x[0], chunks))[1] if has_sums else None
    zeros = jax.tree.map(lambda x: varying_like(jnp.zeros(x.shape, x.dtype), x), shapes)
    sums, outputs = lax.scan(one_chunk, zeros, chunks)
    outputs = jax.tree.map(lambda x: x.reshape(whole, *x.shape[2:]), outputs)
    if whole == num_examples:
        return outputs, sums
    last_outputs, last_sums = function(jax.tree.map(lambda x: x[whole:], batch))
    return (
        jax.tree.map(lambda x, y: jnp.concatenate([x, y]), outputs, last_outputs),
        jax.tree.map(jnp.add, sums, last_sums) if has_sums else None,
    )
