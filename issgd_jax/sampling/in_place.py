"""Order of reads and writes, so that XLA writes in place."""

from typing import Any

import jax
import jax.numpy as jnp

from issgd_jax.sampling.checks import NO_EXAMPLE


def order_after(indices: jax.Array, read: Any) -> jax.Array:
    """Returns the indices of a write such that it needs, as data, what was read from the same arrays before.

    Without that, XLA does not know the order, and copies the arrays, O(N), instead of writing in place.
    """
    first = [x.reshape(-1)[0] for x in jax.tree.leaves(read) if x.size]  # each depends on the whole read
    num_nan = sum(jnp.isnan(x).astype(jnp.int32) for x in first)
    return jnp.where(num_nan > len(first), NO_EXAMPLE, indices)  # never more than all
