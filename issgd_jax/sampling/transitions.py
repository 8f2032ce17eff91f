"""What a sampler does to its state: pure functions, compiled."""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from issgd_jax.limits import limit_weights, weights_and_limit
from issgd_jax.sampling import moments as moments_lib
from issgd_jax.sampling import table as table_lib
from issgd_jax.sampling import visits as visits_lib
from issgd_jax.sampling.draws import draw_earliest
from issgd_jax.sampling.in_place import order_after
from issgd_jax.sampling.proposal import Proposal
from issgd_jax.sampling.relative_limit import RelativeLimit, norm_levels
from issgd_jax.sampling.state import SamplerState
from issgd_jax.sampling.store import Rejected, ScoreStore
from issgd_jax.sampling.sum_tree import LARGEST
from issgd_jax.sampling.table import Draw
from issgd_jax.vmapped import for_any


def is_early(step: int | jax.Array) -> bool | jax.Array:
    """Returns whether a rebuild is due after update `step`, >= 1, of the first ones: 1, 2, 4, 8, ...

    Until the first, never-scored examples have v = 1, whatever the unit of the norms.
    """
    return step & (step - 1) == 0


# Inlined, `init`, `visit_earliest` and `update` are part of the caller's program, as if not compiled on their own.
@functools.partial(jax.jit, inline=True, static_argnames=("num_examples", "is_strided", "count_draws", "has_limit"))
def init(
    proposal: Proposal, key: jax.Array, *, num_examples: int, is_strided: bool, count_draws: bool, has_limit: bool
) -> SamplerState:
    """Returns the state before the first draw."""
    store, proposal_state, step = ScoreStore.init(num_examples), proposal.init(), jnp.int32(0)
    basis = proposal.basis(proposal_state, store, step)
    visits, table = None, table_lib.uniform_table(num_examples)
    if is_strided:
        visits = visits_lib.init(jax.random.wrap_key_data(key), num_examples)
        visits = visits_lib.rebuild(visits, proposal.v(basis, store.score, store.scored_at, step))
    else:
        table = proposal.table(basis, store, step)
    times_drawn = jnp.zeros(num_examples, jnp.int32) if count_draws else None
    return SamplerState(
        store.score, store.scored_at, proposal_state, basis, table.sums, table.population, visits, times_drawn,
        rejected=Rejected.none(), moments=moments_lib.init(), key=key, num_draws=jnp.int32(0), step=step,
        norm_levels=jnp.zeros(2, jnp.float32) if has_limit else None,
    )  # fmt: skip


@functools.partial(jax.jit, donate_argnames="state", inline=True, static_argnames=("batch_size", "limit"))
def visit_earliest(state: SamplerState, *, batch_size: int, limit: RelativeLimit | None) -> tuple[SamplerState, Draw]:
    """Returns the state after the next draw of evenly spaced visits, and that draw."""
    drawn = draw_earliest(state.visits, state.key, state.num_draws, batch_size)
    visits = visits_lib.visit(state.visits, order_after(drawn.indices, drawn.importance_weights))
    if limit is not None:
        drawn = limit.lower(drawn, state.norm_levels, num_in_flight=state.num_draws - state.step)
    return state._replace(visits=visits, num_draws=state.num_draws + 1), drawn


@functools.partial(jax.jit, donate_argnames="state", inline=True, static_argnames=("rebuild_every", "limit"))
def update(
    proposal: Proposal,
    state: SamplerState,
    drawn: Draw,
    norms,
    scores,
    scored_at,
    *,
    rebuild_every: int,
    limit: RelativeLimit | None,
) -> SamplerState:
    """Returns the state after one step, with what its minibatch has taught; see `Sampler.update`."""
    step = state.step + 1
    if state.times_drawn is not None:
        state = state._replace(
            times_drawn=state.times_drawn.at[drawn.indices].add(1, mode="drop", wrap_negative_indices=False)
        )
    if norms is None:
        if state.visits is not None:
            state = _write_v(proposal, state, drawn.indices, step, arrived=True)
        return state._replace(step=step)
    scored_at = state.step if scored_at is None else jnp.minimum(scored_at, state.step)
    indices = order_after(drawn.indices, drawn.importance_weights)
    scores = norms if scores is None else scores
    # A draw of the caller's own may have any importance weights: nothing is learned from impossible ones.
    importance_weights, drawn_limit = weights_and_limit(drawn.importance_weights)
    known = (importance_weights >= 0) & (importance_weights < LARGEST)
    norms, importance_weights = jnp.where(known, norms, jnp.nan), jnp.where(known, importance_weights, 0)
    if drawn_limit is not None:
        lowered = limit_weights(importance_weights, norms, drawn_limit)
        visits = visits_lib.owe(state.visits, indices, importance_weights - lowered)
        state, importance_weights = state._replace(visits=visits), lowered
    state = _write(proposal, state, indices, scores, norms, importance_weights, scored_at)
    moments = moments_lib.update(state.moments, norms, importance_weights)
    state = _write_v(proposal, state, indices, step, arrived=True)._replace(step=step, moments=moments)
    if not rebuild_every:
        return state
    is_due = is_early(step) | (step % rebuild_every == 0)

    def rebuild_due(state):  # under `vmap`, of those that are due
        return jax.lax.cond(is_due, functools.partial(_rebuild, proposal, limit), lambda state: state, state)

    return jax.lax.cond(for_any(is_due), rebuild_due, lambda state: state, state)


