"""Conditions that stay conditions under `vmap`, which else computes both sides of each `lax.cond`, always."""

from collections.abc import Callable

import jax
import jax.numpy as jnp


def _reduced(reduce: Callable[[jax.Array], jax.Array]) -> Callable[[jax.Array], jax.Array]:
    """Returns the identity bool[] -> bool[], but of instances that are vmapped together one value that all share."""

    @jax.custom_batching.custom_vmap
    def shared(condition):
        return condition

    @shared.def_vmap
    def _(axis_size, is_batched, condition):
        return shared(reduce(condition)), False  # again, for a vmap outside

    return shared


def for_all(condition: jax.Array) -> jax.Array:
    """Returns whether a condition bool[] holds for all instances that are vmapped together.

    Example:
      >>> jax.vmap(for_all, out_axes=None)(jnp.array([True, False])).item(), for_all(jnp.array(True)).item()
      (False, True)
    """
    return _for_all(condition)


def for_any(condition: jax.Array) -> jax.Array:
    """Returns whether a condition bool[] holds for any instance that is vmapped together with others.

    Example:
      >>> jax.vmap(for_any, out_axes=None)(jnp.array([True, False])).item(), for_any(jnp.array(False)).item()
      (True, False)
    """
    return _for_any(condition)


_for_all, _for_any = _reduced(jnp.all), _reduced(jnp.any)
