"""State of a sampler: one pytree of arrays, flat, so that every library that saves pytrees can save it."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from issgd_jax.sampling.draws import STRIDE
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
      norm_levels: f32[2], mean and largest of the known norms, as of the last rebuild, which a limit is relative to; 0
        before. None: there is no limit.
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
    norm_levels: jax.Array | None = None

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


def check_state(
    state: Any, *, num_examples: int, draw_method: str, proposal: Any, proposal_structure: Any, count_draws: bool,
    limit: float | None,
) -> None:  # fmt: skip
    """Raises TypeError or ValueError if a state is not one of the sampler with these attributes.

    Args:
      proposal_structure: structure of what the proposal learns, a tree of JAX.
    """
    if not isinstance(state, SamplerState):
        raise TypeError(
            f"state must be a SamplerState, got {type(state).__name__}: it comes from `init`, which is also the "
            "template to restore one by"
        )
    if jnp.ndim(state.step):
        raise ValueError(
            f"the state is of {' x '.join(map(str, jnp.shape(state.step)))} samplers: call this inside the `vmap` "
            "that made it"
        )
    if len(state.store) != num_examples:
        raise ValueError(
            f"the state is of {len(state.store):,} examples, the sampler of {num_examples:,}: use the sampler "
            "that made it, or its `append` or `remove`"
        )
    remedy = "use the sampler that made it, or begin with init"
    if (state.visits is None) == (draw_method == STRIDE):
        raise ValueError(f"the state is that of another draw than {draw_method!r}: {remedy}")
    if jax.tree.structure(state.proposal_state) != proposal_structure:
        raise ValueError(f"the state is that of another proposal than {proposal}: {remedy}")
    if (state.times_drawn is None) == count_draws:
        raise ValueError(
            f"the state {'does not count' if count_draws else 'counts'} how often examples are drawn, but "
            f"count_draws is {count_draws}: {remedy}"
        )
    if (state.norm_levels is None) != (limit is None):
        has = "no" if state.norm_levels is None else "a"
        raise ValueError(f"the state has {has} limit, but limit is {limit}: {remedy}")
