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

    It is `factor` times the mean of the last known norms of all examples. Where one example has nearly all of the
    gradient, that would be too little for it ever to be paid: the limit is at least `2 B / N` times the largest norm,
    for each minibatch from one of its visits to the next. It is then paid twice the time that passes.

    Attributes:
      factor: >= 2. With 1, minibatches could not stand for the time that they take; and with exact scores, weighted
        norms are already up to 1 / (1 - uniform share) times the mean.
      num_examples: N.
      batch_size: B.

    Example:
      >>> limit = RelativeLimit(5.0, num_examples=4, batch_size=1)
      >>> store, _ = ScoreStore.init(4).write(jnp.arange(2), jnp.array([1.0, 3.0]), jnp.int32(0))
      >>> float(limit.of(norm_levels(store))), float(limit.of(norm_levels(store), period=8))
      (10.0, 12.0)
    """

    factor: float
    num_examples: int
    batch_size: int

    def lower(self, drawn: Draw, levels: jax.Array, num_in_flight: jax.Array) -> Draw:
        """Returns the draw with `LimitedWeights`.

        Args:
          levels: f32[2], see `norm_levels`.
          num_in_flight: i32[], other minibatches from the draw of this one to its update: its examples are in none of
            them, if there are enough others.
        """
        limit = self.of(levels, jnp.maximum(num_in_flight, 0) + 1)
        return dataclasses.replace(drawn, importance_weights=LimitedWeights(drawn.importance_weights, limit))

    def of(self, levels: jax.Array, period: int | jax.Array = 1) -> jax.Array:
        """Returns the largest weighted norm f32[] of an example; infinity while no norm above 0 is known.

        Args:
          levels: f32[2], see `norm_levels`.
          period: i32[], minibatches from one visit of an example to its next, at the least: 1, or more where updates
            come late or draws are made ahead.
        """
        share = jnp.asarray(period, jnp.float32) * (2 * self.batch_size / self.num_examples)
        limit = jnp.maximum(self.factor * levels[0], share * levels[1])
        return jnp.where(limit > 0, limit, jnp.inf)


def norm_levels(store: ScoreStore) -> jax.Array:
    """Returns f32[2], the mean and the largest of the scores, which are norms; 0 where none is known; O(N)."""
    scores = jnp.where(store.scored, jnp.minimum(store.score, LARGEST), 0)
    mean = jnp.sum(scores) / jnp.maximum(jnp.sum(store.scored), 1).astype(jnp.float32)
    return jnp.stack([mean, jnp.max(scores)]).astype(jnp.float32)