# The old table is not read, but stays an argument: the new one takes over its memory.
@functools.partial(
    jax.jit, donate_argnames="state", keep_unused=True, static_argnames=("are_norms", "whole_table", "limit")
)
def ingest(
    proposal: Proposal,
    state: SamplerState,
    indices,
    scores,
    scored_at,
    *,
    are_norms: bool,
    whole_table: bool,
    limit: RelativeLimit | None,
) -> SamplerState:
    """Returns the state with scores that were computed elsewhere; see `Sampler.ingest`."""
    indices, scores, scored_at = indices.reshape(-1), scores.reshape(-1), jnp.minimum(scored_at, state.step)
    state = _write(proposal, state, indices, scores, scores if are_norms else None, 1.0, scored_at)
    if whole_table:
        return _rebuild(proposal, limit, state)
    return _write_v(proposal, state, indices, state.step, arrived=False)


@functools.partial(jax.jit, donate_argnames="state", keep_unused=True, static_argnames="limit")
def rebuild(proposal: Proposal, state: SamplerState, *, limit: RelativeLimit | None) -> SamplerState:
    """Returns the state with the probabilities of all examples by what is known now; O(N)."""
    return _rebuild(proposal, limit, state)


@functools.partial(jax.jit, inline=True, static_argnames="batch_size")
def metrics(state: SamplerState, *, batch_size: int) -> dict[str, jax.Array]:
    """Returns the numbers f[] of `Sampler.metrics`; O(N)."""
    store, gain = state.store, moments_lib.gain(state.moments)
    effective_sample_size = (table_lib if state.visits is None else visits_lib).effective_sample_size
    staleness = jnp.where(store.scored, store.staleness(state.step), 0)
    num_scored = jnp.sum(store.scored)
    return {
        "gain": gain,
        "equivalent_batch": gain * batch_size,
        "staleness_mean": jnp.sum(staleness.astype(jnp.float32)) / jnp.maximum(num_scored, 1).astype(jnp.float32),
        "staleness_max": jnp.max(staleness),
        "scored_fraction": num_scored / len(store),
        "effective_sample_size": effective_sample_size(state.table, batch_size),
        "rejected": state.rejected.count,
    }


def _write(
    proposal: Proposal, state: SamplerState, indices, scores, norms, importance_weights, scored_at
) -> SamplerState:
    """Lets the proposal learn from gradient norms, if known, while the store has the old scores; then stores."""
    proposal_state, store = state.proposal_state, state.store
    if norms is not None and indices.size:
        proposal_state = proposal.observe(
            proposal_state, state.basis, store, indices, norms, scored_at, importance_weights
        )
        proposal_state = _with_types(proposal_state, state.proposal_state)
        indices = order_after(indices, proposal_state)
    store, rejected = store.write(indices, scores, scored_at)
    state = state.with_store(store)
    return state._replace(proposal_state=proposal_state, rejected=state.rejected.merge(rejected))


def _write_v(
    proposal: Proposal, state: SamplerState, indices: jax.Array, step: jax.Array, *, arrived: bool
) -> SamplerState:
    """Draws some examples by their new scores from now on; those that arrived are in flight no longer."""
    v = proposal.v(state.basis, *state.store.at(indices), step)
    if state.visits is None:
        return state.with_table(state.table.write(indices, v))
    return state._replace(visits=visits_lib.write(state.visits, indices, v, arrived=arrived))


def _rebuild(proposal: Proposal, limit: RelativeLimit | None, state: SamplerState) -> SamplerState:
    basis = proposal.basis(state.proposal_state, state.store, state.step)
    state = state._replace(basis=_with_types(basis, state.basis))
    if limit is not None:
        state = state._replace(norm_levels=norm_levels(state.store))
    if state.visits is None:
        return state.with_table(proposal.table(basis, state.store, state.step))
    v = proposal.v(state.basis, state.score, state.scored_at, state.step)
    return state._replace(visits=visits_lib.rebuild(state.visits, v))


def _with_types(new: Any, old: Any) -> Any:
    """Returns a pytree with the dtypes of another: a state keeps its own, also where a proposal computes in f64."""
    return jax.tree.map(lambda x, y: jnp.asarray(x, jnp.asarray(y).dtype), new, old)
