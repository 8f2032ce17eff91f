"""The limit on what one example adds to a minibatch, relative to the mean norm of all."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp

from issgd_jax.limits import LimitedWeights
from issgd_jax.sampling.store import ScoreStore
from issgd_jax.sampling.sum_tree import LARGEST
from issgd_jax.sampling.table import Draw


class RelativeLimit(NamedTuple):
    """Limit in units of the mean norm.

    It is `factor` times the mean of the last known norms of all examples; but at least `2 B / N` times the largest for
    each minibatch from one visit of an example to its next, so that one that is drawn as often as can be is paid twice
    the time that passes.

    Attributes:
      factor: >= 2. With 1, minibatches could not stand for the time that they take; and with exact scores, weighted
        norms are already up to 1 / (1 - uniform share) times the mean.
      batch_size: B.

    Example:
      >>> limit = RelativeLimit(5.0, batch_size=1)
      >>> store, _ = ScoreStore.init(4).write(jnp.arange(2), jnp.array([1.0, 3.0]), jnp.int32(0))
      >>> float(limit.of(limit.levels(store))), float(limit.of(limit.levels(store), period=8))
      (10.0, 12.0)
    """

    factor: float
    batch_size: int

    def levels(self, store: ScoreStore) -> jax.Array:
        """Returns f32[2], the limit by the mean norm, and by the largest for each minibatch; 0 if none is known; O(N).

        Args:
          store: the scores, which are norms.
        """
        scores = jnp.where(store.scored, jnp.minimum(store.score, LARGEST), 0)
        mean = jnp.sum(scores) / jnp.maximum(jnp.sum(store.scored), 1).astype(jnp.float32)
        levels = jnp.stack([self.factor * mean, jnp.max(scores) * (2 * self.batch_size / len(store))])
        return levels.astype(jnp.float32)

    def lower(self, drawn: Draw, levels: jax.Array, num_in_flight: jax.Array) -> Draw:
        """Returns the draw with `LimitedWeights`.

        Args:
          levels: f32[2], see there.
          num_in_flight: i32[], minibatches drawn that are not updated yet, besides this one: none of them, nor of those
            drawn until its update, has an example of this one.
        """
        limit = self.of(levels, jnp.maximum(num_in_flight, 0) + 1)
        return dataclasses.replace(drawn, importance_weights=LimitedWeights(drawn.importance_weights, limit))

    def of(self, levels: jax.Array, period: int | jax.Array = 1) -> jax.Array:
        """Returns the largest weighted norm f32[] of an example; infinity while no norm above 0 is known.

        Args:
          levels: f32[2], see there.
          period: i32[], minibatches from one visit of an example to its next, at the least: 1, or more where updates
            come late or draws are made ahead.
        """
        limit = jnp.maximum(levels[0], levels[1] * jnp.asarray(period, jnp.float32))
        return jnp.where(limit > 0, limit, jnp.inf)
