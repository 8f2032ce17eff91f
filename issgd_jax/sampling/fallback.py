"""Values of v where a score gives none: never-scored examples, and scores of zero."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from issgd_jax.sampling.store import NEVER
from issgd_jax.sampling.sum_tree import LARGEST

# Least v of a scored example, relative to the largest: a stale score of zero must not exclude an example for ever, and
# float32 must distinguish it from zero beside any other (see `table.draw`).
MIN_RELATIVE_V = 2.0**-16


class Fallback(NamedTuple):
    """Values of v where the score alone gives none, or too small a one.

    Attributes:
      mean: f32[], v of never-scored examples: the mean of the others, or 1 if nothing is scored.
      floor: f32[], least v of a scored example.
    """

    mean: jax.Array
    floor: jax.Array


def make_fallback(v: jax.Array, scored_at: jax.Array) -> Fallback:
    """Returns the fallback for v f32[N] of all examples, scored or not."""
    scored = scored_at != NEVER
    num_scored = jnp.sum(scored)
    v = jnp.where(scored, jnp.minimum(v, LARGEST), 0)
    total, largest = jnp.sum(v), jnp.max(v)
    mean = jnp.where(num_scored > 0, total / jnp.maximum(num_scored, 1).astype(jnp.float32), 1)
    return Fallback(jnp.maximum(mean, MIN_RELATIVE_V * largest), MIN_RELATIVE_V * largest)


def apply_fallback(v: jax.Array, scored_at: jax.Array, fallback: Fallback) -> jax.Array:
    """Returns v f32[m] where never-scored examples have the mean and no scored example is below the floor."""
    return jnp.where(scored_at != NEVER, jnp.clip(v, fallback.floor, LARGEST), fallback.mean)
