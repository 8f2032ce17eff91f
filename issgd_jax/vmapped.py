"""Conditions that stay conditions under `vmap`, which else computes both sides of each `lax.cond`, always."""

import jax
import jax.numpy as jnp


@jax.custom_batching.custom_vmap
def for_all(condition: jax.Array) -> jax.Array:
    """Returns whether a condition bool[] holds for all instances that are vmapped together; alone, the condition.

    Example:
      >>> jax.vmap(for_all, out_axes=None)(jnp.array([True, False])).item(), for_all(jnp.array(True)).item()
      (False, True)
    """
    return condition


@jax.custom_batching.custom_vmap
def for_any(condition: jax.Array) -> jax.Array:
    """Returns whether a condition bool[] holds for any instance that is vmapped together; alone, the condition.

    Example:
      >>> jax.vmap(for_any, out_axes=None)(jnp.array([True, False])).item(), for_any(jnp.array(False)).item()
      (True, False)
    """
    return condition


# One value that all share, so that a condition on it is not vmapped; again, for a vmap outside.
for_all.def_vmap(lambda axis_size, is_batched, conditions: (for_all(jnp.all(conditions)), False))
for_any.def_vmap(lambda axis_size, is_batched, conditions: (for_any(jnp.any(conditions)), False))
