"""The limit on what one example adds to a minibatch, relative to the mean norm of all."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from issgd_jax.sampling.store import ScoreStore
from issgd_jax.sampling.sum_tree import LARGEST


class RelativeLimit(NamedTuple):
    """Limit in units of the mean norm.

    Attributes:
      factor: >= 2. With 1, minibatches could not stand for the time that they take; and with exact scores, weighted
        norms are already up to 1 / (1 - uniform share) times the mean.
      batch_size: B.
    """

    factor: float
    batch_size: int

    def of(self, store: ScoreStore, period: int | jax.Array = 1) -> jax.Array:
        """Returns the largest weighted norm f32[] of an example, by the last norm of each, the scores; O(N).

        It is `factor` times their mean; but at least `2 B / N` times the largest for each minibatch of the period, so
        that an example that is drawn as often as can be is paid twice the time that passes. Infinity while no norm
        above 0 is known.

        Args:
          store: the scores.
          period: i32[], minibatches from one visit of an example to its next, at the least: 1, or more where updates
            come late.

        Example:
          >>> store, _ = ScoreStore.init(4).write(jnp.arange(2), jnp.array([1.0, 3.0]), jnp.int32(0))
          >>> float(RelativeLimit(5.0, batch_size=1).of(store))
          10.0
        """
        scores = jnp.where(store.scored, jnp.minimum(store.score, LARGEST), 0)
        mean = jnp.sum(scores) / jnp.maximum(jnp.sum(store.scored), 1).astype(jnp.float32)
        least = jnp.asarray(period, jnp.float32) * (2 * self.batch_size / len(store))
        limit = jnp.maximum(self.factor * mean, jnp.max(scores) * least)
        return jnp.where(limit > 0, limit, jnp.inf).astype(jnp.float32)
