"""State of a sampler: one pytree of arrays, flat, so that every library that saves pytrees can save it."""

from typing import Any, NamedTuple

import jax

from issgd_jax.sampling.store import Rejected, ScoreStore
from issgd_jax.sampling.table import Table
from issgd_jax.sampling.visits import Visits


class SamplerState(NamedTuple):
    """State of a `Sampler`: one pytree of arrays, to be saved and restored with the caller's own.

    Attributes:
      score: f32[N], see `ScoreStore`.
      scored_at: i32[N], see `ScoreStore`.
      proposal_state: what the proposal has learned from scores.
      basis: what the proposal knows of all examples together, as of the last rebuild.
      sums: f32[M], see `Table`; None for a uniform table, and for evenly spaced visits.
      population: f32[], see `Table`.
      visits: of evenly spaced visits; None for other draws.
      times_drawn: i32[N], how often each example was in a minibatch of an update; None: not counted.
      rejected: scores that were NaN, infinite or negative.
      moments: f32[3], running means of the mean square of an example's gradient with uniform draws and with those made,
        both in units of the third, their level of late.
      key: u32[...], random key data of this run's draws.
      num_draws: i32[], draws made; the number of the next one.
      step: i32[], updates done.
      limit: f32[], largest weighted norm of an example, as of the last rebuild; infinity before. None: there is none.
    """

    score: jax.Array
    scored_at: jax.Array
    proposal_state: Any
    basis: Any
    sums: jax.Array | None
    population: jax.Array
    visits: Visits | None
    times_drawn: jax.Array | None
    rejected: Rejected
    moments: jax.Array
    key: jax.Array
    num_draws: jax.Array
    step: jax.Array
    limit: jax.Array | None = None

    @property
    def store(self) -> ScoreStore:
        """The last score of every example and the step of the parameters that gave it."""
        return ScoreStore(self.score, self.scored_at)

    @property
    def table(self) -> Table | Visits:
        """What is drawn from."""
        if self.visits is not None:
            return self.visits
        return Table(self.sums, self.population, self.score.shape[0])

    def with_store(self, store: ScoreStore) -> "SamplerState":
        """Returns the state with other scores."""
        return self._replace(score=store.score, scored_at=store.scored_at)

    def with_table(self, table: Table) -> "SamplerState":
        """Returns the state that draws from another table."""
        return self._replace(sums=table.sums, population=table.population)
