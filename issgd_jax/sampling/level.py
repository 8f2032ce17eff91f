"""The level of gradient norms: their unit, as they fall by orders of magnitude in training."""

from typing import Any

import jax
import jax.numpy as jnp

TINY = jnp.finfo(jnp.float32).tiny
# Largest norm in units of the level; larger ones are clipped, so that their squares do not overflow.
MAX_RELATIVE_NORM = 2.0**24
# Larger norms count as this: XLA divides by a scalar as it multiplies with its inverse, which would be 0 in f32.
MAX_NORM = 2.0**120
# Norms of one round that a proposal learns from.
MAX_OBSERVED = 2**16


def update_level(level: jax.Array, norms: jax.Array, importance_weights: jax.Array, num_examples: int) -> jax.Array:
    """Returns the running root mean square f32[] of norms, where those of one sweep ago count half; 0: none yet.

    Norms fall by orders of magnitude in training. What is learned in units of the level of its time stays true, and
    early norms do not outweigh later ones.

    Args:
      level: f32[], the level so far.
      norms: f32[m].
      importance_weights: f32[m]; 0 for norms that do not count.
      num_examples: N, the examples of one sweep.
    """
    count, known = jnp.sum(importance_weights), level > TINY
    unit = jnp.where(known, level, jnp.minimum(jnp.max(jnp.where(importance_weights > 0, norms, 0)), MAX_NORM))
    kept = jnp.where(known, 0.5 ** (count / num_examples), 0)
    square = kept + (1 - kept) * jnp.sum(importance_weights * normalize(norms, unit) ** 2) / jnp.maximum(count, TINY)
    return jnp.where(count > 0, jnp.minimum(unit * jnp.sqrt(square), MAX_NORM), level)


def subsample(indices: jax.Array, norms: jax.Array, importance_weights) -> tuple[jax.Array, jax.Array, Any, int]:
    """Returns every k-th of m examples, so that at most MAX_OBSERVED remain, and k; a weight may be a scalar."""
    stride = -(-indices.size // MAX_OBSERVED)
    arrays = indices, norms, jnp.asarray(importance_weights, jnp.float32)
    sampled = [x if jnp.ndim(x) == 0 else x[::stride] for x in arrays]
    return *sampled, stride


def normalize(norms: jax.Array, level: jax.Array) -> jax.Array:
    """Returns norms in units of the level, clipped so that their squares do not overflow."""
    return jnp.minimum(jnp.minimum(norms, MAX_NORM) / jnp.maximum(level, TINY), MAX_RELATIVE_NORM)
