"""The limit on what one example adds to a minibatch, for the backward pass that obeys it and the sampler that knows."""

import jax
import jax.numpy as jnp


def limit_weights(importance_weights: jax.Array, norms: jax.Array, limit: jax.Array) -> jax.Array:
    """Returns importance weights f[B] lowered such that none exceeds `limit / norm`.

    Args:
      importance_weights: f[B].
      norms: f[B], gradient norms; where one is not finite, the importance weight stays.
      limit: f[] or f[B], > 0, largest product of both; infinity or NaN lowers nothing.

    Example:
      >>> limit_weights(jnp.array([3.0, 0.5]), jnp.array([4.0, 4.0]), jnp.float32(6.0)).tolist()
      [1.5, 0.5]
    """
    is_above = jnp.isfinite(norms) & (importance_weights * norms > limit)
    lowered = limit / jnp.where(is_above, norms, 1)
    return jnp.where(is_above, lowered.astype(importance_weights.dtype), importance_weights)
